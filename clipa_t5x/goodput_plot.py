"""The report's bars of where each stage's wall time went."""

import html
from collections.abc import Sequence
from typing import Any

from clipa_t5x import report_plots, run_history, run_summary, wall_time

_COLORS = {
    "step": "series-1",
    "data_wait": "series-2",
    "evaluation": "series-3",
    "checkpoint": "series-5",
    "compile": "series-4",
    "init": "quiet",
    "lost": "series-6",
    "other": "rule",
}


def figure(histories: Sequence[run_history.RunHistory], names: Sequence[str] = ("",)) -> str:
    """HTML of a bar for every stage that recorded its time, and of one for all; '' without any.

    Args:
        histories: one run, or several under each other.
        names: of the runs, where there are several.

    Raises:
        errors.UserError: matplotlib is missing.
    """
    bars, captions = [], []
    for history, name in zip(histories, names, strict=True):
        own = _bars(history)
        bars += [(f"{name} {title}".strip(), summary) for title, summary in own]
        captions += [f"{name} {_caption(own[-1][1])}".strip()] if own else []
    if not bars:
        return ""
    texts = [f"{name}: {run_summary.format_goodput(summary)}" for name, summary in bars]
    short = ". ".join(captions)
    svg = report_plots.draw_svg(
        lambda axes: _draw(axes, bars), "goodput", (8.8, 0.95 + 0.33 * len(bars)), ". ".join(texts)
    )
    title = "<strong>Goodput</strong>"
    return f"<figure><figcaption>{title} {html.escape(short)}</figcaption>{svg}</figure>"


def _bars(history: run_history.RunHistory) -> list[tuple[str, wall_time.Summary]]:
    bars = [(each.name, each.time_spent) for each in history.stages if each.time_spent]
    if len(bars) > 1:
        bars.append(("all stages", wall_time.total([summary for _, summary in bars])))
    return bars


def _caption(summary: wall_time.Summary) -> str:
    share = run_summary.format_percent(summary.goodput)
    whole = run_summary.format_duration(summary.running)
    return (
        f"{share} of {whole} went into steps that were kept; {run_summary.format_restarts(summary)}"
    )


def _draw(axes: Any, bars: list[tuple[str, wall_time.Summary]]) -> None:
    from matplotlib import patches, ticker

    colors = {name: report_plots.COLORS[color][0] for name, color in _COLORS.items()}
    shown = [
        name for name in _COLORS if any(_share(summary, name) >= 0.0005 for _, summary in bars)
    ]
    for row, (_, summary) in enumerate(bars):
        left = 0.0
        for name in shown:
            share = _share(summary, name)
            axes.barh(row, share, left=left, height=0.62, color=colors[name], linewidth=0)
            left += share
    axes.set_xlim(0, 1)
    names = [report_plots.label(name, 16) for name, _ in bars]
    axes.set_yticks(range(len(bars)), names, parse_math=False)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(ticker.PercentFormatter(1))
    axes.tick_params(length=0, labelcolor=report_plots.COLORS["quiet"][0])
    axes.spines[:].set_visible(False)
    handles = [patches.Patch(color=colors[name], linewidth=0) for name in shown]
    labels = [wall_time.title(name) for name in shown]
    legend = axes.legend(
        handles, labels, frameon=False, ncols=len(shown), loc="lower center",
        bbox_to_anchor=(0.5, 1.0), handlelength=1.0, handleheight=1.0, columnspacing=1.4,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_color(report_plots.COLORS["ink"][0])


def _share(summary: wall_time.Summary, category: str) -> float:
    return summary.seconds[category] / summary.running if summary.running else 0.0
