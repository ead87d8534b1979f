"""The report's curves: matplotlib's drawings, made into SVG that shares a page with others."""

import dataclasses
import html
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from clipa_t5x import errors, run_history, run_summary

# The whole report's: name -> (light, dark). Matplotlib draws in the light colours; each is then
# replaced by a CSS variable, so that one drawing serves both schemes.
COLORS = {
    "ink": ("#1d2329", "#dde2e8"),
    "quiet": ("#5d6773", "#98a3b0"),
    "rule": ("#d5dae0", "#363d46"),
    "series-1": ("#1f6fb4", "#62aef0"),
    "series-2": ("#c2571a", "#f0935a"),
    "series-3": ("#2a8a57", "#5cc48d"),
    "series-4": ("#8b4fb0", "#c391e6"),
    "series-5": ("#8a7415", "#d3ba4c"),
    "series-6": ("#b83a6b", "#ee82ab"),
    "paper": ("#ffffff", "#14181d"),
    "panel": ("#f4f6f8", "#1d232a"),
    "hit": ("#7cc79a", "#3d8a5f"),
    "miss": ("#e3a09b", "#94504c"),
    "hit-ink": ("#1f7a48", "#6fd09c"),
    "miss-ink": ("#b0413a", "#ee8f88"),
}
_INK, _QUIET, _RULE, *_SERIES = [light for light, _ in COLORS.values()][:9]
_DASHES = ("-", "--", ":", "-.")

# A plot is a few hundred pixels wide: more points than this only make the file heavier.
_MAX_POINTS = 600


@dataclasses.dataclass(frozen=True)
class _Series:
    """A named curve: for every stage its (position, value) points."""

    name: str
    segments: list[list[tuple[float, float]]]
    sparse: bool = False  # Evaluations: marked points, joined from stage to stage.

    @property
    def values(self) -> list[float]:
        return [y for segment in self.segments for _, y in segment]


@dataclasses.dataclass(frozen=True)
class _Plot:
    """What one panel shows, and how."""

    key: str
    title: str
    series: list[_Series]
    percent: bool = False
    from_zero: bool = False
    small: bool = False

    def show(self, value: float) -> str:
        """Formats a value of this panel for its caption."""
        return run_summary.format_percent(value) if self.percent else f"{value:.4g}"


def _plots(history: run_history.RunHistory) -> list[_Plot]:
    def series(name: str, group: str, value: str, sparse: bool = False) -> list[_Series]:
        found = _Series(name, history.curve(group, value), sparse)
        return [found] if found.values else []

    def train(value: str) -> list[_Series]:
        return series("train", run_history.TRAIN_GROUP, value)

    losses, accuracies = train("loss"), []
    for name in history.group_names(run_history.TRAINING_EVAL, "loss"):
        losses += series(f"eval {name}", run_history.TRAINING_EVAL + name, "loss", True)
    for name in history.group_names(run_history.INFERENCE_EVAL, "accuracy"):
        accuracies += series(name, run_history.INFERENCE_EVAL + name, "accuracy", True)
    plots = [
        _Plot("loss", "Loss", losses),
        _Plot("accuracy", "Zero-shot top-1", accuracies, percent=True, from_zero=True),
        _Plot("speed", "Images per second", train("samples_per_second"), from_zero=True),
        _Plot("wait", "Waiting for data", train("data_wait_share"), percent=True, from_zero=True),
        _Plot("rate", "Learning rate", train("learning_rate"), from_zero=True, small=True),
        _Plot("scale", "Logit scale", train("logit_scale"), small=True),
        _Plot("norm", "Gradient norm", train("grad_norm"), small=True),
    ]
    return [plot for plot in plots if plot.series]


def curves(history: run_history.RunHistory) -> str:
    """HTML of every plot that the history has values for, each over the cumulative axis."""
    plots = _plots(history)
    large, small = (
        "".join(_figure(plot, history) for plot in plots if plot.small is size)
        for size in (False, True)
    )
    large = large and f'<div class="plots">{large}</div>'
    return large + (small and f'<div class="plots small">{small}</div>')


