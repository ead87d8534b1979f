"""Draws what a run did: one self-contained HTML file with figures, plots and a retrieval gallery.

    python -m clipa_t5x.report --model_dir=RUN [--output=FILE]

RUN is the model directory of a run or of a schedule of runs (`run_history` says what it reads).
`report_page` says what such a file may hold.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from clipa_t5x import (
    errors,
    goodput_plot,
    report_page,
    report_plots,
    run_history,
    run_summary,
)


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
    return report_page.write(output or pathlib.Path(model_dir) / "report.html", text)


def render(history: run_history.RunHistory) -> str:
    """Returns the whole HTML document; equal histories give equal documents.

    Raises:
        errors.UserError: matplotlib is missing.
    """
    rows = run_summary.summary_rows(history)
    section, when = report_page.section, report_page.period(history)
    curves = report_plots.curves([history])
    parts = [
        _facts(history, rows),
        *report_page.problems(history),
        section("summary", "Summary", _table(rows)),
        section("time", "Where the time went", goodput_plot.figure([history])),
        section("curves", f"Over {' or '.join(history.axes)}", curves),
        section("confusion", "Classes that are confused most", _confusions(history)),
        section("gallery", "Test captions and the images nearest to them", _gallery(history)),
        section("sharding", "Sharding of the parameters", _shardings(history)),
        section("stages", "Configuration and parameters", _stage_files(history)),
    ]
    subtitle = "Run report" + (f", {when}" if when else "")
    return report_page.document(history.name, subtitle, parts)


def _facts(history: run_history.RunHistory, rows: list[dict[str, Any]]) -> str:
    axis = history.axes[0]
    losses = [y for part in history.curve(run_history.TRAIN_GROUP, "loss", axis) for _, y in part]
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    newest = next((stage for stage in reversed(history.stages) if stage.info), history.stages[-1])
    parameters = newest.number("num_params")
    facts = []
    evaluators = history.group_names(run_history.INFERENCE_EVAL, "accuracy")
    for name in evaluators if run_summary.in_line(evaluators) else ():
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
    return report_page.definitions("facts", [(term, text) for term, text in facts if text])


def _table(rows: list[dict[str, Any]]) -> str:
    note = "Images/s is the median over the log, without its first record."
    if rows and rows[0]["zero_shot"]:
        note += " Top-1 is zero-shot accuracy at the stage's last evaluation."
    text = report_page.table(run_summary.table_cells(rows), "summary", note)
    if cells := run_summary.evaluation_cells(rows):
        names = [[report_plots.label(line[0], 60), *line[1:]] for line in cells]
        text += f'<div class="scroll">{report_page.table(names, "summary")}</div>'
    return text


def _confusions(history: run_history.RunHistory) -> str:
    # As with the gallery, the last stage that has any is shown, and earlier ones are folded.
    stages = [stage for stage in history.stages if stage.confusions]
    return "".join(
        report_page.details(
            f"{stage.name}: {report_plots.label(each.name)}",
            report_page.confusion(each, "confusion"),
            is_open=stage is stages[-1],
        )
        for stage in stages
        for each in stage.confusions
    )


def _shardings(history: run_history.RunHistory) -> str:
    return "".join(
        report_page.details(stage.name, report_page.sharding(stage.sharding, "sharding"))
        for stage in history.stages
        if stage.sharding
    )


def _gallery(history: run_history.RunHistory) -> str:
    # Earlier stages show where the model came from: they are there, but folded.
    stages = [stage for stage in history.stages if stage.gallery]
    return "".join(
        report_page.details(
            stage.name, "".join(map(_gallery_item, stage.gallery)), is_open=stage is stages[-1]
        )
        for stage in stages
    )


def _gallery_item(item: run_history.GalleryItem) -> str:
    cells = []
    for rank, image in enumerate(item.results[:5], start=1):
        verdict = "match" if image.match else "miss"
        alt = report_page.escape(f"Rank {rank}, {verdict}: {image.caption}")
        picture = f'<img src="{image.source}" alt="{alt}">' if image.source else "no image"
        sign = "✓" if image.match else "✗"
        score = run_summary.MISSING if image.score is None else f"{image.score:.3f}"
        cells.append(
            f'<li class="{verdict}"><figure><div class="frame">{picture}</div><figcaption>'
            f"<b>{sign} {score}</b> {report_page.escape(image.caption)}</figcaption></figure></li>"
        )
    caption = f"<p>“{report_page.escape(item.caption)}”</p>"
    return f'<div class="retrieval">{caption}<ol>{"".join(cells)}</ol></div>'


def _stage_files(history: run_history.RunHistory) -> str:
    parts = []
    for stage in history.stages:
        info = ((field.replace("_", " "), _fact(value)) for field, value in stage.info.items())
        content = report_page.definitions("info", info)
        for name, text in (("config.gin", stage.config), ("model-info.txt", stage.model_info)):
            content += (
                f'<h3>{name}</h3><pre tabindex="0">{report_page.escape(text)}</pre>' if text else ""
            )
        parts.append(report_page.details(stage.name, content))
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
