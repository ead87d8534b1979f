"""A step's cost as text for people and as JSON for programs. Each figure says where it is from."""

import dataclasses
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from clipa_t5x import step_cost, topologies
from clipa_t5x.model_info import format_bytes

SHAPES, TRACED = "analytic, shardings", "analytic, traced step"
ACTIVATIONS = "activations"
ALL_BUT_STATE = "activations, gradients, gathered parameters"  # XLA does not tell them apart.


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
    """Bytes of one device by what takes them; where the step is compiled, at its peak."""
    a, compiled = cost.analytic, cost.compiled
    parts = {
        "parameters": a.param_bytes,
        "optimizer state": a.optimizer_bytes,
        "batch": a.batch_bytes,
    }
    if compiled is None:
        parts |= {"gradients": a.param_bytes, ACTIVATIONS: a.activation_bytes}
    elif compiled.peak_bytes is not None or compiled.temp_bytes is not None:
        parts[ALL_BUT_STATE] = max(0, cost.needed_bytes - cost.state_bytes)
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
        "devices": cost.topology.num_devices,
        "mesh": dict(cost.mesh),
        "effort": cost.effort,
        "analytic_per_device": dataclasses.asdict(cost.analytic),
        "compiled_per_device": dataclasses.asdict(compiled) if compiled else None,
        "memory_parts_bytes_per_device": memory_parts(cost),
        "hbm_bytes_per_device": cost.topology.kind.hbm_bytes,
        "needed_bytes_per_device": cost.needed_bytes,
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
    head = f"{stage.name} on {where}, mesh {mesh}: a step, {_unit(cost.topology)}"
    return "\n".join([head, *lines])


def _unit(topology: topologies.Topology) -> str:
    devices = topology.kind.devices_per_chip
    return "per chip" if devices == 1 else f"per device, {devices} to a chip"


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
        source = {ALL_BUT_STATE: _compiled(cost), ACTIVATIONS: TRACED}.get(name, SHAPES)
        rows.append((name, format_bytes(count), source))
    limit = cost.topology.kind.hbm_bytes
    of_all = "" if limit is None else f" of {format_bytes(limit)}, {cost.needed_bytes / limit:.0%}"
    if cost.compiled is None:
        rows.append(("peak memory, about", format_bytes(cost.needed_bytes) + of_all,
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
    if compiled and compiled.bytes_accessed is not None:
        where = "HBM" if cost.topology.kind.torus_dims else "memory"
        moved = format_bytes(compiled.bytes_accessed)
        rows.append((f"bytes to and from {where}", moved, _compiled(cost)))
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
    elif cost.fits is not False:
        rows.append(("time and cost", "not known", _why_no_time(cost)))
    return rows


def _why_no_time(cost: step_cost.StepCost) -> str:
    if cost.topology.kind.clock is None:
        return f"nothing tells the clock of a {cost.topology.kind.name}"
    return "only --effort=default tells them"


def schedule_json(
    name: str, measured: Sequence[tuple[step_cost.StepCost, Stage]]
) -> dict[str, Any]:
    """All figures of all stages, and what they come to; None where one stage's is not known."""
    records = [as_json(cost, stage) for cost, stage in measured]
    return {"recipe": name, "stages": records, "total": _total(records)}


def _total(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    stages = [record["stage"] for record in records]

    def add(key: str) -> float | None:
        values = [stage[key] for stage in stages]
        return None if None in values else sum(values)

    return {
        "chip_hours": add("chip_hours"),
        "price_per_chip_hour": stages[0]["price_per_chip_hour"],
        "cost": add("cost"),
    }


def schedule_text(name: str, measured: Sequence[tuple[step_cost.StepCost, Stage]]) -> str:
    """Time, chip-hours and cost of every stage and of all."""
    records = [as_json(cost, stage) for cost, stage in measured]
    total = _total(records)
    rows = [("stage", "steps", "s a step", "MFU", "chip-hours", "cost")]
    for record in records:
        stage = record["stage"]
        seconds, mfu = record["estimated_step_seconds"], record["estimated_mfu"]
        hours, price = stage["chip_hours"], stage["cost"]
        rows.append(
            (record["recipe"], f"{stage['steps']:,}", _or_dash(seconds, ".4g"),
             _or_dash(mfu, ".1%"), _or_dash(hours, ",.0f"), _or_dash(price, ",.0f"))
        )  # fmt: skip
    hours, price = (_or_dash(total[key], ",.0f") for key in ("chip_hours", "cost"))
    rows.append(("all", "", "", "", hours, price))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        f"  {row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    cost = measured[0][0]
    price = measured[0][1].price
    at = "no price (--price)" if price is None else f"at {price:g} a chip-hour"
    note = "" if total["chip_hours"] is not None else f"; time not known: {_why_no_time(cost)}"
    return "\n".join([f"{name} on {cost.topology.name}, {at}{note}", *lines])


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def search_row(flags: str, cost: step_cost.StepCost) -> dict[str, Any]:
    """A setting that fits, and what decides its rank."""
    return {
        "flags": flags,
        "flops_per_device": cost.analytic.flops,
        "needed_bytes_per_device": cost.needed_bytes,
        "collective_bytes_per_device": sent_bytes(cost),
    }


def search_text(
    recipe: str, topology: topologies.Topology, rows: Sequence[Mapping[str, Any]]
) -> str:
    """The settings that fit, as a table in their order."""
    if not rows:
        return f"{recipe} on {topology.name}: nothing that was tried fits."
    lines = [f"{recipe} on {topology.name}: what fits, least computation first ({_unit(topology)})"]
    for row in rows:
        lines.append(
            f"  {format_flops(row['flops_per_device']):>12}  "
            f"{format_bytes(row['needed_bytes_per_device']):>11}  "
            f"{format_bytes(row['collective_bytes_per_device']):>11} sent  {row['flags']}"
        )
    return "\n".join(lines)
