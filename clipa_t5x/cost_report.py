"""A step's cost as text for people and as JSON for programs. Each figure says where it is from."""

import dataclasses
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from clipa_t5x import step_cost, topologies
from clipa_t5x.model_info import format_bytes

SHAPES, TRACED = "analytic, shardings", "analytic, traced step"


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a step is part of.

    Attributes:
      name: of the recipe.
      total_steps: of the stage.
      price: of a chip-hour, in any currency; None where it was not stated.
    """

    name: str
    total_steps: int
    price: float | None


def memory_parts(cost: step_cost.StepCost) -> dict[str, int]:
    """Bytes of one chip by what takes them."""
    a = cost.analytic
    parts = {
        "parameters": a.param_bytes,
        "optimizer state": a.optimizer_bytes,
        "batch": a.batch_bytes,
    }
    if cost.compiled is None:
        parts["gradients"] = a.param_bytes
    elif cost.compiled.temp_bytes is not None:
        parts["temporaries"] = cost.compiled.temp_bytes
    return parts


def sent_bytes(cost: step_cost.StepCost) -> int:
    """Bytes of all collectives of one step, on one chip."""
    return sum(c.bytes for c in cost.compiled.collectives.values()) if cost.compiled else 0


def chip_hours(cost: step_cost.StepCost, stage: Stage) -> float | None:
    """Of the whole stage, training steps alone; None where the time of a step is not known."""
    if cost.seconds is None:
        return None
    return stage.total_steps * cost.seconds * cost.topology.num_chips / 3600


def as_json(cost: step_cost.StepCost, stage: Stage) -> dict[str, Any]:
    """All figures, in bytes, FLOPs and seconds; None where one is not known."""
    hours, compiled = chip_hours(cost, stage), cost.compiled
    return {
        "recipe": stage.name,
        "topology": cost.topology.name,
        "chips": cost.topology.num_chips,
        "mesh": dict(cost.mesh),
        "effort": cost.effort,
        "analytic_per_chip": dataclasses.asdict(cost.analytic),
        "compiled_per_chip": dataclasses.asdict(compiled) if compiled else None,
        "hbm_bytes_per_chip": cost.topology.kind.hbm_bytes,
        "needed_bytes_per_chip": cost.needed_bytes,
        "fits": cost.fits,
        "estimated_step_seconds": cost.seconds,
        "estimated_mfu": cost.mfu,
        "host_peak_bytes": host_peak_bytes(),
        "stage": {
            "steps": stage.total_steps,
            "chip_hours": hours,
            "price_per_chip_hour": stage.price,
            "cost": hours * stage.price if hours is not None and stage.price else None,
        },
    }


def host_peak_bytes() -> int:
    """Most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def as_text(cost: step_cost.StepCost, stage: Stage) -> str:
    """A table of all figures that are known."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in cost.mesh.items())
    shape = "x".join(map(str, cost.topology.shape))
    where = f"{cost.topology.name} ({shape})" if shape else cost.topology.name
    rows = [*_memory_rows(cost), *_compute_rows(cost), *_stage_rows(cost, stage)]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [
        f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {source}".rstrip()
        for name, value, source in rows
    ]
    head = f"{stage.name} on {where}, mesh {mesh}: a step, per chip"
    return "\n".join([head, *lines])


def format_flops(count: float) -> str:
    """'112.7 TFLOP' and the like."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if count < 1000 or unit == "TFLOP":
            return f"{count:,.4g} {unit}"
        count /= 1000
    raise AssertionError


def _memory_rows(cost: step_cost.StepCost) -> list[tuple[str, str, str]]:
    rows = []
    for name, count in memory_parts(cost).items():
        source = _compiled(cost) if name == "temporaries" else SHAPES
        rows.append((name, format_bytes(count), source))
    limit = cost.topology.kind.hbm_bytes
    of_all = "" if limit is None else f" of {format_bytes(limit)}, {cost.needed_bytes / limit:.0%}"
    if cost.compiled is None:
        rows.append(("at least, without activations", format_bytes(cost.needed_bytes) + of_all,
                     "analytic: nothing is compiled for this kind"))  # fmt: skip
    else:
        verdict = {True: "fits", False: "DOES NOT FIT", None: "no limit known"}[cost.fits]
        what = "peak memory" if cost.compiled.peak_bytes is not None else "needed, about"
        rows.append(
            (what, format_bytes(cost.needed_bytes) + of_all, f"{_compiled(cost)}: {verdict}")
        )
    return rows


def _compiled(cost: step_cost.StepCost) -> str:
    return f"compiled, {cost.effort} effort"


def _compute_rows(cost: step_cost.StepCost) -> list[tuple[str, str, str]]:
    a, compiled = cost.analytic, cost.compiled
    rows = [
        ("model operations", format_flops(a.model_flops), TRACED),
        ("with what is computed again", format_flops(a.flops), TRACED),
    ]
    for kind, total in (compiled.collectives if compiled else {}).items():
        amount = f"{format_bytes(total.bytes)} in {total.count:,}"
        rows.append((kind, amount, _compiled(cost)))
    if cost.seconds is not None:
        rows.append(("estimated time", f"{cost.seconds:.4g} s",
                     "XLA's cycles of the computations; collectives taken as hidden"))  # fmt: skip
    if cost.mfu is not None:
        rows.append(("estimated MFU", f"{cost.mfu:.1%}", "model operations / time / peak"))
    if compiled:
        rows.append(("compiling took", f"{compiled.seconds:.1f} s",
                     f"host memory {format_bytes(host_peak_bytes())}"))  # fmt: skip
    return rows


def _stage_rows(cost: step_cost.StepCost, stage: Stage) -> list[tuple[str, str, str]]:
    rows = [("parameters in all", f"{cost.analytic.num_params:,}", "the whole model"),
            ("steps of the stage", f"{stage.total_steps:,}", "the recipe")]  # fmt: skip
    hours = chip_hours(cost, stage)
    if hours is not None:
        rows.append(("chip-hours of the stage", f"{hours:,.0f}", "steps x estimated time x chips"))
        if stage.price is not None:
            what = f"at {stage.price:g} a chip-hour"
            rows.append(("cost of the stage", f"{hours * stage.price:,.0f}", what))
    elif cost.effort == "fast":
        rows.append(("time and cost", "-", "only --effort=default tells them"))
    return rows


def search_row(flags: str, cost: step_cost.StepCost) -> dict[str, Any]:
    """A setting that fits, and what decides its rank."""
    return {
        "flags": flags,
        "flops_per_chip": cost.analytic.flops,
        "needed_bytes_per_chip": cost.needed_bytes,
        "collective_bytes_per_chip": sent_bytes(cost),
    }


def search_text(
    recipe: str, topology: topologies.Topology, rows: Sequence[Mapping[str, Any]]
) -> str:
    """The settings that fit, as a table in their order."""
    if not rows:
        return f"{recipe} on {topology.name}: nothing that was tried fits."
    lines = [f"{recipe} on {topology.name}: what fits, least computation first (per chip)"]
    for row in rows:
        lines.append(
            f"  {format_flops(row['flops_per_chip']):>12}  "
            f"{format_bytes(row['needed_bytes_per_chip']):>11}  "
            f"{format_bytes(row['collective_bytes_per_chip']):>11} sent  {row['flags']}"
        )
    return "\n".join(lines)
