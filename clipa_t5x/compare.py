"""Puts two runs side by side: one self-contained HTML file, and a short table on the console.

    python -m clipa_t5x.compare A B [--output=compare.html]

A and B are model directories of runs or of schedules of runs, as `report` takes them. Stages are
compared in their order, whatever their names.
"""

import argparse
import difflib
import itertools
import math
import os
import sys
from collections.abc import Sequence

from clipa_t5x import (
    errors,
    goodput_plot,
    recipe_changes,
    report_page,
    report_plots,
    run_history,
    run_summary,
    wall_time,
)

NAMES = ("A", "B")

_Pair = tuple[run_history.RunHistory, run_history.RunHistory]


def load(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> _Pair:
    """Reads both runs.

    Raises:
        errors.UserError: one of them cannot be read, see `run_history.load`.
    """
    return run_history.load(first), run_history.load(second)


def render(histories: _Pair) -> str:
    """Returns the whole HTML document; equal histories give equal documents.

    Raises:
        errors.UserError: matplotlib is missing.
    """
    section = report_page.section
    axes = run_history.common_axes(histories)
    parts = [
        _legend(histories),
        *(note for history in histories for note in report_page.problems(history)),
        section("results", "Results", report_page.table(result_cells(histories), "results")),
        section("summary", "Stages", _stages(histories)),
        section("recipe", "What the recipes differ in", _recipes(histories)),
        section("time", "Where the time went", goodput_plot.figure(histories, NAMES)),
        section("curves", f"Over {' or '.join(axes)}", report_plots.curves(histories, NAMES)),
    ]
    title = " and ".join(history.name for history in histories)
    return report_page.document(title, "Two runs side by side", parts)


def _legend(histories: _Pair) -> str:
    lines = []
    for run, (name, history) in enumerate(zip(NAMES, histories, strict=True)):
        when = report_page.period(history)
        text = f"{history.name} ({len(history.stages)} stage{'s' * (len(history.stages) != 1)})"
        text += f", {when}" if when else ""
        lines.append(f'<p><b class="run-{run}">{name}</b> {report_page.escape(text)}</p>')
    return "".join(lines)


def result_cells(histories: _Pair) -> list[list[str]]:
    """Final metrics and totals of both runs as text: name, A, B, difference; headings first."""
    finals = [run_summary.final_values(history) for history in histories]
    keys = sorted(dict.fromkeys([*finals[0], *finals[1]]), key=lambda key: _order(key[0]))
    rows = [["last value or total", *NAMES, "B - A"]]
    for key in keys:
        values = [final.get(key) for final in finals]
        difference = _difference(*values)
        shown = [run_summary.MISSING if x is None else f"{x:.4g}" for x in values]
        text = run_summary.MISSING if difference is None else f"{difference:+.3g}"
        rows.append([_title(*key), *shown, text])
    return rows + _totals(histories)


def _order(group: str) -> int:
    """What a run is for comes first, and what its training was like last."""
    kinds = (run_history.INFERENCE_EVAL, run_history.TRAINING_EVAL, run_history.TRAIN_GROUP)
    return next((i for i, kind in enumerate(kinds) if group.startswith(kind)), len(kinds))


def _title(group: str, metric: str) -> str:
    group = group.removeprefix(run_history.INFERENCE_EVAL)
    group = group.replace(run_history.TRAINING_EVAL, "eval ")
    return report_plots.label(f"{group} {metric.replace('_', ' ')}", 80)


def _difference(first: float | None, second: float | None) -> float | None:
    if first is None or second is None:
        return None
    difference = second - first
    return difference if math.isfinite(difference) else None


def _totals(histories: _Pair) -> list[list[str]]:
    rows = []
    for axis in run_history.common_axes(histories):
        totals = [history.spans(axis)[-1][1] for history in histories]
        is_flops = axis == run_history.FLOPS
        show = report_plots.format_flops if is_flops else run_summary.format_count
        rows.append([axis, *map(show, totals), _relative(*totals)])
    seconds = [_training_seconds(history) for history in histories]
    if any(x is not None for x in seconds):
        shown = map(run_summary.format_duration, seconds)
        rows.append(["training time", *shown, _relative(*seconds)])
    goodputs = [_goodput(history) for history in histories]
    if any(x is not None for x in goodputs):
        difference = _difference(*goodputs)
        text = run_summary.MISSING if difference is None else f"{difference * 100:+.1f} points"
        rows.append(["goodput", *map(run_summary.format_percent, goodputs), text])
    return rows


def _training_seconds(history: run_history.RunHistory) -> float | None:
    """Of all stages that have begun; None where one of them does not tell."""
    rows = [row for row in run_summary.summary_rows(history) if row["step"] is not None]
    seconds = [row["seconds"] for row in rows]
    return sum(seconds) if seconds and None not in seconds else None


def _goodput(history: run_history.RunHistory) -> float | None:
    spent = [stage.time_spent for stage in history.stages if stage.time_spent]
    return wall_time.total(spent).goodput if spent else None


def _relative(first: float | None, second: float | None) -> str:
    if not first or second is None or not math.isfinite(second / first):
        return run_summary.MISSING
    return f"{second / first - 1:+.1%}"


def _stages(histories: _Pair) -> str:
    # One table, so that both have the same columns.
    header: list[str] = []
    body: list[list[str]] = []
    names = [history.group_names(run_history.INFERENCE_EVAL, "accuracy") for history in histories]
    evaluators = dict.fromkeys(names[0] + names[1])
    for name, history in zip(NAMES, histories, strict=True):
        rows = run_summary.summary_rows(history)
        for row in rows:
            row["zero_shot"] = {each: row["zero_shot"].get(each) for each in evaluators}
        header, *lines = run_summary.table_cells(rows)
        body += [[f"{name} {line[0]}", *line[1:]] for line in lines]
    return report_page.table([header, *body], "summary")


def _recipes(histories: _Pair) -> str:
    stages = itertools.zip_longest(*(history.stages for history in histories))
    return "".join(_recipe(*pair) for pair in stages)


def _recipe(first: run_history.Stage | None, second: run_history.Stage | None) -> str:
    """What two stages would train differently, and below it all that their files differ in."""
    title = f"{first.name if first else 'no stage'} / {second.name if second else 'no stage'}"
    lacking = [
        f"{name} has no {'stage here' if stage is None else run_history.CONFIG_FILE}"
        for name, stage in zip(NAMES, (first, second), strict=True)
        if stage is None or not stage.config
    ]
    if first is None or second is None or lacking:
        content = f"<p>{report_page.escape(', '.join(lacking))}.</p>"
        return report_page.details(title, content, is_open=True)
    changes = recipe_changes.changes(first.config, second.config)
    cells = [["parameter", *NAMES]]
    cells += [[name, *(_value(x) for x in values)] for name, *values in changes]
    content = (
        report_page.table(cells, "recipe", kind="words")
        if changes
        else "<p>Both would train the same.</p>"
    )
    files = (f"{name}/{run_history.CONFIG_FILE}" for name in NAMES)
    lines = difflib.unified_diff(
        first.config.splitlines(), second.config.splitlines(), *files, lineterm="", n=1
    )
    text = "\n".join(lines)
    whole = f'<pre tabindex="0">{report_page.escape(text)}</pre>' if text else ""
    content += report_page.details(f"All that {run_history.CONFIG_FILE} differs in", whole)
    return report_page.details(title, content, is_open=True)


def _value(text: str | None) -> str:
    return run_summary.MISSING if text is None else text


def main(argv: Sequence[str] | None = None) -> int:
    """Compares two runs: the door `python -m clipa_t5x.compare`.

    Args:
        argv: Arguments without the program's name; those of the process when not given.

    Returns:
        The exit status: 0, or 2 after a user's mistake, told in one line.
    """
    parser = argparse.ArgumentParser("clipa_t5x compare", description="Compare two runs.")
    parser.add_argument("A", help="the MODEL_DIR of a run or schedule")
    parser.add_argument("B", help="that of another")
    parser.add_argument("--output", default="compare.html", help="file to write; default here")
    arguments = parser.parse_args(argv)
    try:
        histories = load(arguments.A, arguments.B)
        path = report_page.write(arguments.output, render(histories))
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(run_summary.format_cells(result_cells(histories)))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
