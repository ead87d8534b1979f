"""The inverse scaling law of a sweep as pictures, and as one self-contained page."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipa_t5x import (
    inverse_scaling,
    law_tables,
    report_page,
    report_plots,
    run_summary,
    sweep_runs,
)

_QUIET, _RULE, _INK = (report_plots.COLORS[name][0] for name in ("quiet", "rule", "ink"))
# One more than colours, so that both together tell many sizes apart.
_MARKERS = "os^DvpX"
_SIZE = (5.6, 3.4)

_CURVE_POINTS = 60

_FORM = (
    "Curves: error(s) = full + b (s^-c - 1), s being the share of the tokens: a power law with a "
    "constant (Hestness et al. 2017; Henighan et al. 2020), over tokens. CLIPA's papers fit none. "
    "Bars are one standard deviation."
)


def render(law: inverse_scaling.Law, title: str) -> str:
    """Returns the whole HTML document; equal laws give equal documents.

    Raises:
        errors.UserError: matplotlib is missing.
    """
    section, table = report_page.section, report_page.table
    sentences = [*(law_tables.verdict(axis) for axis in law.axes), law_tables.seeds(law)]
    parts = [
        *(f"<p>{report_page.escape(sentence)}</p>" for sentence in sentences),
        *(
            f'<p class="note">{report_page.escape(remark)}</p>'
            for remark in law_tables.remarks(law)
        ),
        *(_axis_section(axis, law) for axis in law.axes),
        section(
            "compute",
            "Accuracy against training FLOPs",
            "".join(map(_figure, compute_pictures(law))),
        ),
        section("runs", "Runs", table(law_tables.run_cells(law), "runs")),
    ]
    subtitle = f"Inverse scaling: {law.sweep.evaluator} {law.sweep.metric} over tokens, by size"
    return report_page.document(title, report_page.escape(subtitle), parts)


def _axis_section(axis: inverse_scaling.AxisLaw, law: inverse_scaling.Law) -> str:
    key = axis.axis
    fits, trends = law_tables.fit_cells(axis), law_tables.trend_cells(axis)
    content = "".join(
        [
            f'<div class="plots">{"".join(map(_figure, axis_pictures(axis, law)))}</div>',
            _titled("Accuracy and drop", law_tables.drop_cells(axis), key),
            _titled("Curves", fits, key, _FORM),
            _titled("Drop over size", trends, key, _trend_note(axis)),
        ]
    )
    return report_page.section(key, f"{key.capitalize()} tokens", content)


def _titled(heading: str, cells: Sequence[Sequence[str]], label: str, note: str = "") -> str:
    """A table under a heading; '' where it would have no rows."""
    table = report_page.table(cells, label, note)
    return f"<h3>{heading}</h3>{table}" if len(cells) > 1 else ""


def _trend_note(axis: inverse_scaling.AxisLaw) -> str:
    where = "" if axis.reference is None else f" with {law_tables.share(axis.reference)} of the"
    return f"Drops{where} {axis.axis} tokens, and a straight line through them over log parameters."


@dataclasses.dataclass(frozen=True)
class Picture:
    """One drawing.

    Attributes:
        key: names it, and its file.
        title: over it.
        note: what its lines and points are.
        draw: draws into a matplotlib `Axes`.
        sizes: whose colours it has, with theirs.
        alt: what it shows, in words.
        inches: width and height.
    """

    key: str
    title: str
    note: str
    draw: Callable[[Any], None]
    sizes: Mapping[sweep_runs.Size, int]
    alt: str
    inches: tuple[float, float] = _SIZE


def _numbered(law: inverse_scaling.Law) -> dict[sweep_runs.Size, int]:
    """Every size to the number of its colour, which is the same in all pictures."""
    return {size: i for i, size in enumerate(dict.fromkeys(run.size for run in law.sweep.runs))}


def axis_pictures(axis: inverse_scaling.AxisLaw, law: inverse_scaling.Law) -> list[Picture]:
    """Accuracy over tokens, drop over their share, and drop over parameters."""
    numbers = _numbered(law)
    sizes = {curve.size: numbers[curve.size] for curve in axis.curves}
    drawn = [("accuracy", f"{law.sweep.evaluator} {law.sweep.metric} over {axis.axis} tokens",
              "points and fitted curves", _draw_accuracies)]  # fmt: skip
    if any(math.isfinite(curve.cells[0].drop) for curve in axis.curves):
        title = f"Drop against all {axis.axis} tokens"
        drawn.append(("drop", title, "points above 0 have lost accuracy", _draw_drops))
    if axis.chief is not None:
        title = f"Drop with {law_tables.share(axis.reference or 1)} of the {axis.axis} tokens"
        note = f"{axis.chief.kind} drops over parameters, and the line through them"
        drawn.append(("trend", title, note, _draw_trend))
    return [
        Picture(
            f"{axis.axis}-{key}", title, note, functools.partial(draw, axis=axis, numbers=numbers),
            sizes, f"{title}, {note}; the table tells the numbers",
        )
        for key, title, note, draw in drawn
    ]  # fmt: skip


def compute_pictures(law: inverse_scaling.Law) -> list[Picture]:
    """Accuracy over FLOPs of every completed run; none where no run tells them."""
    runs, numbers = [run for run in law.sweep.completed if run.training_flops > 0], _numbered(law)
    if not runs:
        return []
    ends = "; ".join(
        f"{report_plots.label(run.name, 60)} {law_tables.points(run.accuracy)} % at "
        f"{report_plots.format_flops(run.training_flops)}"
        for run in law.front
    )
    title = f"{law.sweep.evaluator} {law.sweep.metric} over training FLOPs"
    draw = functools.partial(_draw_compute, runs=runs, front=law.front, numbers=numbers)
    alt = f"{title}; nothing cheaper is as good as: {ends}"
    note = "the line joins runs that no cheaper one equals"
    sizes = {run.size: numbers[run.size] for run in runs}
    return [Picture("compute", title, note, draw, sizes, alt, (8.0, 4.0))]


def _figure(picture: Picture) -> str:
    """As the page has it, in HTML."""
    keys = "".join(_key(number, size.name) for size, number in picture.sizes.items())
    svg = report_plots.draw_svg(picture.draw, picture.key, picture.inches, picture.alt)
    title, note = report_page.escape(picture.title), report_page.escape(picture.note)
    caption = f"<strong>{title}</strong> {note} {keys}"
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def files(law: inverse_scaling.Law) -> dict[str, str]:
    """Every picture as an SVG file of its own, by its key; equal laws give equal files.

    Raises:
        errors.UserError: matplotlib is missing.
    """
    pictures = [picture for axis in law.axes for picture in axis_pictures(axis, law)]
    return {picture.key: _file(picture) for picture in [*pictures, *compute_pictures(law)]}


def _file(picture: Picture) -> str:
    from matplotlib import lines

    def draw(axes: Any) -> None:
        picture.draw(axes)
        axes.set_title(report_plots.label(picture.title, 80), color=_INK, fontsize=9)
        handles = [
            lines.Line2D([], [], label=size.name, **_marker(number))
            for size, number in picture.sizes.items()
        ]
        axes.legend(handles=handles, fontsize=8, frameon=False)

    svg = report_plots.draw_svg(draw, picture.key, picture.inches, picture.alt)
    # Where it stands alone it is drawn on what it finds, so that it brings its paper along.
    head, _, rest = svg.partition(">")
    paper = '<rect width="100%" height="100%" style="fill: #ffffff"/>'
    return f'{head} xmlns="http://www.w3.org/2000/svg">{paper}{rest}\n'


def _key(number: int, name: str) -> str:
    key = report_plots.curve_key(_color(number))
    return f'<span class="end">{key}{report_page.escape(name)}</span> '


def _color(index: int) -> str:
    return report_plots.SERIES[index % len(report_plots.SERIES)]


def _marker(number: int) -> dict[str, Any]:
    marker = _MARKERS[number % len(_MARKERS)]
    return {"color": _color(number), "marker": marker, "ms": 4.5, "linestyle": "none"}


def _bars(number: int) -> dict[str, Any]:
    return {**_marker(number), "elinewidth": 1, "capsize": 2}


_Numbers = Mapping[sweep_runs.Size, int]


def _draw_accuracies(axes: Any, axis: inverse_scaling.AxisLaw, numbers: _Numbers) -> None:
    for curve in axis.curves:
        cells = [cell for cell in curve.cells if cell.tokens(axis.axis)]
        if not cells:
            continue
        tokens = [cell.tokens(axis.axis) for cell in cells]
        shown = [cell.accuracy for cell in cells]
        number = numbers[curve.size]
        axes.errorbar(tokens, shown, [c.std for c in cells], **_bars(number))
        full = (cells[0].tokens(axis.axis) or 1) / cells[0].share
        lines = _fit_line(curve, lambda fit, share: 1 - fit.error(share))
        xs, ys = [s * full for s, _ in lines], [y for _, y in lines]
        axes.plot(xs, ys, color=_color(number), lw=1.5)
    _log_ticks(axes, {cell.tokens(axis.axis) or 1 for curve in axis.curves for cell in curve.cells})
    axes.set_xlabel(f"{axis.axis} tokens", color=_QUIET)
    _finish(axes)


def _draw_drops(axes: Any, axis: inverse_scaling.AxisLaw, numbers: _Numbers) -> None:
    for curve in axis.curves:
        cells = [cell for cell in curve.cells if math.isfinite(cell.drop)]
        if not cells:
            continue
        stds = [cell.drop_std for cell in cells]
        shares, drops = [cell.share for cell in cells], [cell.drop for cell in cells]
        number = numbers[curve.size]
        axes.errorbar(shares, drops, stds, **_bars(number))
        lines = _fit_line(curve, lambda fit, share: fit.drop(share))
        axes.plot([s for s, _ in lines], [y for _, y in lines], color=_color(number), lw=1.5)
    _log_ticks(axes, {cell.share for curve in axis.curves for cell in curve.cells}, percent=True)
    axes.set_xlabel(f"share of the {axis.axis} tokens", color=_QUIET)
    axes.axhline(0, color=_RULE, lw=1)
    _finish(axes)


def _fit_line(
    curve: inverse_scaling.Curve, value: Callable[[Any, float], float]
) -> list[tuple[float, float]]:
    """(share, value) along the fitted curve, as far as there are points; none without a fit."""
    if curve.fit is None:
        return []
    low, high = math.log(curve.cells[-1].share), math.log(curve.cells[0].share)
    steps = (low + (high - low) * i / _CURVE_POINTS for i in range(_CURVE_POINTS + 1))
    return [(share, value(curve.fit, share)) for share in map(math.exp, steps)]


def _draw_trend(axes: Any, axis: inverse_scaling.AxisLaw, numbers: _Numbers) -> None:
    trend = axis.chief
    assert trend is not None and trend.line is not None
    losses = [loss for loss in trend.losses if loss.size.params]
    for loss in losses:
        style = _bars(numbers[loss.size])
        axes.errorbar([loss.size.params], [loss.value], [loss.std], **style)
    sizes = [float(loss.size.params or 1) for loss in losses]
    ends = [min(sizes), max(sizes)]
    axes.plot(ends, [trend.line.at(size) for size in ends], color=_INK, lw=1, linestyle="--")
    axes.axhline(0, color=_RULE, lw=1)
    _log_ticks(axes, sizes)
    axes.set_xlabel("parameters", color=_QUIET)
    _finish(axes)


def _draw_compute(
    axes: Any,
    runs: Sequence[sweep_runs.Run],
    front: Sequence[sweep_runs.Run],
    numbers: _Numbers,
) -> None:
    from matplotlib import ticker

    axes.plot(
        [run.training_flops for run in front], [run.accuracy for run in front], color=_RULE, lw=2
    )
    for run in runs:
        axes.plot([run.training_flops], [run.accuracy], **_marker(numbers[run.size]))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: report_plots.format_flops(value))
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("training FLOPs", color=_QUIET)
    _finish(axes)


def _log_ticks(axes: Any, values: Any, percent: bool = False) -> None:
    """A logarithmic axis that is marked at the values, but where marks would overlap."""
    from matplotlib import ticker

    ordered = sorted(values)
    spread = math.log(ordered[-1] / ordered[0]) or 1.0
    kept = ordered[:1]
    for value in ordered[1:]:
        if math.log(value / kept[-1]) > spread / 12:
            kept.append(value)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.FixedLocator(kept))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    show = law_tables.share if percent else run_summary.format_compact
    axes.xaxis.set_major_formatter(lambda value, _: show(value))


def _finish(axes: Any) -> None:
    from matplotlib import ticker

    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
    axes.grid(axis="y", color=_RULE, linewidth=0.5)
    axes.tick_params(which="both", length=0, labelcolor=_QUIET)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(_RULE)
    axes.set_axisbelow(True)
