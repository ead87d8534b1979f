import dataclasses
import json

import pytest

from clipa_t5x import cost_report, hlo_analysis, step_cost, topologies

GIB = topologies.GIB
ANALYTIC = step_cost.Analytic(
    num_params=1000,
    param_bytes=2 * GIB,
    optimizer_bytes=3 * GIB,
    batch_bytes=GIB,
    activation_bytes=5 * GIB,
    model_flops=100 * 10**12,
    flops=130 * 10**12,
)
COLLECTIVES = {"all-gather": hlo_analysis.Collective(7, 4 * GIB)}
COMPILED = step_cost.Compiled(12.0, 4 * GIB, 9 * GIB, 77 * GIB, COLLECTIVES, cycles=1_503 * 10**6)
STAGE = cost_report.Stage("recipe", total_steps=7200, price=2.0)


def _cost(compiled, name="v5e-4", effort="default"):
    topology = topologies.parse(name)
    return step_cost.StepCost(topology, {"data": 4}, effort, ANALYTIC, compiled)


def test_the_stage_costs_steps_times_time_times_chips():
    cost = _cost(COMPILED)
    assert cost.seconds == pytest.approx(1.0, rel=1e-4)
    assert cost.mfu == pytest.approx(100 / 197, rel=1e-4)
    hours = 7200 * 4 / 3600
    record = json.loads(json.dumps(cost_report.as_json(cost, STAGE)))
    assert record["stage"]["chip_hours"] == pytest.approx(hours, rel=1e-4)
    assert record["stage"]["cost"] == pytest.approx(2 * hours, rel=1e-4)
    assert record["compiled_per_device"]["collectives"]["all-gather"]["bytes"] == 4 * GIB
    text = cost_report.as_text(cost, STAGE)
    for part in (
        "9.00 GiB of 15.75 GiB, 57%", "4.00 GiB in 7", "100 TFLOP", "50.8%", "fits",
        "bytes to and from HBM", "77.00 GiB",
    ):  # fmt: skip
        assert part in text
    assert record["compiled_per_device"]["bytes_accessed"] == 77 * GIB


def test_the_parts_of_the_memory_add_up_to_the_peak():
    cost = _cost(COMPILED)
    parts = cost_report.memory_parts(cost)
    assert sum(parts.values()) == cost.needed_bytes == 9 * GIB
    assert parts["activations, gradients, gathered parameters"] == 3 * GIB
    record = cost_report.as_json(cost, STAGE)
    assert record["memory_parts_bytes_per_device"] == parts
    text = cost_report.as_text(cost, STAGE)
    assert all(name in text for name in parts)


def test_a_schedule_costs_what_its_stages_do():
    measured = [(_cost(COMPILED), dataclasses.replace(STAGE, name=n)) for n in ("one", "two")]
    record = json.loads(json.dumps(cost_report.schedule_json("both", measured)))
    assert [stage["recipe"] for stage in record["stages"]] == ["one", "two"]
    for key in ("chip_hours", "cost"):
        parts = [stage["stage"][key] for stage in record["stages"]]
        assert record["total"][key] == sum(parts) > 0
    text = cost_report.schedule_text("both", measured)
    assert text.startswith("both on v5e-4, at 2 a chip-hour\n") and "16" in text.splitlines()[-1]
    # One stage whose time is not known leaves no total.
    unknown = (_cost(dataclasses.replace(COMPILED, cycles=None), effort="fast"), STAGE)
    assert cost_report.schedule_json("x", [unknown, *measured])["total"]["chip_hours"] is None
    text = cost_report.schedule_text("x", [unknown, *measured])
    assert "time not known: only --effort=default" in text


def test_a_chip_of_two_devices():
    cost = _cost(COMPILED, "tpu7x-4")
    assert cost.topology.num_devices == 8 and cost.seconds is None and cost.mfu is None
    text = cost_report.as_text(cost, STAGE)
    assert "a step, per device, 2 to a chip" in text
    assert "nothing tells the clock of a tpu7x" in text


def test_fast_effort_tells_no_time():
    compiled = dataclasses.replace(COMPILED, cycles=None)
    cost = _cost(compiled, effort="fast")
    record = cost_report.as_json(cost, STAGE)
    assert record["estimated_step_seconds"] is None and record["stage"]["cost"] is None
    assert "only --effort=default" in cost_report.as_text(cost, STAGE)


def test_what_does_not_fit_is_said_so():
    cost = _cost(step_cost.Compiled(1.0, 20 * GIB, None, None, {}, None))
    assert cost.fits is False and cost.needed_bytes == 26 * GIB
    assert "26.00 GiB of 15.75 GiB, 165%" in cost_report.as_text(cost, STAGE)
    assert "DOES NOT FIT" in cost_report.as_text(cost, STAGE)
    parts = cost_report.memory_parts(cost)
    assert max(parts, key=lambda name: parts[name]) == cost_report.ALL_BUT_STATE


def test_what_is_not_compiled_is_named_analytic():
    cost = _cost(None, "gpu-h100-4", None)
    assert cost.fits is None and cost.seconds is None
    # Activations make room for gradients as these come.
    assert cost.needed_bytes == (2 + 3 + 1 + 5) * GIB
    assert cost_report.memory_parts(cost)["activations"] == 5 * GIB
    text = cost_report.as_text(cost, STAGE)
    assert "analytic: nothing is compiled for this kind" in text and "effort" not in text


def test_a_state_greater_than_the_memory_needs_no_compiler():
    big = step_cost.Analytic(1000, 60 * GIB, 60 * GIB, GIB, 0, 1, 1)
    cost = step_cost.StepCost(topologies.parse("gpu-h100-4"), {"data": 4}, None, big, None)
    assert cost.fits is False


def test_searches_list_what_fits():
    row = cost_report.search_row("--gin.X=1", _cost(COMPILED))
    text = cost_report.search_text("recipe", topologies.parse("v5e-4"), [row])
    assert "130 TFLOP" in text and "9.00 GiB" in text and "--gin.X=1" in text
    nothing = cost_report.search_text("recipe", topologies.parse("v5e-4"), [])
    assert nothing == "recipe on v5e-4: nothing that was tried fits."
