"""Draws what a run did: one self-contained HTML file with figures, plots and a retrieval gallery.

    python -m clipa_t5x.report --model_dir=RUN [--output=FILE]

RUN is the model directory of a run or of a schedule of runs (`run_history` says what it reads).
The file fetches nothing: styles are inline, plots are inline SVG, images are data URIs. All that
comes from the run is escaped, as captions are written by strangers.
"""

import argparse
import dataclasses
import datetime
import html
import io
import math
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from clipa_t5x import errors, run_history

# Name -> (light, dark). Matplotlib draws in the light colours; each is then replaced by a CSS
# variable, so that one drawing serves both schemes.
_COLORS = {
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
_INK, _QUIET, _RULE, *_SERIES = [light for light, _ in _COLORS.values()][:9]
_DASHES = ("-", "--", ":", "-.")

# A plot is a few hundred pixels wide: more points than this only make the file heavier.
_MAX_POINTS = 600

_CSS = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .95rem; margin: 1rem 0 .4rem; }
header p, figcaption, caption, dt, thead th { color: var(--quiet); }
header p { margin: .25rem 0 1.5rem; }
figcaption, caption, dt, thead th { font-size: .85rem; }
.facts { display: flex; flex-wrap: wrap; gap: 1rem 2.75rem; margin: 0 0 1rem; }
.facts dd { font-size: 1.35rem; font-weight: 600; line-height: 1.3; }
.note { border-left: 3px solid var(--series-2); padding-left: .75rem; color: var(--quiet); }
table { border-collapse: collapse; width: 100%; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; }
th, td { padding: .45rem .75rem; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { font-weight: 500; border-bottom: 1px solid var(--ink); }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
.plots { display: grid; gap: 1.5rem 2rem; margin-bottom: 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
figure, dd { margin: 0; min-width: 0; }
strong { color: var(--ink); font-size: .95rem; margin-right: .4rem; }
.plot { display: block; width: 100%; height: auto; }
.plot * { stroke-linejoin: round; stroke-linecap: butt; }
.plot text { font-family: inherit !important; }
details { border-top: 1px solid var(--rule); padding: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--panel); padding: .9rem 1rem; margin: 0; overflow: auto; max-height: 34rem;
  font: 12.5px/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.info { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.5rem; }
.info > div { display: contents; }
.retrieval { margin: 1.25rem 0 1.75rem; max-width: 48rem; }
.retrieval p { margin: 0 0 .5rem; }
ol { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: clamp(.3rem, 1vw, .9rem);
  margin: 0; padding: 0; list-style: none; }
.frame { border: 3px solid var(--miss); border-radius: 5px; background: var(--panel);
  aspect-ratio: 1; display: grid; place-items: center; overflow: hidden; }
.frame img { width: 100%; height: 100%; object-fit: contain; }
ol b { color: var(--miss-ink); }
.match .frame { border-color: var(--hit); }
.match b { color: var(--hit-ink); }
"""


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
        return run_history.format_percent(value) if self.percent else f"{value:.4g}"


def write_report(
    model_dir: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """Writes the report of a run or schedule, all at once or not at all.

    Args:
        model_dir: The MODEL_DIR.
        output: Where to write; `report.html` in the model directory when not given.

    Returns:
        The path written.

    Raises:
        errors.UserError: Nothing to report, matplotlib is missing, or the file cannot be written.
    """
    text = render(run_history.load(model_dir))
    path = pathlib.Path(output) if output else pathlib.Path(model_dir) / "report.html"
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise errors.UserError(
            f"cannot write the report to '{path}' ({error.strerror}): name a file in a directory "
            "that you can write, by --output"
        ) from error
    return path


def render(history: run_history.RunHistory) -> str:
    """Returns the whole HTML document; equal histories give equal documents.

    Raises:
        errors.UserError: matplotlib is missing.
    """
    rows = run_history.summary_rows(history)
    name = _escape(history.name)
    # The policy makes the browser itself refuse whatever an escape might have let through.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    problems = [f"{stage.name}: {text}." for stage in history.stages for text in stage.problems]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">',
        f"<title>{name} - run report</title>\n<style>{_style()}</style>\n</head>\n<body>",
        f"<header><h1>{name}</h1><p>Run report{_when(history)}</p></header>\n<main>",
        _facts(history, rows),
        *(f'<p class="note">{_escape(problem)}</p>' for problem in problems),
        _section("summary", "Summary", _table(rows)),
        _section("curves", f"Over {history.axis}", _curves(history)),
        _section("gallery", "Test captions and the images nearest to them", _gallery(history)),
        _section("stages", "Configuration and parameters", _stage_files(history)),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _section(key: str, heading: str, content: str) -> str:
    heading = f'<h2 id="{key}">{heading}</h2>'
    return f'<section aria-labelledby="{key}">{heading}{content}</section>' if content else ""


def _style() -> str:
    light, dark = (
        ":root { " + "".join(f"--{name}: {pair[i]}; " for name, pair in _COLORS.items()) + "}"
        for i in (0, 1)
    )
    return f"\n{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}{_CSS}"


def _escape(text: Any) -> str:
    return html.escape(str(text), quote=True)


def _when(history: run_history.RunHistory) -> str:
    groups = [records for stage in history.stages for records in stage.records.values()]
    times = [record.time for records in groups for record in records if 0 < record.time < 1e11]
    if not times:
        return ""
    ends = (datetime.datetime.fromtimestamp(end, datetime.UTC) for end in (min(times), max(times)))
    return ", " + " to ".join(f"{end:%Y-%m-%d %H:%M}" for end in ends) + " UTC"


def _facts(history: run_history.RunHistory, rows: list[dict[str, Any]]) -> str:
    losses = [y for part in history.curve(run_history.TRAIN_GROUP, "loss") for _, y in part]
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    newest = next((stage for stage in reversed(history.stages) if stage.info), history.stages[-1])
    parameters = newest.number("num_params")
    facts = []
    for name in history.group_names(run_history.INFERENCE_EVAL, "accuracy"):
        last = [row["zero_shot"][name] for row in rows if row["zero_shot"][name] is not None][-1]
        facts.append((f"Zero-shot top-1, {name}", run_history.format_percent(last)))
    facts.append(("Train loss", f"{losses[-1]:.4g}" if losses else None))
    facts.append((history.axis.capitalize(), run_history.format_count(history.spans[-1][1])))
    facts.append(("Duration", run_history.format_duration(sum(seconds)) if seconds else None))
    facts.append(("Parameters", parameters and run_history.format_compact(parameters)))
    facts.append(("Devices", newest.text("devices")))
    return _definitions("facts", [(term, text) for term, text in facts if text])


def _definitions(kind: str, facts: Iterable[tuple[str, str]]) -> str:
    items = "".join(
        f"<div><dt>{_escape(term)}</dt><dd>{_escape(text)}</dd></div>" for term, text in facts
    )
    return f'<dl class="{kind}">{items}</dl>' if items else ""


def _table(rows: list[dict[str, Any]]) -> str:
    header, *body = run_history.table_cells(rows)
    head = "".join(f'<th scope="col">{_escape(cell)}</th>' for cell in header)
    lines = "".join(
        f'<tr><th scope="row">{_escape(row[0])}</th>'
        + "".join(f"<td>{_escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in body
    )
    note = "Images/s is the median over the log, without its first record."
    if rows and rows[0]["zero_shot"]:
        note += " Top-1 is zero-shot accuracy at the stage's last evaluation."
    return (
        '<div style="overflow-x: auto" role="region" aria-labelledby="summary" tabindex="0"><table>'
        f"<caption>{note}</caption><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


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


def _curves(history: run_history.RunHistory) -> str:
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
        name = f"{_label(series.name)} " if len(plot.series) > 1 else ""
        ends.append(name + plot.show(series.values[-1]))
        if finite:
            ordered = [plot.show(y) for y in (finite[0], finite[-1], min(finite), max(finite))]
            spans.append("{}from {} to {}, least {}, greatest {}".format(name, *ordered))
    caption = "last: " + ", ".join(ends) + (f"; {holes} not finite, not drawn" if holes else "")
    alt = f"{plot.title} over {history.axis}: {'; '.join(spans) or 'no finite value'}"
    title = f"<figcaption><strong>{plot.title}</strong> {_escape(caption)}</figcaption>"
    return f"<figure>{title}{_svg(plot, history, alt)}</figure>"


def _label(text: str, limit: int = 40) -> str:
    # A drawing has no room for more, and XML none for control characters.
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _svg(plot: _Plot, history: run_history.RunHistory, alt: str) -> str:
    """Draws a panel as an SVG element that can share a document with others."""
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
        matplotlib.rc("svg", fonttype="none", hashsalt=plot.key)
        matplotlib.rc("font", size=9)
        size = (3.7, 2.2) if plot.small else (5.6, 3.0)
        drawing = figure.Figure(figsize=size, layout="constrained")
        _draw(drawing.add_subplot(), plot, history)
        drawing.savefig(drawn, format="svg", transparent=True)
    return _inline(drawn.getvalue(), plot.key, alt)


def _inline(svg: str, key: str, alt: str) -> str:
    svg = svg[svg.index("<svg") :]
    for unwanted in ("<!--.*?-->", "<metadata>.*?</metadata>", r"<style\b.*?</style>"):
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    attributes = f'class="plot" role="img" aria-label="{_escape(alt)}"'
    svg = re.sub(
        r'<svg\b[^>]*(viewBox="[^"]*")[^>]*>', lambda m: f"<svg {attributes} {m[1]}>", svg, count=1
    )
    # Identifiers are one name space for the whole document.
    svg = svg.replace('xlink:href="#', f'href="#{key}-').replace("url(#", f"url(#{key}-")
    svg = re.sub(r'(<[^<>]*\bid=")', rf"\g<1>{key}-", svg)
    for name, (light, _) in _COLORS.items():
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
        axis.set_major_formatter(lambda value, _: run_history.format_compact(value))
    if plot.percent:
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
    if len(plot.series) > 1:
        # Texts are set afterwards: matplotlib drops labels that begin with an underscore.
        blanks = ["x" * len(_label(series.name)) for series in plot.series]
        legend = axes.legend(handles, blanks, frameon=False)
        for text, series in zip(legend.get_texts(), plot.series, strict=True):
            text.set(text=_label(series.name), parse_math=False, color=_INK)
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
    facts = [] if pixels is None else [f"{run_history.format_count(pixels)} px"]
    facts += [] if tokens is None else [f"{run_history.format_count(tokens)} tokens"]
    return " ".join([_label(stage.name, 16), " / ".join(facts)]).strip()


def _gallery(history: run_history.RunHistory) -> str:
    # Earlier stages show where the model came from: they are there, but folded.
    stages = [stage for stage in history.stages if stage.gallery]
    return "".join(
        f"<details{' open' if stage is stages[-1] else ''}><summary>{_escape(stage.name)}</summary>"
        + "".join(_gallery_item(item) for item in stage.gallery)
        + "</details>"
        for stage in stages
    )


def _gallery_item(item: run_history.GalleryItem) -> str:
    cells = []
    for rank, image in enumerate(item.results[:5], start=1):
        verdict = "match" if image.match else "miss"
        alt = _escape(f"Rank {rank}, {verdict}: {image.caption}")
        picture = f'<img src="{image.source}" alt="{alt}">' if image.source else "no image"
        sign = "✓" if image.match else "✗"
        score = run_history.MISSING if image.score is None else f"{image.score:.3f}"
        cells.append(
            f'<li class="{verdict}"><figure><div class="frame">{picture}</div><figcaption>'
            f"<b>{sign} {score}</b> {_escape(image.caption)}</figcaption></figure></li>"
        )
    caption = f"<p>“{_escape(item.caption)}”</p>"
    return f'<div class="retrieval">{caption}<ol>{"".join(cells)}</ol></div>'


def _stage_files(history: run_history.RunHistory) -> str:
    parts = []
    for stage in history.stages:
        info = ((field.replace("_", " "), _fact(value)) for field, value in stage.info.items())
        content = _definitions("info", info)
        for name, text in (("config.gin", stage.config), ("model-info.txt", stage.model_info)):
            content += f'<h3>{name}</h3><pre tabindex="0">{_escape(text)}</pre>' if text else ""
        summary = f"<summary>{_escape(stage.name)}</summary>"
        parts.append(f"<details>{summary}{content}</details>" if content else "")
    return "".join(parts)


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return run_history.MISSING if value is None else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report of a run: the door `python -m clipa_t5x.report`.

    Args:
        argv: Arguments without the program's name; those of the process when not given.

    Returns:
        The exit status: 0, or 2 after a user's mistake, told in one line.
    """
    parser = argparse.ArgumentParser(
        "python -m clipa_t5x.report", description="Write a run report."
    )
    parser.add_argument("--model_dir", required=True, help="the MODEL_DIR of the run or schedule")
    parser.add_argument("--output", help="file to write; default: report.html in MODEL_DIR")
    arguments = parser.parse_args(argv)
    try:
        path = write_report(arguments.model_dir, arguments.output)
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