def _figure(plot: _Plot, history: run_history.RunHistory) -> str:
    ends, spans, holes = [], [], 0
    for series in plot.series:
        finite = [y for y in series.values if math.isfinite(y)]
        holes += len(series.values) - len(finite)
        name = f"{label(series.name)} " if len(plot.series) > 1 else ""
        ends.append(name + plot.show(series.values[-1]))
        if finite:
            ordered = [plot.show(y) for y in (finite[0], finite[-1], min(finite), max(finite))]
            spans.append("{}from {} to {}, least {}, greatest {}".format(name, *ordered))
    caption = "last: " + ", ".join(ends) + (f"; {holes} not finite, not drawn" if holes else "")
    alt = f"{plot.title} over {history.axis}: {'; '.join(spans) or 'no finite value'}"
    title = f"<figcaption><strong>{plot.title}</strong> {html.escape(caption)}</figcaption>"
    return f"<figure>{title}{_svg(plot, history, alt)}</figure>"


def label(text: str, limit: int = 40) -> str:
    """A name as drawings show it: one line of printable letters, cut to `limit`."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _svg(plot: _Plot, history: run_history.RunHistory, alt: str) -> str:
    """Draws a panel as an SVG element that can share a document with others."""
    size = (3.7, 2.2) if plot.small else (5.6, 3.0)
    return draw_svg(lambda axes: _draw(axes, plot, history), plot.key, size, alt)


def draw_svg(draw: Callable[[Any], None], key: str, size: tuple[float, float], alt: str) -> str:
    """Draws one panel as an SVG element that can share a document with others.

    Args:
        draw: draws into a matplotlib `Axes`, in the light ones of `COLORS`.
        key: names the element's parts; unique within the document.
        size: width and height in inches, for text of 9 points.
        alt: what the drawing shows, in words.

    Raises:
        errors.UserError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib import figure
    except ImportError as error:
        raise errors.UserError(
            "the report draws its plots with matplotlib, which is not installed: "
            "pip install 'clipa_t5x[report]'"
        ) from error
    drawn = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # The browser has the fonts that draw it.
        matplotlib.rcdefaults()  # A user's matplotlibrc must not reach in (usetex, styles).
        matplotlib.rc("svg", fonttype="none", hashsalt=key)
        matplotlib.rc("font", size=9)
        drawing = figure.Figure(figsize=size, layout="constrained")
        draw(drawing.add_subplot())
        drawing.savefig(drawn, format="svg", transparent=True)
    return _inline(drawn.getvalue(), key, alt)


def color_style() -> str:
    """CSS that sets every one of `COLORS` as a variable, for the light and the dark scheme."""
    light, dark = (
        f":root {{ {''.join(f'--{name}: {pair[i]}; ' for name, pair in COLORS.items())}}}"
        for i in (0, 1)
    )
    return f"\n{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}"


def _inline(svg: str, key: str, alt: str) -> str:
    svg = svg[svg.index("<svg") :]
    for unwanted in ("<!--.*?-->", "<metadata>.*?</metadata>", r"<style\b.*?</style>"):
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    attributes = f'class="plot" role="img" aria-label="{html.escape(alt)}"'
    svg = re.sub(
        r'<svg\b[^>]*(viewBox="[^"]*")[^>]*>', lambda m: f"<svg {attributes} {m[1]}>", svg, count=1
    )
    # Identifiers are one name space for the whole document.
    svg = svg.replace('xlink:href="#', f'href="#{key}-').replace("url(#", f"url(#{key}-")
    svg = re.sub(r'(<[^<>]*\bid=")', rf"\g<1>{key}-", svg)
    for name, (light, _) in COLORS.items():
        svg = svg.replace(f": {light}", f": var(--{name}, {light})")
    return svg


