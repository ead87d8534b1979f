"""Reads the text of an optimised program: its computations, instructions, calls and loops."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_ASSIGNMENT = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_OPERATION = re.compile(r" *([\w-]+)\(")
_ARRAY = re.compile(r"(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%?([\w.-]+)")
_CALLED = re.compile(r"\b(?:body|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.-]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the text: `name = shape operation(arguments)`."""

    name: str
    shape: str
    operation: str
    rest: str
    is_root: bool


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(instructions by computation, name of the entry computation)."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (assignment := _ASSIGNMENT.match(line)):
            shape, rest = _split_shape(assignment[3])
            if operation := _OPERATION.match(rest):
                computations[current].append(
                    Instruction(
                        name=assignment[2],
                        shape=shape,
                        operation=operation[1],
                        rest=rest[operation.end() :],
                        is_root=bool(assignment[1]),
                    )
                )
    return computations, entry


def _split_shape(text: str) -> tuple[str, str]:
    """Splits 'shape operation(...)'; a tuple's shape has spaces and parentheses of its own."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    end = _closing(text)
    return text[: end + 1], text[end + 1 :]


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the one at the start."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    return len(text) - 1


def visits(
    computations: Mapping[str, list[Instruction]], entry: str
) -> Iterator[tuple[str, int, bool]]:
    """Yields (computation, how often, whether within a fusion) for every call of one."""
    to_visit = [(entry, 1, False)]
    while to_visit:
        name, times, fused = to_visit.pop()
        if name not in computations:
            continue
        yield name, times, fused
        for instruction in computations[name]:
            if instruction.operation.endswith(("-done", "-update")):
                continue  # It repeats what its start calls.
            inner = times
            if instruction.operation == "while":
                inner *= trip_count(instruction, computations) or 1
            for called in _called(instruction):
                to_visit.append((called, inner, fused or instruction.operation == "fusion"))


def _called(instruction: Instruction) -> list[str]:
    """Names of the computations that an instruction runs; not those that it folds values with."""
    folds = ("all-reduce", "reduce", "sort", "scatter", "map", "select-and")
    if instruction.operation.startswith(folds):
        return []
    return [
        name for group in _CALLED.findall(instruction.rest) for name in _NAME.findall(group) if name
    ]


def trip_count(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int | None:
    """How often a `while` runs its body; None where the text does not tell.

    It does where the compiler wrote it down, and where the condition compares a counter, which
    steps by one, with a constant.
    """
    if match := _KNOWN_TRIPS.search(loop.rest):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
    body = {i.name: i for i in computations.get(condition[1] if condition else "", [])}
    root = next((i for i in body.values() if i.is_root), None)
    if root is None or root.operation != "compare" or "direction=LT" not in root.rest:
        return None
    counter, limit = (body.get(name) for name in operands(root)[:2])
    if counter is None or limit is None or limit.operation != "constant":
        return None
    index = re.search(r"index=(\d+)", counter.rest)
    start = _initial_value(loop, int(index[1]), computations) if index else None
    return None if start is None else max(0, _constant(limit) - start)


def _initial_value(
    loop: Instruction, index: int, computations: Mapping[str, list[Instruction]]
) -> int | None:
    """First value of a loop's counter, where it is a constant."""
    around = next(
        {i.name: i for i in instructions}
        for instructions in computations.values()
        if any(i is loop for i in instructions)
    )
    state = around.get(operands(loop)[0])
    if state is None or state.operation != "tuple":
        return None
    first = around.get(operands(state)[index])
    while first is not None and first.operation in ("copy", "bitcast"):
        first = around.get(operands(first)[0])
    return _constant(first) if first is not None and first.operation == "constant" else None


def _constant(instruction: Instruction) -> int:
    return int(instruction.rest.partition(")")[0])


def operands(instruction: Instruction) -> list[str]:
    """Names of an instruction's operands."""
    arguments = instruction.rest[: _closing("(" + instruction.rest) - 1]
    arguments = re.sub(r"/\*.*?\*/", "", arguments)
    return re.findall(r"%([\w.-]+)", arguments)


def elements(shape: str) -> list[str]:
    """The parts of a tuple's shape: '(a, (b, c))' has two."""
    parts, depth, start = [], 0, 1
    for i, character in enumerate(shape):
        depth += (character in "({[") - (character in ")}]")
        if (character == "," and depth == 1) or depth == 0:
            parts.append(shape[start:i])
            start = i + 1
    return parts


def num_bytes(shape: str, main_memory_only: bool = False) -> int:
    """Bytes of all arrays in a shape such as '(bf16[8,128]{1,0}, f32[])'.

    Args:
      shape: as the text spells it.
      main_memory_only: leaves out what a layout puts elsewhere: 'S(1)' is a TPU's own fast memory.
    """
    total = 0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if main_memory_only and "S(" in layout:
            continue
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        total += math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
    return total
