"""A sweep made by a law says that law, in whatever order, and nothing of runs that are not done."""

import csv
import dataclasses
import math
import pathlib
import random

import pytest
from synthetic_sweeps import SHARES, SIZES, run, runs, sweep

from clipa_t5x import inverse_scaling, law_tables, sweep_runs


def image_law(found):
    (axis,) = inverse_scaling.analyse(sweep(found)).axes
    return axis


def test_a_sweep_gives_back_its_law():
    axis = image_law(runs())
    assert axis.axis == inverse_scaling.IMAGE and axis.reference == pytest.approx(1 / 9)
    for curve, scale in zip(axis.curves, SIZES.values(), strict=True):
        assert curve.fit.full == pytest.approx(0.3, abs=1e-4)
        assert curve.fit.scale == pytest.approx(scale, rel=1e-2)
        assert curve.fit.exponent == pytest.approx(0.5, rel=1e-2)
        assert [cell.share for cell in curve.cells] == sorted(SHARES, reverse=True)
        last = curve.cells[-1]
        assert last.drop == pytest.approx(scale * 2) and last.relative == pytest.approx(
            last.drop / 0.7
        )
    assert axis.chief.kind == "fitted" and axis.chief.line.direction == -1


def test_order_changes_nothing():
    found = runs(seeds=(0, 1))
    law = inverse_scaling.analyse(sweep(found))
    random.Random(0).shuffle(found)
    again = inverse_scaling.analyse(sweep(found))
    assert law.axes == again.axes and law.front == again.front


def test_seeds_are_averaged_and_their_spread_counts():
    alone = image_law(runs())
    axis = image_law(runs(seeds=(0, 2)))
    cell, single = axis.curves[0].cells[0], alone.curves[0].cells[0]
    assert cell.accuracy == pytest.approx(single.accuracy + 1e-4) and len(cell.runs) == 2
    law = inverse_scaling.analyse(sweep(runs(seeds=(0, 2))))
    assert law.seed_std == pytest.approx(2e-4 / math.sqrt(2))
    assert cell.std == pytest.approx(math.hypot(single.std, law.seed_std / math.sqrt(2)), rel=1e-3)


def test_incomplete_runs_count_for_nothing():
    found = runs()
    spoilt = [dataclasses.replace(run(1_000_000, 0.5, 7, 0.01), missing="step 3 of 9")]
    assert image_law(found + spoilt) == image_law(found)
    # Without a full run of a size nothing is told of what it loses.
    no_full = [dataclasses.replace(r, missing="not begun") if r.image_area == 1 and
               r.size.params == 1_000_000 else r for r in found]  # fmt: skip
    axis = image_law(no_full)
    assert math.isnan(axis.curves[0].cells[0].drop)
    # Nor by a curve, which would have to guess.
    for trend in axis.trends:
        assert [loss.size.params for loss in trend.losses] == [4_000_000, 16_000_000]


def test_few_points_have_no_curve_and_say_so():
    axis = image_law([r for r in runs() if r.image_area > 0.2])
    assert all(curve.fit is None and "3 token counts" in curve.problem for curve in axis.curves)
    assert axis.chief.kind == "measured"


def test_text_is_an_axis_of_its_own():
    text = [run(p, 1.0, 0, 0.6, text_tokens=8.0, name=f"{p} text") for p in SIZES]
    law = inverse_scaling.analyse(sweep(runs() + text))
    assert [axis.axis for axis in law.axes] == ["image", "text"]
    assert [cell.share for cell in law.axes[1].curves[0].cells] == [1.0, 0.5]


def test_the_front_is_of_what_nothing_cheaper_equals():
    law = inverse_scaling.analyse(sweep(runs()))
    front = [(r.training_flops, r.accuracy) for r in law.front]
    assert front == sorted(front) and len({a for _, a in front}) == len(front)


def test_published_points_show_the_law():
    """CLIPA's figure of accuracy against compute: larger models lose less by fewer tokens."""
    law = inverse_scaling.analyse(sweep_runs.from_published())
    trends = [axis.chief for axis in law.axes if axis.chief]
    assert [trend.line.direction for trend in trends] == [-1]
    (measured,) = [t for t in law.axes[0].trends if t.kind == "measured" and not t.relative]
    assert [loss.value for loss in measured.losses] == sorted(
        (loss.value for loss in measured.losses), reverse=True
    )
    drops = {loss.size.name: round(loss.value * 100, 1) for loss in measured.losses}
    assert drops == {"S/16": 6.1, "B/16": 4.2, "L/16": 3.0}


def committed_runs():
    """The sweep of benchmarks/law, from its table."""
    with (pathlib.Path(__file__).parents[1] / "benchmarks/law/sweep.csv").open() as lines:
        for row in csv.DictReader(lines):
            params = int(row["params"])
            yield run(
                params, float(row["image_area"]), int(row["seed"]), float(row["value"]),
                name=row["run"], size=sweep_runs.Size(row["model"], (params,), params),
                image_tokens=int(row["image_tokens"]), text_tokens=float(row["text_tokens"]),
                training_flops=float(row["training_flops"]), examples=int(row["examples"]),
                missing=row["missing"],
            )  # fmt: skip


def test_the_committed_sweep_says_what_its_page_does():
    law = inverse_scaling.analyse(sweep(committed_runs()))
    text = (pathlib.Path(__file__).parents[1] / "benchmarks/law/README.md").read_text()
    assert len(law.sweep.completed) == 36 and law.seed_std == pytest.approx(0.022, abs=5e-4)
    shown = 0
    for axis in law.axes:
        assert axis.chief.line.direction == 0
        for trend in axis.trends:
            if not trend.relative:
                losses = [law_tables.points(loss.value, loss.std) for loss in trend.losses]
                slope = law_tables.points(trend.line.slope, trend.line.std, sign=True)
                assert f"| {' | '.join([*losses, slope])} |" in text
                shown += 1
    assert shown == 3