def _draw(axes: Any, plot: _Plot, history: run_history.RunHistory) -> None:
    from matplotlib import ticker

    handles = []
    for index, series in enumerate(plot.series):
        dash, color = divmod(index, len(_SERIES))
        style: dict[str, Any] = {"color": _SERIES[color], "linestyle": _DASHES[dash % len(_DASHES)]}
        segments = [sum(series.segments, [])] if series.sparse else series.segments
        for segment in filter(None, segments):
            points = [(x, y if math.isfinite(y) else math.nan) for x, y in _thin(segment)]
            marker = "o" if len(points) == 1 or series.sparse and len(points) < 60 else ""
            style |= {"marker": marker, "ms": 3.5, "lw": 1.5, "clip_on": False}
            (line,) = axes.plot(*zip(*points, strict=True), **style)
        handles.append(line)
    low, high = history.spans[0][0], history.spans[-1][1]
    axes.set_xlim(low, high if high > low else low + 1)
    finite = [y for series in plot.series for y in series.values if math.isfinite(y)]
    if plot.from_zero and finite and min(finite) >= 0:
        axes.set_ylim(0, max(finite) * 1.08 or 1)
    axes.grid(axis="y", color=_RULE, linewidth=0.5)
    axes.tick_params(length=0, labelcolor=_QUIET)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(_RULE)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(4 if plot.small else 6))
        axis.set_major_formatter(lambda value, _: run_summary.format_compact(value))
    if plot.percent:
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
    if len(plot.series) > 1:
        # Texts are set afterwards: matplotlib drops labels that begin with an underscore.
        blanks = ["x" * len(label(series.name)) for series in plot.series]
        legend = axes.legend(handles, blanks, frameon=False)
        for text, series in zip(legend.get_texts(), plot.series, strict=True):
            text.set(text=label(series.name), parse_math=False, color=_INK)
    _mark_stages(axes, history, labelled=not plot.small)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Averages neighbours until a panel's worth is left; a NaN among them stays a NaN."""
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    columns = (tuple(zip(*group, strict=True)) for group in groups)
    return [(sum(x) / len(x), sum(y) / len(y)) for x, y in columns]


def _mark_stages(axes: Any, history: run_history.RunHistory, labelled: bool) -> None:
    """Plants a line with a flag where each stage begins; flags that would overlap go higher."""
    if len(history.stages) < 2:
        return
    low, high = axes.get_xlim()
    rows: list[float] = []  # How far to the right each row of flags is taken, in 0..1.
    for stage, (start, end) in zip(history.stages, history.spans, strict=True):
        if end <= start:
            continue
        text = _stage_label(stage)
        # Text is drawn by the browser, in a font unknown here: its width can only be reckoned.
        at, width = (start - low) / (high - low), 0.0125 * len(text)
        leftward = at + width > 1
        left = at - width if leftward else at
        row = next((i for i, taken in enumerate(rows) if taken <= left), len(rows))
        rows[row : row + 1] = [at if leftward else at + width]
        top = 1.0 + (0.08 * (row + 1) if labelled else 0)
        pole = {"transform": axes.transAxes, "color": _QUIET, "clip_on": False}
        axes.plot([at, at], [0, top], linewidth=0.7, **pole)
        if labelled:
            side, gap = ("right", -0.008) if leftward else ("left", 0.008)
            flag = axes.text(at + gap, top, text, ha=side, va="top", fontsize=8, **pole)
            flag.set_parse_math(False)


def _stage_label(stage: run_history.Stage) -> str:
    pixels, tokens = stage.number("image_size"), stage.number("num_image_tokens_kept")
    facts = [] if pixels is None else [f"{run_summary.format_count(pixels)} px"]
    facts += [] if tokens is None else [f"{run_summary.format_count(tokens)} tokens"]
    return " ".join([label(stage.name, 16), " / ".join(facts)]).strip()
