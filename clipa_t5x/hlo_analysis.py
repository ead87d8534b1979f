"""What the text of an optimised program tells: its collectives, and cycles that XLA expects.

The text names every loop once; here each instruction counts as often as it is run.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_ASSIGNMENT = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_OPERATION = re.compile(r" *([\w-]+)\(")
_ARRAY = re.compile(r"(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%?([\w.-]+)")
_CALLED = re.compile(r"\b(?:body|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.-]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

# Asynchronous ones come as a pair; the first half carries the shapes.
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the text: `name = shape operation(arguments)`."""

    name: str
    shape: str
    operation: str
    rest: str
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a run of the program.

    Attributes:
      count: how often one is run.
      bytes: of the arrays that one device ends up with (for reduce-scatter: starts from).
    """

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Analysis:
    """One run of a program on one device.

    Attributes:
      collectives: by kind.
      cycles: that XLA expects of its computations, one after the other; 0 where it says nothing.
        Collectives have no such number.
      unknown_loops: loops whose trip count the text does not tell; they count once.
    """

    collectives: Mapping[str, Collective]
    cycles: int
    unknown_loops: int


def analyze(text: str) -> Analysis:
    """Reads the text of a compiled program (`jax.stages.Compiled.as_text`)."""
    computations, entry = parse(text)
    collectives: dict[str, list[int]] = {}
    overlapped: set[tuple[str, str]] = set()
    cycles = unknown = 0
    for name, times, fused in _visits(computations, entry):
        for instruction in computations[name]:
            if instruction.operation == "while" and trip_count(instruction, computations) is None:
                unknown += 1
            if not fused and (match := _CYCLES.search(instruction.rest)):
                cycles += times * int(match[1])
            kind = instruction.operation.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if name.startswith("all-reduce-scatter"):
                # So XLA's TPU compiler writes a reduce-scatter.
                kind = "reduce-scatter"
            elif fused and (channel := _CHANNEL.search(instruction.rest)):
                # Fused with the computations that hide it, each of which names it again.
                if (kind, channel[1]) in overlapped:
                    continue
                overlapped.add((kind, channel[1]))
            total = collectives.setdefault(kind, [0, 0])
            total[0] += times
            total[1] += times * _payload(instruction, computations[name])
    found = {kind: Collective(*total) for kind, total in sorted(collectives.items())}
    return Analysis(found, cycles, unknown)


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


def _visits(
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
    counter, limit = (body.get(name) for name in _operands(root)[:2])
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
    state = around.get(_operands(loop)[0])
    if state is None or state.operation != "tuple":
        return None
    first = around.get(_operands(state)[index])
    while first is not None and first.operation in ("copy", "bitcast"):
        first = around.get(_operands(first)[0])
    return _constant(first) if first is not None and first.operation == "constant" else None


def _constant(instruction: Instruction) -> int:
    return int(instruction.rest.partition(")")[0])


def _operands(instruction: Instruction) -> list[str]:
    """Names of an instruction's operands."""
    arguments = instruction.rest[: _closing("(" + instruction.rest) - 1]
    arguments = re.sub(r"/\*.*?\*/", "", arguments)
    return re.findall(r"%([\w.-]+)", arguments)


def _payload(instruction: Instruction, around: list[Instruction]) -> int:
    """Bytes of a collective's results; of a reduce-scatter's operands."""
    if instruction.operation.startswith("reduce-scatter"):
        names = set(_operands(instruction))
        return sum(num_bytes(other.shape) for other in around if other.name in names)
    if instruction.operation in ("all-gather-start", "collective-permute-start"):
        return num_bytes(_elements(instruction.shape)[1])
    return num_bytes(instruction.shape)


def _elements(shape: str) -> list[str]:
    """The parts of a tuple's shape: '(a, (b, c))' has two."""
    parts, depth, start = [], 0, 1
    for i, character in enumerate(shape):
        depth += (character in "({[") - (character in ")}]")
        if (character == "," and depth == 1) or depth == 0:
            parts.append(shape[start:i])
            start = i + 1
    return parts


def num_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape such as '(bf16[8,128]{1,0}, f32[])'."""
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        total += math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
    return total
