"""What the text of an optimised program tells: collectives, cycles that XLA expects, traffic.

The text names every loop once; here each instruction counts as often as it is run.
"""

import dataclasses
import re
from collections.abc import Mapping

from clipa_t5x import hlo_text, hlo_traffic
from clipa_t5x.hlo_text import Instruction

_CHANNEL = re.compile(r"channel_id=(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

# Asynchronous ones come as a pair; the first half carries the shapes.
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip


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
      bytes_accessed: read from and written to main memory, see `hlo_traffic`.
      unknown_loops: loops whose trip count the text does not tell; they count once.
    """

    collectives: Mapping[str, Collective]
    cycles: int
    bytes_accessed: int
    unknown_loops: int


def analyze(text: str) -> Analysis:
    """Reads the text of a compiled program (`jax.stages.Compiled.as_text`)."""
    computations, entry = hlo_text.parse(text)
    collectives: dict[str, list[int]] = {}
    overlapped: set[tuple[str, str]] = set()
    cycles = unknown = 0
    for name, times, fused in hlo_text.visits(computations, entry):
        for instruction in computations[name]:
            if instruction.operation == "while":
                unknown += hlo_text.trip_count(instruction, computations) is None
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
    return Analysis(found, cycles, hlo_traffic.bytes_accessed(computations, entry), unknown)


def _payload(instruction: Instruction, around: list[Instruction]) -> int:
    """Bytes of a collective's results; of a reduce-scatter's operands."""
    if instruction.operation.startswith("reduce-scatter"):
        names = set(hlo_text.operands(instruction))
        return sum(hlo_text.num_bytes(other.shape) for other in around if other.name in names)
    if instruction.operation in ("all-gather-start", "collective-permute-start"):
        return hlo_text.num_bytes(hlo_text.elements(instruction.shape)[1])
    return hlo_text.num_bytes(instruction.shape)
