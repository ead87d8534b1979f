"""The report's curves: matplotlib's drawings, made into SVG that shares a page with others."""

import collections
import dataclasses
import html
import io
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
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
_INK, _QUIET, _RULE, *SERIES = [light for light, _ in COLORS.values()][:9]
# Of matplotlib and of SVG.
_DASHES = {"-": "none", "--": "7 3", ":": "2 3", "-.": "7 3 2 3"}

# A plot is a few hundred pixels wide: more points than this only make the file heavier.
_MAX_POINTS = 600


# More curves than colours share no panel: nobody could tell them apart.
_MAX_SERIES = len(SERIES)

# Of metrics that have no panel of their own in `_plots`: a stranger's log may have any number.
_MAX_OTHERS = 24

# Retrieval: (kind, k) of `recall_at_5`, `text_to_image_recall_at_5`, `R@5`.
_RECALL = re.compile(r"(.*?)(?:recall(?:_at_|@)|[rR]@)(\d+)")
# As all accuracies of evaluators, and their like: in 0..1.
_SHARE = re.compile(r"(\w+_)?(accuracy|recall|precision)(_\w+)?")

_Segments = list[list[tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class _Series:
    """A named curve of one run: for every stage its (position, value) points."""

    name: str
    run: int
    segments: _Segments
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


@dataclasses.dataclass(frozen=True)
class _View:
    """Runs over one axis; `names` tell them apart where they are several."""

    histories: Sequence[run_history.RunHistory]
    names: Sequence[str]
    axis: str

    def series(self, name: str, group: str, value: str) -> list[_Series]:
        """Those of every run that has the value."""
        found = []
        for run, history in enumerate(self.histories):
            full = f"{self.names[run]} {name}" if len(self.histories) > 1 else name
            segments = history.curve(group, value, self.axis)
            series = _Series(full, run, segments, sparse=group != run_history.TRAIN_GROUP)
            found += [series] if series.values else []
        return found

    def evaluations(self, prefix: str, value: str, label: str = "{}") -> list[_Series]:
        """Those of every group with this prefix."""
        groups = [history.group_names(prefix, value) for history in self.histories]
        found = []
        for name in dict.fromkeys(sum(groups, [])):
            found += self.series(label.format(name), prefix + name, value)
        return found

    def other_values(self, kind: str, known: Collection[str]) -> list[str]:
        """Names of values in groups of a kind that are neither known nor mere circumstances."""
        names = {
            name: None
            for history in self.histories
            for group in history.groups(kind)
            for name in history.value_names(group)
        }
        return [name for name in names if name not in {*known, *run_summary.NO_METRICS}]


def _plots(view: _View) -> list[_Plot]:
    def train(value: str) -> list[_Series]:
        return view.series("train", run_history.TRAIN_GROUP, value)

    def evals(value: str) -> list[_Series]:
        return view.evaluations(run_history.TRAINING_EVAL, value, "eval {}")

    top1 = view.evaluations(run_history.INFERENCE_EVAL, "accuracy")
    plots = [
        _Plot("loss", "Loss", train("loss") + evals("loss")),
        _Plot("accuracy", "Zero-shot top-1", top1, percent=True, from_zero=True),
        *_recalls(view),
        _Plot("speed", "Images per second", train("samples_per_second"), from_zero=True),
        _Plot("mfu", "MFU", train("mfu"), percent=True, from_zero=True),
        _Plot("wait", "Waiting for data", train("data_wait_share"), percent=True, from_zero=True),
        _Plot("rate", "Learning rate", train("learning_rate"), from_zero=True, small=True),
        _Plot("scale", "Logit scale", train("logit_scale"), small=True),
        _Plot("norm", "Gradient norm", train("grad_norm"), small=True),
        _Plot(
            "batch", "In-batch accuracy", train("accuracy") + evals("accuracy"), percent=True,
            from_zero=True, small=True,
        ),
    ]  # fmt: skip
    return [part for plot in [*plots, *_others(view)] for part in _parts(plot)]


def _parts(plot: _Plot) -> Iterator[_Plot]:
    """The plot as it is, or in parts where it has too many curves; none where it has none."""
    starts = range(0, len(plot.series), _MAX_SERIES)
    parts = [plot.series[start : start + _MAX_SERIES] for start in starts]
    for index, series in enumerate(parts):
        number = f" ({index + 1} of {len(parts)})" if len(parts) > 1 else ""
        key, title = plot.key + f"-{index}" * bool(index), plot.title + number
        yield dataclasses.replace(plot, key=key, title=title, series=series)


def _recalls(view: _View) -> Iterator[_Plot]:
    """A panel for every kind of recall, with a curve for every k and data set."""
    prefix = run_history.INFERENCE_EVAL
    kinds: dict[str, list[_Series]] = {}
    for value in view.other_values(prefix, ()):
        if found := _RECALL.fullmatch(value):
            kinds.setdefault(found[1] or "", []).extend(
                view.evaluations(prefix, value, f"{{}} R@{found[2]}")
            )
    for index, (kind, series) in enumerate(kinds.items()):
        title = f"Recall, {label(kind.rstrip('_/').replace('_', ' '))}" if kind else "Recall"
        yield _Plot(f"recall{index}", title, series, percent=True, from_zero=True)


def _others(view: _View) -> list[_Plot]:
    """Panels for what a run logged beyond what is known of."""
    known = ("loss", "accuracy", "samples_per_second", "data_wait_share", "learning_rate")
    known += ("logit_scale", "grad_norm", "mfu")
    inference = run_history.INFERENCE_EVAL
    found = [
        (value, view.series("train", run_history.TRAIN_GROUP, value))
        for value in view.other_values(run_history.TRAIN_GROUP, known)
    ]
    found += [
        (value, view.evaluations(run_history.TRAINING_EVAL, value, "eval {}"))
        for value in view.other_values(run_history.TRAINING_EVAL, ("loss", "accuracy"))
    ]
    found += [
        (value, view.evaluations(inference, value))
        for value in view.other_values(inference, ("accuracy",))
        if not _RECALL.fullmatch(value)
    ]
    return [
        _Plot(
            f"other{index}", label(value.replace("_", " ").capitalize()), series, small=True,
            percent=bool(share := _SHARE.fullmatch(value)), from_zero=bool(share),
        )
        for index, (value, series) in enumerate(found[:_MAX_OTHERS])
    ]  # fmt: skip


def curves(histories: Sequence[run_history.RunHistory], names: Sequence[str] = ("",)) -> str:
    """HTML of every plot that the runs have values for, over each axis that they share.

    Args:
        histories: One or several runs; several share panels, each in a colour of its own.
        names: Of the runs, for captions.

    Returns:
        The panels; where there are several axes, all sets of panels, between which radio buttons
        switch by `SWITCH_STYLE`. Empty where nothing was logged.

    Raises:
        errors.UserError: matplotlib is missing.
    """
    axes = run_history.common_axes(histories)
    sets = [_panels(_View(histories, names, axis), f"x{i}") for i, axis in enumerate(axes)]
    if len(sets) == 1 or not sets[0]:
        return sets[0]
    buttons = "".join(
        f'<input type="radio" name="axis" id="axis-{i}"{" checked" * (i == 0)}>'
        f'<label for="axis-{i}">over {axis}</label>'
        for i, axis in enumerate(axes)
    )
    shown = "".join(f'<div class="over over-{i}">{panels}</div>' for i, panels in enumerate(sets))
    return f'<div class="switch">{buttons}{shown}</div>'


SWITCH_STYLE = """
.over { display: none; }
#axis-0:checked ~ .over-0, #axis-1:checked ~ .over-1 { display: block; }
.switch > label { display: inline-block; margin: 0 1.5rem 1rem .35rem; cursor: pointer; }
.switch > input { accent-color: var(--series-1); }
"""


def _panels(view: _View, key: str) -> str:
    plots = [dataclasses.replace(plot, key=f"{plot.key}-{key}") for plot in _plots(view)]
    large, small = (
        "".join(_figure(plot, view) for plot in plots if plot.small is size)
        for size in (False, True)
    )
    large = large and f'<div class="plots">{large}</div>'
    return large + (small and f'<div class="plots small">{small}</div>')


def _figure(plot: _Plot, view: _View) -> str:
    ends, spans, holes = [], [], 0
    for series, style in _styled(plot, view):
        finite = [y for y in series.values if math.isfinite(y)]
        holes += len(series.values) - len(finite)
        name = f"{label(series.name)} " if len(plot.series) > 1 else ""
        end = html.escape(name + plot.show(series.values[-1]))
        ends.append(f'<span class="end">{curve_key(**style)}{end}</span>' if name else end)
        if finite:
            ordered = [plot.show(y) for y in (finite[0], finite[-1], min(finite), max(finite))]
            spans.append("{}from {} to {}, least {}, greatest {}".format(name, *ordered))
    caption = "last: " + ", ".join(ends) + (f"; {holes} not finite, not drawn" if holes else "")
    alt = f"{plot.title} over {view.axis}: {'; '.join(spans) or 'no finite value'}"
    title = f"<strong>{html.escape(plot.title)}</strong> {caption}"
    size = (3.7, 2.2) if plot.small else (5.6, 3.0)
    svg = draw_svg(lambda axes: _draw(axes, plot, view), plot.key, size, alt)
    return f"<figure><figcaption>{title}</figcaption>{svg}</figure>"


def curve_key(color: str, linestyle: str = "-") -> str:
    """A line as a curve is drawn: in the caption it hides none, however many and long names are."""
    dashes = _DASHES[linestyle]
    return _themed(
        '<svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path d="M0 4H24" fill="none" '
        f'style="stroke: {color}" stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
    )


def label(text: str, limit: int = 40) -> str:
    """A name as drawings show it: one line of printable letters, cut to `limit`."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


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
    return _themed(svg)


def _themed(svg: str) -> str:
    """Colours of styles, drawn in the light ones, as variables of the page."""
    for name, (light, _) in COLORS.items():
        svg = svg.replace(f": {light}", f": var(--{name}, {light})")
    return svg


def _draw(axes: Any, plot: _Plot, view: _View) -> None:
    from matplotlib import ticker

    for series, style in _styled(plot, view):
        _draw_series(axes, series, style)
    low, high = 0.0, max(history.spans(view.axis)[-1][1] for history in view.histories)
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
    if view.axis == run_history.FLOPS:
        axes.xaxis.set_major_formatter(lambda value, _: format_flops(value))
    if plot.percent:
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
    if len(view.histories) == 1:
        _mark_stages(axes, view, labelled=not plot.small)


def _styled(plot: _Plot, view: _View) -> Iterator[tuple[_Series, dict[str, Any]]]:
    """Colours tell curves apart, or runs where there are several; dashes tell the rest."""
    drawn = collections.Counter[int]()
    for index, series in enumerate(plot.series):
        dash, color = divmod(index, len(SERIES))
        if len(view.histories) > 1:
            dash, color = drawn[series.run], series.run % len(SERIES)
            drawn[series.run] += 1
        yield series, {"color": SERIES[color], "linestyle": list(_DASHES)[dash % len(_DASHES)]}


def _draw_series(axes: Any, series: _Series, style: dict[str, Any]) -> None:
    """Draws a line for each stage, or one where evaluations are joined."""
    segments = [sum(series.segments, [])] if series.sparse else series.segments
    for segment in filter(None, segments):
        points = [(x, y if math.isfinite(y) else math.nan) for x, y in _thin(segment)]
        marker = "o" if len(points) == 1 or series.sparse and len(points) < 60 else ""
        style |= {"marker": marker, "ms": 3.5, "lw": 1.5, "clip_on": False}
        axes.plot(*zip(*points, strict=True), **style)


def format_flops(value: float) -> str:
    """Formats operations in at most three figures, by a power of ten beyond units: 3.2e+21."""
    return run_summary.format_compact(value) if value < 1e15 else f"{value:.3g}"


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Averages neighbours until a panel's worth is left; a NaN among them stays a NaN."""
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    columns = (tuple(zip(*group, strict=True)) for group in groups)
    return [(sum(x) / len(x), sum(y) / len(y)) for x, y in columns]


def _mark_stages(axes: Any, view: _View, labelled: bool) -> None:
    """Plants a line with a flag where each stage begins; flags that would overlap go higher."""
    (history,) = view.histories
    if len(history.stages) < 2:
        return
    low, high = axes.get_xlim()
    rows: list[float] = []  # How far to the right each row of flags is taken, in 0..1.
    for stage, (start, end) in zip(history.stages, history.spans(view.axis), strict=True):
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
