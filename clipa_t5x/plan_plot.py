"""A page that draws published accuracy against compute, and marks a recipe and a budget in it."""

import dataclasses
import html
import os
from collections.abc import Sequence
from typing import Any

from clipa_t5x import accuracy_curves, published, report_page, report_plots

_CSS = """
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 1rem; }
figure { margin: 0 0 1.5rem; }
figcaption { color: var(--quiet); }
.plot { display: block; width: 100%; height: auto; }
.plot text { font-family: inherit !important; }
pre { background: var(--panel); padding: .9rem 1rem; overflow: auto;
  font: 12.5px/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .3rem .75rem; text-align: left; border-top: 1px solid var(--rule); }
thead th { font-weight: 500; color: var(--quiet); border: 0; }
td:nth-child(4), td:nth-child(5) { text-align: right; }
"""

_INK, _QUIET, _RULE, _PAPER = (
    report_plots.COLORS[name][0] for name in ("ink", "quiet", "rule", "paper")
)
_MARKERS = "os^Dvp"

_CAPTION = (
    "Zero-shot ImageNet-1k top-1 over training FLOPs (forward and backward passes). "
    "Faint points: a cheaper one of the same model and data does as well. Lines are the estimates "
    "between points; nothing is drawn beyond them. Stars: estimates for what is marked."
)


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something to be marked in the plot.

    Attributes:
      name: of a recipe, or of a budget.
      flops: its training FLOPs.
      accuracies: estimates in percent at that compute; none where no published model fits.
    """

    name: str
    flops: float
    accuracies: tuple[float, ...] = ()


def write(path: str | os.PathLike[str], marks: Sequence[Mark], tables: Sequence[str]) -> None:
    """Writes the page, all at once or not at all; it fetches nothing.

    Args:
      path: the file.
      marks: recipes and budgets to mark.
      tables: plain texts to show beneath the plot.

    Raises:
      UserError: the file cannot be written, or matplotlib is missing.
    """
    report_page.write(path, render(marks, tables), what="", flag="--plot")


def render(marks: Sequence[Mark], tables: Sequence[str]) -> str:
    """The page as HTML; equal arguments give equal pages."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    alt = "Accuracy over compute: " + "; ".join(
        f"{curve.model} on {curve.data} from {curve.points[0].accuracy:g} % at "
        f"{curve.points[0].training_flops:.2g} to {curve.points[-1].accuracy:g} % at "
        f"{curve.points[-1].training_flops:.2g}"
        for curve in accuracy_curves.curves()
    )
    plot = report_plots.draw_svg(lambda axes: _draw(axes, marks), "plan", (8.0, 4.8), alt)
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">',
        f"<title>Accuracy and compute</title>\n<style>{report_plots.color_style()}{_CSS}</style>",
        "</head>\n<body><main>\n<h1>Accuracy and compute</h1>",
        f"<figure>{plot}<figcaption>{_CAPTION}</figcaption></figure>",
        *(f'<pre tabindex="0">{html.escape(table)}</pre>' for table in tables),
        _points_table(),
        "</main></body>\n</html>\n",
    ]
    return "\n".join(parts)


def _points_table() -> str:
    points = sorted(published.POINTS, key=lambda point: point.training_flops)
    heading = ("model", "data", "recipe: samples@pixels", "training FLOPs", "top-1, %", "source")
    rows = (
        (
            *(point.model, point.data, point.recipe),
            *(
                f"{point.training_flops:.2e}".replace("e+", "e"),
                f"{point.accuracy:g}",
                point.source,
            ),
        )
        for point in points
    )
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heading)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    sources = "; ".join(f"{key}: {title}" for key, title in published.SOURCES.items())
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<p>{html.escape(sources)}.</p>"
    )


def _draw(axes: Any, marks: Sequence[Mark]) -> None:
    from matplotlib import ticker

    axes.set_xscale("log")
    for index, curve in enumerate(accuracy_curves.curves()):
        dash, color = divmod(index, len(report_plots.SERIES))
        style = {
            "color": report_plots.SERIES[color],
            "marker": _MARKERS[index % len(_MARKERS)],
            "ms": 4,
        }
        xs, ys = zip(*map(_place, curve.points), strict=True)
        label = f"{curve.model}, {curve.data}"
        axes.plot(xs, ys, lw=1.5, linestyle=("-", "--")[dash % 2], label=label, **style)
        others = [
            _place(p)
            for p in published.POINTS
            if (p.model, p.data) == (curve.model, curve.data) and p not in curve.points
        ]
        if others:
            axes.plot(*zip(*others, strict=True), linestyle="none", alpha=0.35, **style)
    # What is marked may lie beyond all that is published.
    low, high = axes.get_xlim()
    axes.set_xlim(
        min([low, *(float(mark.flops) / 2 for mark in marks)]),
        max([high, *(float(mark.flops) * 2 for mark in marks)]),
    )
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 2.5 * len(marks))  # room for their names
    for index, mark in enumerate(marks):
        _draw_mark(axes, mark, index)
    axes.set_xlabel("training FLOPs", color=_QUIET)
    axes.set_ylabel("zero-shot ImageNet-1k top-1, %", color=_QUIET)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:.0e}".replace("+", "")))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(axis="y", color=_RULE, linewidth=0.5)
    axes.tick_params(which="both", length=0, labelcolor=_QUIET)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(_RULE)
    frame = {"framealpha": 1.0, "facecolor": _PAPER, "edgecolor": "none"}
    legend = axes.legend(loc="lower right", fontsize=8, **frame)
    for text in legend.get_texts():
        text.set_color(_INK)


def _place(point: published.Point) -> tuple[float, float]:
    # Not integers: they exceed what numpy's hold.
    return float(point.training_flops), point.accuracy


def _draw_mark(axes: Any, mark: Mark, index: int) -> None:
    """A line at the mark's compute, named at its top, and a star for each estimate."""
    at = float(mark.flops)
    axes.axvline(at, color=_INK, lw=1, linestyle=":")
    # Marks may lie close to each other: their names stand below one another.
    name = "".join(letter if letter.isprintable() else " " for letter in mark.name)
    text = axes.text(
        at, 0.98 - 0.06 * index, f" {name} ", transform=axes.get_xaxis_transform(),
        ha="right", va="top", color=_INK, fontsize=8,
    )  # fmt: skip
    text.set_parse_math(False)
    for accuracy in mark.accuracies:
        axes.plot(at, accuracy, marker="*", ms=11, color=_INK, linestyle="none")
