"""The inverse scaling law of a sweep as tables of text, as sentences, as CSV and as JSON values."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from clipa_t5x import inverse_scaling, report_plots, run_summary, scaling_fit, sweep_runs

MISSING = run_summary.MISSING


def points(value: float, std: float | None = None, sign: bool = False, digits: int = 1) -> str:
    """A share as percentage points, with its standard deviation: '76.3 ± 1.4'."""
    if not math.isfinite(value):
        return MISSING
    shown = round(value * 100, digits)
    # What rounds to nothing has no sign.
    text = f"{shown:{'+' if sign and shown else ''}.{digits}f}" if shown else f"{0:.{digits}f}"
    return text if std is None else f"{text} ± {std * 100:.{digits}f}"


def share(value: float) -> str:
    """A share of the tokens: '12.5%'."""
    return f"{value * 100:.3g}%"


def run_cells(law: inverse_scaling.Law) -> list[list[str]]:
    """A row for every run, completed or not; headings first."""
    metric = f"{law.sweep.evaluator} {law.sweep.metric}, %"
    rows = [["run", "model", "parameters", "image tokens", "text tokens", "seed"]]
    rows[0] += ["training FLOPs", metric, "state"]
    for run in law.sweep.runs:
        state = f"incomplete: {run.missing}" if run.missing else "completed"
        rows.append(
            [
                report_plots.label(run.name, 60),
                run.size.name,
                run_summary.format_count(run.size.params),
                run_summary.format_count(run.image_tokens),
                run_summary.format_count(run.text_tokens),
                MISSING if run.seed is None else str(run.seed),
                report_plots.format_flops(run.training_flops)
                if run.training_flops > 0
                else MISSING,
                points(run.accuracy),
                state + (", on the front" if run in law.front else ""),
            ]
        )
    return rows


def drop_cells(axis: inverse_scaling.AxisLaw) -> list[list[str]]:
    """The table of the law along an axis: a row for every size and token count; headings first."""
    rows = [["model", f"{axis.axis} tokens", "share", "runs", "accuracy, %", "drop, points"]]
    rows[0] += ["drop, % of full", "curve, %", "residual, points"]
    for curve in axis.curves:
        for index, cell in enumerate(curve.cells):
            fitted = residual = MISSING
            if curve.fit is not None:
                fitted = points(1 - curve.fit.error(cell.share))
                # In accuracy, not in error.
                residual = points(-curve.fit.residuals[index], sign=True, digits=2)
            is_full = cell.drop_std == 0
            rows.append(
                [
                    curve.size.name,
                    run_summary.format_count(cell.tokens(axis.axis)),
                    share(cell.share),
                    str(len(cell.runs)),
                    points(cell.accuracy, cell.std),
                    points(cell.drop, None if is_full else cell.drop_std),
                    points(cell.relative, None if is_full else cell.relative_std),
                    fitted,
                    residual,
                ]
            )
    return rows


def fit_cells(axis: inverse_scaling.AxisLaw) -> list[list[str]]:
    """Parameters of the fitted curves; headings alone where there are none."""
    rows = [["curve of", "error with all, %", "scale b, points", "exponent c", "chi2 / degrees"]]
    for curve in axis.curves:
        if (fit := curve.fit) is None:
            continue
        exponent = f"{fit.exponent:.2f} "
        exponent += f"± {fit.stds[2]:.2f}" if math.isfinite(fit.stds[2]) else "(not determined)"
        rows.append(
            [
                curve.size.name,
                points(fit.full, fit.stds[0]),
                f"{fit.scale * 100:.2g} ± {fit.stds[1] * 100:.2g}",
                exponent,
                f"{fit.chi2:.2f} / {fit.degrees}",
            ]
        )
    return rows


def trend_cells(axis: inverse_scaling.AxisLaw) -> list[list[str]]:
    """What every size loses at the reference share, and the change with each doubling."""
    sizes = [curve.size for curve in axis.curves]
    rows = [["drop", *(size.name for size in sizes), "for each doubling of parameters"]]
    for trend in axis.trends:
        losses = {loss.size: points(loss.value, loss.std) for loss in trend.losses}
        unit = "% of full" if trend.relative else "points"
        line = trend.line
        rows.append(
            [
                f"{trend.kind}, {unit}",
                *(losses.get(size, MISSING) for size in sizes),
                MISSING if line is None else points(line.slope, line.std, sign=True),
            ]
        )
    return rows


def verdict(axis: inverse_scaling.AxisLaw) -> str:
    """One sentence: whether these runs show that larger models lose less, and how surely."""
    head = f"{axis.axis.capitalize()} tokens"
    trend = axis.chief
    if trend is None or trend.line is None or axis.reference is None:
        return (
            f"{head}: these runs say nothing of the law, which takes two sizes of known "
            "parameters, each with a completed run with all tokens and one with fewer, as few for "
            "both, and a known sampling error."
        )
    line, told = trend.line, [loss for loss in trend.losses if loss.size.params]
    saying = {
        -1: "larger models lose less, as the inverse scaling law has it",
        0: "the data do not tell whether larger models lose less",
        1: "larger models lose more, against the inverse scaling law",
    }[line.direction]
    ratio = abs(line.slope) / line.std
    text = (
        f"{head}: {saying}. With {share(axis.reference)} of the tokens the {trend.kind} drop "
        f"changes by {points(line.slope, line.std, sign=True)} points for each doubling of the "
        "parameters "
        f"({ratio:.1f} standard deviations; {scaling_fit.SIGNIFICANT:g} are asked for), over "
        f"{len(told)} sizes from {run_summary.format_count(told[0].size.params)} to "
        f"{run_summary.format_count(told[-1].size.params)}."
    )
    if all(loss.value <= scaling_fit.SIGNIFICANT * loss.std for loss in told):
        text += " No size loses more there than its standard deviations explain."
    return text


def seeds(law: inverse_scaling.Law) -> str:
    """One sentence on what the standard deviations hold."""
    if law.seed_std is None:
        return (
            "Standard deviations are the evaluation's sampling error alone: no model has several "
            "seeds with the same tokens, so the spread of training is not known."
        )
    return (
        "Standard deviations are the evaluation's sampling error and the spread over seeds, "
        f"{points(law.seed_std)} points for one run."
    )


def remarks(law: inverse_scaling.Law) -> list[str]:
    """What else a reader should know: incomplete runs, sizes without a curve, what was noted."""
    problems: dict[str, list[str]] = {}
    for axis in law.axes:
        for curve in filter(lambda curve: curve.problem, axis.curves):
            name = f"{axis.axis} tokens: {curve.problem}"
            problems.setdefault(name, []).append(curve.size.name)
    found = [f"{text.capitalize()} ({', '.join(names)})." for text, names in problems.items()]
    runs = [run for run in law.sweep.runs if run.missing]
    if runs:
        names = ", ".join(f"{report_plots.label(run.name, 60)} ({run.missing})" for run in runs)
        found.append(f"Incomplete, and left out of everything reckoned: {names}.")
    drawn = {run for a in law.axes for curve in a.curves for c in curve.cells for run in c.runs}
    beside = len([run for run in law.sweep.completed if run not in drawn])
    if law.sweep.completed and not law.axes:
        found.append(
            "No size has runs with different numbers of one kind of tokens and all of the other: "
            "there is no drop to tell of."
        )
    elif beside:
        found.append(
            f"{beside} completed run{'s' * (beside != 1)} with fewer tokens of both kinds than the "
            f"sweep's most {'is' if beside == 1 else 'are'} on no axis, but listed, and drawn over "
            "FLOPs."
        )
    return [*found, *law.sweep.notes]


def console(law: inverse_scaling.Law) -> str:
    """Everything as plain text, without a final newline."""
    blocks = [run_summary.format_cells(run_cells(law))]
    for axis in law.axes:
        for cells in (drop_cells(axis), fit_cells(axis), trend_cells(axis)):
            if len(cells) > 1:
                blocks.append(run_summary.format_cells(cells))
    sentences = [*(verdict(axis) for axis in law.axes), seeds(law), *remarks(law)]
    return "\n\n".join([*blocks, "\n".join(report_plots.label(x, 2000) for x in sentences)])


COLUMNS = (
    *("run", "model", "params", "pixels", "image_tokens", "text_tokens", "image_area", "seed"),
    *("samples", "training_flops", "evaluator", "metric", "value", "examples", "drop", "front"),
    "missing",
)


def run_records(law: inverse_scaling.Law) -> list[dict[str, Any]]:
    """Every run as plain values by `COLUMNS`; None for what is unknown.

    `drop` is against the mean of the size's runs with all tokens; `front` whether nothing cheaper
    is as good; `missing` why a run counts for nothing.
    """
    full = _full_accuracies(law)
    return [
        {
            "run": run.name,
            "model": run.size.name,
            "params": run.size.params,
            "pixels": run.pixels,
            "image_tokens": run.image_tokens,
            "text_tokens": run.text_tokens,
            "image_area": run.image_area,
            "seed": run.seed,
            "samples": run.samples,
            "training_flops": _finite(run.training_flops),
            "evaluator": law.sweep.evaluator,
            "metric": law.sweep.metric,
            "value": _finite(run.accuracy),
            "examples": run.examples,
            "drop": _finite(full.get(run.size, math.nan) - run.accuracy),
            "front": run in law.front,
            "missing": run.missing,
        }
        for run in law.sweep.runs
    ]


def _full_accuracies(law: inverse_scaling.Law) -> dict[sweep_runs.Size, float]:
    return {
        curve.size: curve.cells[0].accuracy
        for axis in law.axes
        for curve in axis.curves
        if math.isclose(curve.cells[0].share, 1)
    }


def to_csv(law: inverse_scaling.Law) -> str:
    """A line for every run, with headings."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in run_records(law):
        # Spreadsheets take a cell that begins like a formula for one.
        writer.writerow({k: _cell(v) for k, v in record.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.7g}"
    if isinstance(value, str):
        line = report_plots.label(value, 200)
        return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line
    return value


def to_record(law: inverse_scaling.Law) -> dict[str, Any]:
    """Everything as plain values for JSON; None for what is unknown."""
    return {
        "evaluator": law.sweep.evaluator,
        "metric": law.sweep.metric,
        "runs": run_records(law),
        "axes": [_axis_record(axis) for axis in law.axes],
        "seed_std": law.seed_std,
        "front": [run.name for run in law.front],
        "remarks": [seeds(law), *remarks(law)],
    }


def _axis_record(axis: inverse_scaling.AxisLaw) -> dict[str, Any]:
    return {
        "axis": axis.axis,
        "form": "error(s) = full + scale * (s ** -exponent - 1), s: share of the tokens",
        "reference_share": axis.reference,
        "curves": [_curve_record(curve, axis.axis) for curve in axis.curves],
        "trends": [_trend_record(trend) for trend in axis.trends],
        "verdict": verdict(axis),
    }


def _curve_record(curve: inverse_scaling.Curve, axis: str) -> dict[str, Any]:
    fit = curve.fit
    return {
        "model": curve.size.name,
        "params": curve.size.params,
        "points": [
            {
                "tokens": cell.tokens(axis),
                "share": cell.share,
                "runs": len(cell.runs),
                **{name: _finite(getattr(cell, name)) for name in ("accuracy", "std")},
                **{name: _finite(getattr(cell, name)) for name in ("drop", "drop_std")},
                **{name: _finite(getattr(cell, name)) for name in ("relative", "relative_std")},
            }
            for cell in curve.cells
        ],
        "fit": None
        if fit is None
        else {
            **{name: getattr(fit, name) for name in ("full", "scale", "exponent", "chi2")},
            "degrees": fit.degrees,
            "stds": [_finite(std) for std in fit.stds],
            "residuals": list(fit.residuals),
        },
        "problem": curve.problem,
    }


def _trend_record(trend: inverse_scaling.LossTrend) -> dict[str, Any]:
    losses: Sequence[inverse_scaling.Loss] = trend.losses
    return {
        "kind": trend.kind,
        "relative": trend.relative,
        "losses": {x.size.name: {"value": x.value, "std": x.std} for x in losses},
        "slope_per_doubling": None if trend.line is None else trend.line.slope,
        "slope_std": None if trend.line is None else trend.line.std,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
