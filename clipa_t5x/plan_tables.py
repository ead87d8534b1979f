"""A plan's figures: what a recipe takes, stage by stage, as plain values and as text tables."""

import dataclasses
import unicodedata
from collections.abc import Sequence
from typing import Any

from clipa_t5x import accuracy_curves, costs, flops, models, published
from clipa_t5x.errors import UserError
from clipa_t5x.run_summary import MISSING, format_count

# Listed costs are rounded a little; more than this share off is another figure.
COST_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What a stage trains.

    Attributes:
      name: of its gin file, without the ending.
      model: as gin built it.
      pixels: side of the square image.
      text_length: tokens of a text.
      samples: of all its steps.
    """

    name: str
    model: models.ClipModel
    pixels: int
    text_length: int
    samples: int

    @property
    def forward(self) -> flops.ForwardFlops:
        """FLOPs of one sample's forward pass in training."""
        return flops.forward_flops(self.model, self.pixels, self.text_length)

    @property
    def training_flops(self) -> int:
        """FLOPs of the whole stage."""
        return self.forward.training * self.samples


def training_flops(stages: Sequence[StagePlan]) -> int:
    """FLOPs of all stages."""
    return sum(stage.training_flops for stage in stages)


def recipe_record(stages: Sequence[StagePlan], rate: costs.Rate) -> dict[str, Any]:
    """A recipe as plain values: `stages`, `total`, `expected_top1`."""
    rows = []
    for stage in stages:
        forward = stage.forward
        rows.append(
            {
                "stage": stage.name,
                "pixels": stage.pixels,
                "image_tokens": forward.image_tokens,
                "text_tokens": forward.text_tokens,
                "samples": stage.samples,
                "image_forward_flops": forward.image,
                "text_forward_flops": forward.text,
                "training_flops_per_sample": forward.training,
                **_taken(stage.training_flops, rate),
            }
        )
    total = {
        "samples": sum(stage.samples for stage in stages),
        **_taken(training_flops(stages), rate),
    }
    return {"stages": rows, "total": total, "expected_top1": _expected_records(stages)}


def _expected_records(stages: Sequence[StagePlan]) -> list[dict[str, Any]]:
    """Estimates at the recipe's compute from the published curves of its model, if it has any."""
    name = published.name_of(stages[-1].model)
    compute = training_flops(stages)
    records = []
    for curve, estimate in accuracy_curves.rank(compute):
        if curve.model == name:
            record = estimate_record(curve, estimate)
            if compute > 1.01 * estimate.flops:
                record["by"] += ", which took less: not extrapolated"
            records.append(record)
    return records


def estimate_record(
    curve: accuracy_curves.Curve, estimate: accuracy_curves.Estimate
) -> dict[str, Any]:
    """An estimate as plain values; accuracy in percent."""
    return {
        "model": curve.model,
        "data": curve.data,
        "top1": estimate.accuracy,
        "training_flops": estimate.flops,
        "by": estimate.describe(),
    }


def recipe_table(record: dict[str, Any]) -> str:
    """The text of `recipe_record`: a row for each stage, and their total."""
    heading = [
        *("stage", "pixels", "image tokens", "text tokens", "samples", "image GFLOP"),
        *("text GFLOP", "training GFLOP", "total FLOP", "chip-hours", "cost"),
    ]
    cells = [
        [
            row["stage"],
            *(format_count(row[k]) for k in ("pixels", "image_tokens", "text_tokens", "samples")),
            *(_giga(row[k]) for k in ("image_forward_flops", "text_forward_flops")),
            _giga(row["training_flops_per_sample"]),
            *_taken_cells(row),
        ]
        for row in record["stages"]
    ]
    total = record["total"]
    total_cells = ["total", *[""] * 3, format_count(total["samples"]), *[""] * 3]
    lines = [layout([heading, *cells, [*total_cells, *_taken_cells(total)]])]
    expected = record["expected_top1"]
    if expected:
        lines.append(
            "Expected zero-shot ImageNet-1k top-1, an estimate from published runs of "
            f"{expected[0]['model']} at this compute:"
        )
    lines += [f"  {row['top1']:.1f} % on {row['data']}: {row['by']}" for row in expected]
    return "\n".join(lines)


def published_records(rate: costs.Rate) -> list[dict[str, Any]]:
    """The published rows that list hours, beside what their sizes and tokens come to."""
    a100 = costs.CHIPS["A100-80G"]
    rows = []
    for point in published.POINTS:
        if point.hours is None or point.dollars is None:
            continue
        dollars = point.hours * published.A100_80G_PRICE
        rows.append(
            {
                "model": point.model,
                "data": point.data,
                "recipe": point.recipe,
                "top1": point.accuracy,
                "listed_hours": point.hours,
                "listed_dollars": point.dollars,
                "hours_times_price": dollars,
                "is_consistent": abs(point.dollars / dollars - 1) <= COST_TOLERANCE,
                "implied_mfu": costs.Rate(a100, 1.0).hours(point.training_flops) / point.hours,
                **_taken(point.training_flops, rate),
            }
        )
    return rows


