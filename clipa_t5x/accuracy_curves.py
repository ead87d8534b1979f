"""Accuracy against compute, between published points only: an estimate, and named one.

A curve is of one model on one data set: its published points without those that a cheaper one
equals or beats, joined by straight lines over the logarithm of training FLOPs. Below its first
point there is no estimate; past its last, the last point's stands, as nothing says what more
compute would bring.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from clipa_t5x import published


class Trained(Protocol):
    """What has an accuracy for its compute."""

    @property
    def training_flops(self) -> float:
        """Of all that was trained."""
        ...

    @property
    def accuracy(self) -> float:
        """In any unit, the more the better."""
        ...


_Trained = TypeVar("_Trained", bound=Trained)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a curve gives at a budget.

    Attributes:
      accuracy: zero-shot top-1 in percent.
      flops: training FLOPs that it takes, at most the budget's.
      below: the published point at or below the budget.
      above: the next point, or None at or past the last.
      share: how far the budget lies from `below` to `above`, in [0, 1).
    """

    accuracy: float
    flops: float
    below: published.Point
    above: published.Point | None
    share: float

    def describe(self) -> str:
        """Where the figure comes from, in words."""
        if self.share == 0:
            return f"published: {self.below}"
        above = self.above
        assert above is not None
        return (
            f"{self.share:.0%} of the way from {self.below.accuracy:g} ({self.below}) to "
            f"{above.accuracy:g} ({above})"
        )


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points of one model and data set, both compute and accuracy strictly increasing."""

    model: str
    data: str
    points: tuple[published.Point, ...]

    def at(self, budget_flops: float) -> Estimate | None:
        """The estimate for that many training FLOPs; None below the first point."""
        affordable = [p for p in self.points if p.training_flops <= budget_flops]
        if not affordable:
            return None
        below = affordable[-1]
        if len(affordable) == len(self.points):
            return Estimate(below.accuracy, below.training_flops, below, None, 0.0)
        above = self.points[len(affordable)]
        share = math.log(budget_flops / below.training_flops) / math.log(
            above.training_flops / below.training_flops
        )
        accuracy = below.accuracy + share * (above.accuracy - below.accuracy)
        return Estimate(accuracy, budget_flops, below, above, share)


@functools.cache
def curves() -> tuple[Curve, ...]:
    """Every published curve, in the order of `published.MODELS` and of data sets."""
    groups: dict[tuple[str, str], list[published.Point]] = {}
    for point in published.POINTS:
        groups.setdefault((point.model, point.data), []).append(point)
    ordered = sorted(groups, key=lambda key: (published.MODELS.index(key[0]), key[1]))
    return tuple(Curve(model, data, undominated(groups[model, data])) for model, data in ordered)


def undominated(points: Sequence[_Trained]) -> tuple[_Trained, ...]:
    """The points that no cheaper or equally dear one equals or beats, cheapest first."""
    ordered = sorted(points, key=lambda p: (p.training_flops, -p.accuracy))
    best = itertools.accumulate((p.accuracy for p in ordered), max, initial=-math.inf)
    return tuple(p for p, before in zip(ordered, best, strict=False) if p.accuracy > before)


def rank(budget_flops: float) -> list[tuple[Curve, Estimate]]:
    """Curves with an estimate at the budget, most accurate first; the cheaper of equals first."""
    found = ((curve, curve.at(budget_flops)) for curve in curves())
    pairs = [(curve, estimate) for curve, estimate in found if estimate is not None]
    return sorted(pairs, key=lambda pair: (-pair[1].accuracy, pair[1].flops))


def next_better(budget_flops: float, accuracy: float) -> published.Point | None:
    """The cheapest published point beyond a budget that is better than `accuracy`, in percent."""
    better = [
        point
        for point in published.POINTS
        if point.training_flops > budget_flops and point.accuracy > accuracy
    ]
    return min(better, key=lambda point: point.training_flops, default=None)


def cheapest() -> published.Point:
    """The published point of least training FLOPs."""
    return min(published.POINTS, key=lambda point: point.training_flops)
