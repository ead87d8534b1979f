"""Bytes that a program reads from and writes to main memory (a TPU's HBM), from its text.

Every instruction outside of fusions reads its operands and writes its results; what is fused stays
in registers. Of an array that is only sliced the slice counts, and of one that is updated in place
the update: a scan over stacked parameters would otherwise read all layers in each of them. XLA's
own `cost_analysis` counts so, too, but runs the body of a loop once.
"""

import math
import re
from collections.abc import Mapping

from clipa_t5x import hlo_text
from clipa_t5x.hlo_text import Instruction

Computations = Mapping[str, list[Instruction]]

# They move nothing, or what they run is looked at by itself.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast",
    "while", "conditional", "call", "call-start", "async-start", "after-all", "add-dependency",
    "opt-barrier", "partition-id", "replica-id", "domain",
}  # fmt: skip

_FREE_CUSTOM_CALL = re.compile(
    r'custom_call_target="(AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound)"'
)

# What reads element by element as much of its operand as is read of it.
_ELEMENTWISE = ("bitcast", "reshape", "transpose", "copy", "convert")

# XLA's TPU compiler names a collective in the fusion that starts it, in those that hide it and in
# the one that ends it. It counts as read where it starts and as written where it ends.
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HIDING, _START, _DONE = "async_collective_fusion", "AsyncCollectiveStart", "AsyncCollectiveDone"


def bytes_accessed(computations: Computations, entry: str) -> int:
    """Bytes of one run of a parsed program (`hlo_text.parse`) on one device."""
    total = 0
    for name, times, fused in hlo_text.visits(computations, entry):
        if not fused:
            body = _Body(name, computations)
            total += times * sum(body.traffic(i) for i in computations[name])
    return total


class _Body:
    """The instructions of one computation by name."""

    def __init__(self, name: str, computations: Computations):
        instructions = computations.get(name, ())
        self._computations = computations
        self._goes_on = name.startswith(_HIDING) or any(_DONE in i.rest for i in instructions)
        self._by_name = {i.name: i for i in instructions}
        self._root = next((i for i in instructions if i.is_root), None)
        self._users: dict[str, list[tuple[Instruction, int]]] = {}
        for user in instructions:
            for position, operand in enumerate(hlo_text.operands(user)):
                self._users.setdefault(operand, []).append((user, position))
        self._parameters = {
            int(i.rest.partition(")")[0]): i for i in instructions if i.operation == "parameter"
        }

    def _is_running_collective(self, instruction: Instruction) -> bool:
        """Whether it names a collective, or its end, that was counted where it started."""
        return self._goes_on and (
            instruction.operation in _COLLECTIVES or _DONE in instruction.rest
        )

    def traffic(self, instruction: Instruction) -> int:
        """Bytes that an instruction outside of fusions reads and writes."""
        operation = instruction.operation
        if operation in _FREE or operation.endswith(("-done", "-update")):
            return 0
        if operation == "custom-call" and _FREE_CUSTOM_CALL.search(instruction.rest):
            return 0
        read = 0
        for position, name in enumerate(hlo_text.operands(instruction)):
            if operand := self._by_name.get(name):
                whole = hlo_text.num_bytes(operand.shape, main_memory_only=True)
                read += round(whole * self._share_read(instruction, position))
        return read + self._written(instruction)

    def _share_read(self, user: Instruction, position: int) -> float:
        """Which share of its operand at a position an instruction reads, in [0, 1]."""
        if user.operation == "fusion":
            inner = self._called(user)
            parameter = inner._parameters.get(position)
            return inner._share_used(parameter) if parameter else 1.0
        if self._is_running_collective(user):
            return 0.0
        touched = self._touched(user) if position == 0 else None
        operand = self._operand(user, position)
        if touched is None or operand is None:
            return 1.0
        return min(1.0, _num_elements(touched) / max(1, _num_elements(operand.shape)))

    def _touched(self, user: Instruction) -> str | None:
        """Shape of what an instruction reads of its first operand; None for all of it."""
        if user.operation in ("slice", "dynamic-slice", "gather"):
            return user.shape
        if user.operation == "slice-start":  # ((operand), slice, context)
            return hlo_text.elements(user.shape)[1]
        if user.operation == "dynamic-update-slice":
            return "[0]"
        updates = self._operand(user, 2) if user.operation == "scatter" else None
        return updates.shape if updates else None

    def _share_used(self, value: Instruction) -> float:
        """Which share of a value within a fusion all that follows from it reads."""
        if value.is_root and value.operation != "parameter":
            return 1.0
        share = 0.0
        for user, position in self._users.get(value.name, []):
            if user.is_root and user.operation == "tuple":
                # A fusion that hands on what it was given does not read it.
                share += value.operation != "parameter"
            elif self._is_elementwise(user):
                share += self._share_used(user)
            else:
                share += self._share_read(user, position)
        return min(1.0, share)

    def _is_elementwise(self, instruction: Instruction) -> bool:
        """Whether it only hands on its operand, as a fusion of nothing but a copy does, too."""
        if instruction.operation == "fusion":
            inner = self._called(instruction)
            copied = inner._operand(inner._root, 0) if inner._root else None
            is_copy = inner._root is not None and inner._root.operation in _ELEMENTWISE
            return is_copy and copied is not None and copied.operation == "parameter"
        return instruction.operation in _ELEMENTWISE

    def _written(self, instruction: Instruction) -> int:
        """Bytes of an instruction's results that lie in main memory."""
        shape, operation = instruction.shape, instruction.operation
        if operation == "fusion":
            inner = self._called(instruction)
            return inner._written_as(inner._root, shape) if inner._root else 0
        if operation == "copy-start":  # (copy, original, context)
            shape = hlo_text.elements(shape)[0]
        elif operation in ("all-gather-start", "collective-permute-start", "slice-start"):
            # (operands, results, ...)
            shape = hlo_text.elements(shape)[1]
        return self._written_as(instruction, shape)

    def _written_as(self, result: Instruction, shape: str) -> int:
        """Bytes in main memory that `result` changes, where it lies as `shape` says."""
        if result.operation == "parameter" or _START in result.rest:
            return 0
        if result.operation in _COLLECTIVES and self._goes_on:
            return 0
        if result.operation == "tuple" and shape.startswith("("):
            parts = [self._operand(result, i) for i in range(len(hlo_text.elements(shape)))]
            return sum(
                self._written_as(part, element) if part else 0
                for part, element in zip(parts, hlo_text.elements(shape), strict=True)
            )
        if result.operation == "fusion":
            inner = self._called(result)
            return inner._written_as(inner._root, shape) if inner._root else 0
        if result.operation == "bitcast" and (operand := self._operand(result, 0)):
            return self._written_as(operand, shape)
        whole = hlo_text.num_bytes(shape, main_memory_only=True)
        position = {"dynamic-update-slice": 1, "scatter": 2}.get(result.operation)
        update = None if position is None else self._operand(result, position)
        if update is None:
            return whole
        share = _num_elements(update.shape) / max(1, _num_elements(result.shape))
        return round(whole * min(1.0, share))

    def _operand(self, instruction: Instruction, position: int) -> Instruction | None:
        names = hlo_text.operands(instruction)
        return self._by_name.get(names[position]) if position < len(names) else None

    def _called(self, fusion: Instruction) -> "_Body":
        name = re.search(r"calls=%?([\w.-]+)", fusion.rest)
        return _Body(name[1] if name else "", self._computations)


def _num_elements(shape: str) -> int:
    return sum(
        math.prod(int(size) for size in sizes.split(",") if size)
        for sizes in re.findall(r"\[([\d,]*)\]", shape)
    )
