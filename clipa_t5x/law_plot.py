"""The inverse scaling law of a sweep as pictures, and as one self-contained page."""

import math
from collections.abc import Callable, Sequence
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
_SERIES = [light for name, (light, _) in report_plots.COLORS.items() if name.startswith("series")]
_MARKERS = "os^Dvp"
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
        section("compute", "Accuracy against training FLOPs", compute_figure(law)),
        section("runs", "Runs", table(law_tables.run_cells(law), "runs")),
    ]
    subtitle = f"Inverse scaling: {law.sweep.evaluator} {law.sweep.metric} over tokens, by size"
    return report_page.document(title, report_page.escape(subtitle), parts)


def _axis_section(axis: inverse_scaling.AxisLaw, law: inverse_scaling.Law) -> str:
    key = axis.axis
    fits, trends = law_tables.fit_cells(axis), law_tables.trend_cells(axis)
    content = "".join(
        [
            f'<div class="plots">{"".join(axis_figures(axis, law))}</div>',
            report_page.table(law_tables.drop_cells(axis), key),
            report_page.table(fits, key, _FORM) if len(fits) > 1 else "",
            report_page.table(trends, key, _trend_note(axis)) if len(trends) > 1 else "",
        ]
    )
    return report_page.section(key, f"{key.capitalize()} tokens", content)


def _trend_note(axis: inverse_scaling.AxisLaw) -> str:
    where = "" if axis.reference is None else f" with {law_tables.share(axis.reference)} of the"
    return f"Drops{where} {axis.axis} tokens, and a straight line through them over log parameters."


def axis_figures(axis: inverse_scaling.AxisLaw, law: inverse_scaling.Law) -> list[str]:
    """Accuracy over tokens, drop over their share, and drop over parameters, as HTML figures."""
    name = f"{law.sweep.evaluator} {law.sweep.metric}"
    figures = [
        _figure(
            f"{axis.axis}-accuracy",
            f"{name} over {axis.axis} tokens",
            lambda axes: _draw_accuracies(axes, axis),
            axis.curves,
            "points and fitted curves",
        )
    ]
    if any(math.isfinite(curve.cells[0].drop) for curve in axis.curves):
        figures.append(
            _figure(
                f"{axis.axis}-drop",
                f"Drop against all {axis.axis} tokens",
                lambda axes: _draw_drops(axes, axis),
                axis.curves,
                "points above 0 have lost accuracy",
            )
        )
    if axis.chief is not None:
        figures.append(
            _figure(
                f"{axis.axis}-trend",
                f"Drop with {law_tables.share(axis.reference or 1)} of the {axis.axis} tokens",
                lambda axes: _draw_trend(axes, axis),
                (),
                "over parameters; the line is the fitted trend",
            )
        )
    return figures


def compute_figure(law: inverse_scaling.Law) -> str:
    """Accuracy over FLOPs of every completed run, as an HTML figure; '' where none tells them."""
    runs = [run for run in law.sweep.completed if run.training_flops > 0]
    if not runs:
        return ""
    sizes = list(dict.fromkeys(run.size for run in law.sweep.runs))
    keys = "".join(_key(index, size.name) for index, size in enumerate(sizes))
    ends = "; ".join(
        f"{report_plots.label(run.name, 60)} {law_tables.points(run.accuracy)} % at "
        f"{report_plots.format_flops(run.training_flops)}"
        for run in law.front
    )
    alt = f"Accuracy over training FLOPs; nothing cheaper is as good as: {ends}"
    svg = report_plots.draw_svg(
        lambda axes: _draw_compute(axes, runs, sizes, law.front), "compute", (8.0, 4.0), alt
    )
    caption = f"{keys} Line: the front, which no cheaper run equals."
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _figure(
    key: str,
    title: str,
    draw: Callable[[Any], None],
    curves: Sequence[inverse_scaling.Curve],
    note: str,
) -> str:
    keys = "".join(_key(index, curve.size.name) for index, curve in enumerate(curves))
    svg = report_plots.draw_svg(draw, key, _SIZE, f"{title}, {note}; the table tells the numbers")
    heading = f"<strong>{report_page.escape(title)}</strong> {report_page.escape(note)} {keys}"
    return f"<figure><figcaption>{heading}</figcaption>{svg}</figure>"


def _key(index: int, name: str) -> str:
    text = report_page.escape(name)
    color = _color(index)
    return (
        '<span class="end"><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path '
        f'd="M0 4H24" fill="none" style="stroke: {color}" stroke-width="3"/></svg>{text}</span> '
    )


def _color(index: int) -> str:
    return _SERIES[index % len(_SERIES)]


def _style(index: int) -> dict[str, Any]:
    color, marker = _color(index), _MARKERS[index % len(_MARKERS)]
    return {"color": color, "marker": marker, "ms": 4.5, "lw": 1, "capsize": 2}


def _draw_accuracies(axes: Any, axis: inverse_scaling.AxisLaw) -> None:
    for index, curve in enumerate(axis.curves):
        cells = [cell for cell in curve.cells if cell.tokens(axis.axis)]
        if not cells:
            continue
        tokens = [cell.tokens(axis.axis) for cell in cells]
        shown = [cell.accuracy for cell in cells]
        axes.errorbar(tokens, shown, [c.std for c in cells], linestyle="none", **_style(index))
        full = (cells[0].tokens(axis.axis) or 1) / cells[0].share
        lines = _fit_line(curve, lambda fit, share: 1 - fit.error(share))
        axes.plot([s * full for s, _ in lines], [y for _, y in lines], color=_color(index), lw=1.5)
    _log_ticks(axes, {cell.tokens(axis.axis) or 1 for curve in axis.curves for cell in curve.cells})
    axes.set_xlabel(f"{axis.axis} tokens", color=_QUIET)
    _finish(axes)


def _draw_drops(axes: Any, axis: inverse_scaling.AxisLaw) -> None:
    for index, curve in enumerate(axis.curves):
        cells = [cell for cell in curve.cells if math.isfinite(cell.drop)]
        if not cells:
            continue
        stds = [cell.drop_std for cell in cells]
        shares, drops = [cell.share for cell in cells], [cell.drop for cell in cells]
        axes.errorbar(shares, drops, stds, linestyle="none", **_style(index))
        lines = _fit_line(curve, lambda fit, share: fit.drop(share))
        axes.plot([s for s, _ in lines], [y for _, y in lines], color=_color(index), lw=1.5)
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


def _draw_trend(axes: Any, axis: inverse_scaling.AxisLaw) -> None:
    trend = axis.chief
    assert trend is not None and trend.line is not None
    order = [curve.size for curve in axis.curves]
    losses = [loss for loss in trend.losses if loss.size.params]
    for loss in losses:
        style = _style(order.index(loss.size))
        axes.errorbar([loss.size.params], [loss.value], [loss.std], linestyle="none", **style)
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
    sizes: Sequence[sweep_runs.Size],
    front: Sequence[sweep_runs.Run],
) -> None:
    axes.plot(
        [run.training_flops for run in front], [run.accuracy for run in front], color=_RULE, lw=2
    )
    for run in runs:
        index = sizes.index(run.size)
        style = {"color": _color(index), "marker": _MARKERS[index % len(_MARKERS)], "ms": 4.5}
        axes.plot([run.training_flops], [run.accuracy], linestyle="none", **style)
    axes.set_xscale("log")
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
