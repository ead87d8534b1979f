import dataclasses
import itertools
import math

import pytest

from clipa_t5x import accuracy_curves, published


@pytest.mark.parametrize("curve", accuracy_curves.curves(), ids=lambda c: f"{c.model} {c.data}")
def test_a_curve_goes_through_its_points_and_rises(curve):
    for point in curve.points:
        estimate = curve.at(point.training_flops)
        assert estimate.accuracy == pytest.approx(point.accuracy)
        assert estimate.below == point
        assert estimate.describe() == f"published: {point}"
    for one, two in itertools.pairwise(curve.points):
        assert one.training_flops < two.training_flops and one.accuracy < two.accuracy
        between = curve.at(math.sqrt(one.training_flops * two.training_flops))
        # Halfway in log compute is halfway in accuracy.
        assert between.accuracy == pytest.approx((one.accuracy + two.accuracy) / 2)
        assert between.describe().startswith("50% of the way from ")


@pytest.mark.parametrize("curve", accuracy_curves.curves(), ids=lambda c: f"{c.model} {c.data}")
def test_nothing_is_extrapolated(curve):
    first, last = curve.points[0], curve.points[-1]
    assert curve.at(first.training_flops * 0.999) is None
    far = curve.at(last.training_flops * 100.0)
    assert (far.accuracy, far.flops) == (last.accuracy, last.training_flops)
    assert far.above is None


def test_every_published_point_is_on_a_curve_or_dominated():
    for curve in accuracy_curves.curves():
        for point in published.POINTS:
            if (point.model, point.data) == (curve.model, curve.data):
                assert curve.at(point.training_flops) is None or (
                    curve.at(point.training_flops).accuracy >= point.accuracy
                )


def test_dominated_points_are_left_out():
    point = published.POINTS[0]
    better = dataclasses.replace(point, accuracy=point.accuracy + 1)
    cheap = dataclasses.replace(point, stages=point.stages[:1], accuracy=point.accuracy - 30)
    small = published.Stage(1000, 84, 8)
    cheaper = dataclasses.replace(point, stages=(small,), accuracy=point.accuracy)
    assert accuracy_curves.undominated([point, better]) == (better,)
    assert accuracy_curves.undominated([better, point, cheap, cheaper]) == (cheaper, better)
    assert accuracy_curves.undominated([]) == ()


def test_ranking_is_by_accuracy_within_the_budget():
    budget = 2e21
    ranked = accuracy_curves.rank(budget)
    accuracies = [estimate.accuracy for _, estimate in ranked]
    assert accuracies == sorted(accuracies, reverse=True)
    assert all(estimate.flops <= budget for _, estimate in ranked)
    # H/14's recipe of 70 pixels is within the budget; bigG/14 is out of reach.
    assert (ranked[0][0].model, ranked[0][0].data) == ("H/14", "DataComp-1B")
    assert 81.1 < accuracies[0] < 81.5
    assert "bigG/14" not in {curve.model for curve, _ in ranked}
    better = accuracy_curves.next_better(budget, accuracies[0])
    assert (better.model, better.accuracy) == ("H/14", 81.5)
    assert accuracy_curves.next_better(1e23, 83.0) is None
    assert accuracy_curves.rank(accuracy_curves.cheapest().training_flops - 1) == []
