"""What pages about runs share: one self-contained HTML file, its style, and its pieces.

A page fetches nothing: styles are inline, plots are inline SVG, images are data URIs. All that
comes from a run is escaped, as names and captions are written by strangers.
"""

import datetime
import html
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from clipa_t5x import errors, report_plots, run_history, run_summary, run_tables

# HTML allows for no control characters but these three of white space, and UTF-8 for no surrogate.
_UNSHOWABLE = re.compile(r"[^\t\n\r -~\u00a0-\ud7ff\ue000-\U0010ffff]")

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
.words th, .words td { text-align: left; white-space: normal; }
.words td:nth-child(n+2):not(:last-child) { white-space: nowrap; }
.scroll { max-height: 34rem; overflow: auto; }
.run-0 { color: var(--series-1); }
.run-1 { color: var(--series-2); }
.plots { display: grid; gap: 1.5rem 2rem; margin-bottom: 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
figure, dd { margin: 0; min-width: 0; }
strong { color: var(--ink); font-size: .95rem; margin-right: .4rem; }
.plot { display: block; width: 100%; height: auto; }
.plot * { stroke-linejoin: round; stroke-linecap: butt; }
.key { display: inline-block; width: 1.5em; height: .5em; margin-right: .3em; }
.end { white-space: nowrap; }
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


def document(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """Returns a whole HTML document.

    Args:
        title: plain text.
        subtitle: HTML.
        parts: HTML; empty ones are left out.
    """
    # The policy makes the browser itself refuse whatever an escape might have let through.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    name = escape(title)
    style = report_plots.color_style() + report_plots.SWITCH_STYLE + _CSS
    lines = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">',
        f"<title>{name} - run report</title>\n<style>{style}</style>\n</head>\n<body>",
        f"<header><h1>{name}</h1><p>{subtitle}</p></header>\n<main>",
        *parts,
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(line for line in lines if line)


def write(
    path: str | os.PathLike[str], text: str, what: str = "the report to ", flag: str = "--output"
) -> pathlib.Path:
    """Writes a page, all at once or not at all.

    Args:
        path: Of the file.
        text: HTML.
        what: Of an error: what cannot be written.
        flag: Of an error: which option names the file.

    Raises:
        errors.UserError: the file cannot be written.
    """
    path = pathlib.Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise errors.UserError(
            f"cannot write {what}'{path}' ({error.strerror}): name a file in a directory that you "
            f"can write, by {flag}"
        ) from error
    return path


def escape(text: Any) -> str:
    """Text as HTML, within elements and attributes alike; no control characters, no surrogates."""
    return html.escape(_UNSHOWABLE.sub("\ufffd", str(text)), quote=True)


def section(key: str, heading: str, content: str) -> str:
    """A section under a heading; '' where it has no content. `heading` and `content` are HTML."""
    heading = f'<h2 id="{key}">{heading}</h2>'
    return f'<section aria-labelledby="{key}">{heading}{content}</section>' if content else ""


def details(summary: str, content: str, is_open: bool = False) -> str:
    """Folded HTML under a plain text; '' where there is none."""
    opened = " open" if is_open else ""
    return (
        f"<details{opened}><summary>{escape(summary)}</summary>{content}</details>"
        if content
        else ""
    )


def definitions(kind: str, facts: Iterable[tuple[str, str]]) -> str:
    """A list of plain (term, text), of a class of the style sheet; '' where there are none."""
    items = "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>" for term, text in facts
    )
    return f'<dl class="{kind}">{items}</dl>' if items else ""


def table(cells: Sequence[Sequence[str]], label: str, note: str = "", kind: str = "") -> str:
    """A table of plain text, which scrolls by itself where the page is narrow.

    Args:
        cells: the first row holds headings, and so does the first column.
        label: identifier of the heading that names it.
        note: its caption, plain.
        kind: a class of the style sheet: 'words' where cells are text and not numbers.
    """
    header, *body = cells
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in body
    )
    caption = f"<caption>{escape(note)}</caption>" if note else ""
    name = f' class="{kind}"' if kind else ""
    return (
        f'<div style="overflow-x: auto" role="region" aria-labelledby="{label}" tabindex="0">'
        f"<table{name}>{caption}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def period(history: run_history.RunHistory) -> str:
    """'2026-01-01 10:00 to 2026-01-02 11:00 UTC', from the first record to the last; or ''."""
    groups = [records for stage in history.stages for records in stage.records.values()]
    times = [record.time for records in groups for record in records if 0 < record.time < 1e11]
    if not times:
        return ""
    ends = (datetime.datetime.fromtimestamp(end, datetime.UTC) for end in (min(times), max(times)))
    return " to ".join(f"{end:%Y-%m-%d %H:%M}" for end in ends) + " UTC"


def problems(history: run_history.RunHistory) -> list[str]:
    """A note for everything of a run that could not be read."""
    texts = (f"{stage.name}: {text}." for stage in history.stages for text in stage.problems)
    return [f'<p class="note">{escape(text)}</p>' for text in texts]


def sharding(table_of: run_tables.Sharding, label: str) -> str:
    """How every parameter lies on the devices, with the greatest share of a device first."""
    rows = sorted(table_of.parameters, key=lambda row: -row.bytes_per_device)
    cells = [["parameter", "shape", "dtype", "sharding", "bytes per device"]]
    cells += [
        [
            *(report_plots.label(x, 200) for x in (row.name, row.shape, row.dtype, row.sharding)),
            f"{row.bytes_per_device:,}",
        ]
        for row in rows
    ]
    total = sum(row.bytes_per_device for row in rows)
    mesh = report_plots.label(table_of.mesh, 200) or run_summary.MISSING
    note = f"Mesh: {mesh}. All parameters: {total:,} bytes per device."
    return f'<div class="scroll">{table(cells, label, note, "words")}</div>'


def confusion(found: run_tables.Confusion, label: str) -> str:
    """The worst classes of an evaluation: their accuracy as a bar, and what they are taken for."""
    cells = [["class", "correct", "examples", "taken for"]]
    for row in found.worst:
        others = ", ".join(
            f"{report_plots.label(name, 60)} ({count:,})" for name, count in row.confused_with
        )
        share = run_summary.format_percent(row.correct / row.examples)
        name = report_plots.label(row.name, 60)
        cells.append([name, share, f"{row.examples:,}", others or run_summary.MISSING])
    facts = [
        f"The worst {len(found.worst)} class{'es' * (len(found.worst) != 1)}",
        "" if found.num_classes is None else f"of {found.num_classes:,}",
        "" if found.num_examples is None else f"on {found.num_examples:,} examples",
    ]
    overall = "" if found.accuracy is None else f"; {found.accuracy:.1%} of all are correct"
    note = " ".join(fact for fact in facts if fact) + f"{overall}. In brackets: examples."
    return table(cells, label, note, "words")
