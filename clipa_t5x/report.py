"""Draws what a run did: one self-contained HTML file with figures, plots and a retrieval gallery.

    python -m clipa_t5x.report --model_dir=RUN [--output=FILE]

RUN is the model directory of a run or of a schedule of runs (`run_history` says what it reads).
The file fetches nothing: styles are inline, plots are inline SVG, images are data URIs. All that
comes from the run is escaped, as captions are written by strangers.
"""

import argparse
import datetime
import html
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from clipa_t5x import errors, goodput_plot, report_plots, run_history, run_summary

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
    rows = run_summary.summary_rows(history)
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
        _section("time", "Where the time went", goodput_plot.figure(history)),
        _section("curves", f"Over {' or '.join(history.axes)}", report_plots.curves([history])),
        _section("gallery", "Test captions and the images nearest to them", _gallery(history)),
        _section("stages", "Configuration and parameters", _stage_files(history)),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _section(key: str, heading: str, content: str) -> str:
    heading = f'<h2 id="{key}">{heading}</h2>'
    return f'<section aria-labelledby="{key}">{heading}{content}</section>' if content else ""


def _style() -> str:
    return report_plots.color_style() + report_plots.SWITCH_STYLE + _CSS


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
    axis = history.axes[0]
    losses = [y for part in history.curve(run_history.TRAIN_GROUP, "loss", axis) for _, y in part]
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    newest = next((stage for stage in reversed(history.stages) if stage.info), history.stages[-1])
    parameters = newest.number("num_params")
    facts = []
    for name in history.group_names(run_history.INFERENCE_EVAL, "accuracy"):
        last = [row["zero_shot"][name] for row in rows if row["zero_shot"][name] is not None][-1]
        facts.append((f"Zero-shot top-1, {name}", run_summary.format_percent(last)))
    facts.append(("Train loss", f"{losses[-1]:.4g}" if losses else None))
    for each in history.axes:
        total = history.spans(each)[-1][1]
        show = report_plots.format_flops if each == run_history.FLOPS else run_summary.format_count
        facts.append((each[:1].upper() + each[1:], show(total)))
    facts.append(("Training time", run_summary.format_duration(sum(seconds)) if seconds else None))
    facts.append(("Parameters", parameters and run_summary.format_compact(parameters)))
    facts.append(("Devices", newest.text("devices")))
    return _definitions("facts", [(term, text) for term, text in facts if text])


def _definitions(kind: str, facts: Iterable[tuple[str, str]]) -> str:
    items = "".join(
        f"<div><dt>{_escape(term)}</dt><dd>{_escape(text)}</dd></div>" for term, text in facts
    )
    return f'<dl class="{kind}">{items}</dl>' if items else ""


def _table(rows: list[dict[str, Any]]) -> str:
    header, *body = run_summary.table_cells(rows)
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
        score = run_summary.MISSING if image.score is None else f"{image.score:.3f}"
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
    return run_summary.MISSING if value is None else str(value)


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