def published_table(rows: Sequence[dict[str, Any]]) -> str:
    """The text of `published_records`; costs that do not follow from the hours are flagged."""
    heading = [
        *("model", "data", "recipe", "top-1", "listed hours", "implied MFU", "listed cost"),
        *("hours x price", "", "total FLOP", "chip-hours", "cost"),
    ]
    cells = [
        [
            *(row[k] for k in ("model", "data", "recipe")),
            f"{row['top1']:.1f} %",
            f"{row['listed_hours']:,}",
            f"{row['implied_mfu']:.1%}",
            f"${row['listed_dollars']:,}",
            f"${row['hours_times_price']:,.0f}",
            "" if row["is_consistent"] else "(!)",
            *_taken_cells(row),
        ]
        for row in rows
    ]
    lines = [layout([heading, *cells], left=3)]
    for row in rows:
        if not row["is_consistent"]:
            lines.append(
                f"(!) {row['model']} {row['recipe']}: {row['listed_hours']:,} h x "
                f"${published.A100_80G_PRICE} = ${row['hours_times_price']:,.0f}, but "
                f"${row['listed_dollars']:,} is listed."
            )
    return "\n".join(lines)


def budget_record(budget_flops: float, rate: costs.Rate) -> dict[str, Any]:
    """What a budget buys, as plain values.

    Returns:
      `ranking`: an estimate for each published model and data set that the budget reaches, best
      first; `next`: the cheapest published point beyond it that is better than all, or None.

    Raises:
      UserError: the budget is below every published recipe.
    """
    ranked = accuracy_curves.rank(budget_flops)
    if not ranked:
        point = accuracy_curves.cheapest()
        raise UserError(
            f"the budget buys {rate.hours(budget_flops):,.3g} hours of {rate.chip.name}, less than "
            f"every published recipe: the cheapest, {_needs(_point_record(point, rate))}."
        )
    better = accuracy_curves.next_better(budget_flops, ranked[0][1].accuracy)
    return {
        "ranking": [
            {**estimate_record(curve, estimate), **_taken(estimate.flops, rate)}
            for curve, estimate in ranked
        ],
        "next": None if better is None else _point_record(better, rate),
    }


def _point_record(point: published.Point, rate: costs.Rate) -> dict[str, Any]:
    return {
        "model": point.model,
        "data": point.data,
        "recipe": str(point),
        "top1": point.accuracy,
        **_taken(point.training_flops, rate),
    }


def _needs(record: dict[str, Any]) -> str:
    """What a published point takes, in words."""
    _, hours, cost = _taken_cells(record)
    return (
        f"{record['model']} on {record['data']} ({record['recipe']}, {record['top1']:g} %), takes "
        f"{hours} hours" + ("" if record["dollars"] is None else f", {cost}")
    )


def budget_table(record: dict[str, Any]) -> str:
    """The text of `budget_record`."""
    heading = ["model", "data", "estimate", "total FLOP", "chip-hours", "cost", "from"]
    cells = [
        [row["model"], row["data"], f"{row['top1']:.1f} %", *_taken_cells(row), row["by"]]
        for row in record["ranking"]
    ]
    lines = [
        layout([heading, *cells], left=2, last_left=True),
        "Estimates of zero-shot ImageNet-1k top-1: straight lines over log compute between",
        "published points of one model and data set. Nothing is extrapolated: past a model's",
        "last point its published figure and cost stand.",
    ]
    if record["next"]:
        lines.append(f"The next better published one, {_needs(record['next'])}.")
    return "\n".join(lines)


def layout(cells: Sequence[Sequence[str]], left: int = 1, last_left: bool = False) -> str:
    """Lays rows of text out in columns under a ruled heading.

    Args:
      cells: rows of equally many cells, the first the heading.
      left: how many first columns are aligned to the left.
      last_left: whether the last column is, too.
    """
    # Names come from files: an escape sequence must not reach the terminal.
    rows = [["".join(map(_printable, cell)) for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lefts = {*range(left), *([len(widths) - 1] if last_left else [])}
    lines = [
        "  ".join(
            cell.ljust(width) if index in lefts else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _printable(letter: str) -> str:
    return " " if unicodedata.category(letter).startswith("C") else letter


def _taken(training_flops: float, rate: costs.Rate) -> dict[str, Any]:
    return {
        "training_flops": training_flops,
        "chip_hours": rate.hours(training_flops),
        "dollars": rate.dollars(training_flops),
    }


def _taken_cells(row: dict[str, Any]) -> list[str]:
    """Cells of a row with what `_taken` gives."""
    hours = row["chip_hours"]
    return [
        f"{row['training_flops']:.2e}".replace("e+", "e"),
        f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}",
        _dollars(row["dollars"]),
    ]


def _dollars(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"${value:,.0f}" if value >= 10 else f"${value:.2g}"


def _giga(value: float) -> str:
    giga = value / 1e9
    return f"{giga:,.1f}" if giga >= 1 else f"{giga:.2g}"
