"""Sums a run's history up: one row for every stage, as values, as a table, as text.

Standard library only, as `run_history` is.
"""

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from clipa_t5x import run_history, wall_time

MISSING = "-"

# Values that say how something was measured, and not how it went.
NO_METRICS = frozenset({"samples", "num_examples", "num_images", "num_captions", "seconds"})

# More evaluations than these have a table of their own: no line holds the 38 of clip_benchmark.
_MOST_EVALUATIONS_IN_LINE = 4


def summary_rows(history: run_history.RunHistory) -> list[dict[str, Any]]:
    """Sums up every stage in one row of plain values; None where the run does not tell.

    Args:
        history: What `load` returned.

    Returns:
        For every stage: `stage` (name), `step` and `total_steps`, `completed` (bool or None),
        `pixels` (side of the square image), `tokens_kept` and `tokens` (image tokens),
        `text_tokens`, `samples` (seen in the stage), `images_per_second` (median over train
        records but the first, which contains the compilation), `zero_shot` (evaluator name to its
        last top-1 accuracy in 0..1, or None), `seconds` (of training steps: without compilation,
        evaluations and what a restart cost).
    """
    evaluators = history.group_names(run_history.INFERENCE_EVAL, "accuracy")
    return [_summary_row(stage, evaluators) for stage in history.stages]


def final_values(history: run_history.RunHistory) -> dict[tuple[str, str], float]:
    """Returns (group, metric) to the last value that a run logged, in order of appearance."""
    found: dict[tuple[str, str], float] = {}
    for stage in history.stages:
        for group, records in stage.records.items():
            for record in records:
                found |= {(group, name): value for name, value in record.values.items()}
    return {key: value for key, value in found.items() if key[1] not in NO_METRICS}


def _summary_row(stage: run_history.Stage, evaluators: Sequence[str]) -> dict[str, Any]:
    records = stage.points(run_history.TRAIN_GROUP, "samples_per_second")
    speeds = [speed for _, speed in records[1:] if math.isfinite(speed)]
    accuracies = {
        name: stage.points(run_history.INFERENCE_EVAL + name, "accuracy") for name in evaluators
    }
    completed = stage.info.get("completed")
    return {
        "stage": stage.name,
        "step": stage.last_step,
        "total_steps": stage.number("total_steps"),
        "completed": completed if isinstance(completed, bool) else None,
        "pixels": stage.number("image_size"),
        "tokens_kept": stage.number("num_image_tokens_kept"),
        "tokens": stage.number("num_image_tokens"),
        "text_tokens": stage.number("text_length"),
        "samples": None if stage.last_step is None else stage.samples_at(stage.last_step),
        "images_per_second": statistics.median(speeds) if speeds else None,
        "zero_shot": {name: p[-1][1] if p else None for name, p in accuracies.items()},
        "seconds": _training_seconds(stage),
    }


def _training_seconds(stage: run_history.Stage) -> float | None:
    """Sums samples / speed over the train records; None where one of them does not tell."""
    speeds = dict(stage.points(run_history.TRAIN_GROUP, "samples_per_second"))
    total = before = 0.0
    for step, samples in stage.points(run_history.TRAIN_GROUP, "samples"):
        speed = speeds.get(step, 0.0)
        if not (math.isfinite(samples) and math.isfinite(speed) and speed > 0):
            return None
        total, before = total + (samples - before) / speed, samples
    return total or None


def in_line(evaluators: Collection[str]) -> bool:
    """Whether so many evaluations fit into a line about a run, each with its accuracy."""
    return len(evaluators) <= _MOST_EVALUATIONS_IN_LINE


def evaluation_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Top-1 accuracies as text cells, a row for every evaluation and a column for every stage.

    Empty where there are so few that they are in `table_cells`.
    """
    evaluators = list(rows[0]["zero_shot"]) if rows else []
    if in_line(evaluators):
        return []
    cells = [["zero-shot top-1", *(row["stage"] for row in rows)]]
    cells += [
        [name, *(format_percent(row["zero_shot"][name]) for row in rows)] for name in evaluators
    ]
    return cells


def table_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Formats rows of `summary_rows` as text cells; the first row holds the headings."""
    evaluators = list(rows[0]["zero_shot"]) if rows else []
    evaluators = evaluators if in_line(evaluators) else []
    fixed = ["stage", "pixels", "image tokens", "text tokens", "samples", "images/s"]
    cells = [[*fixed, *(f"top-1 {name}" for name in evaluators), "training time"]]
    for row in rows:
        tokens = [format_count(row["tokens_kept"]), format_count(row["tokens"])]
        cells.append(
            [
                _stage_cell(row),
                format_count(row["pixels"]),
                MISSING if tokens == [MISSING, MISSING] else " of ".join(tokens),
                format_count(row["text_tokens"]),
                format_count(row["samples"]),
                format_count(row["images_per_second"]),
                *(format_percent(row["zero_shot"][name]) for name in evaluators),
                format_duration(row["seconds"]),
            ]
        )
    return cells


def format_progress(step: int, total: float | None) -> str:
    """How far a run is: 'step 20 of 300'."""
    return f"step {step:,} of {format_count(total)}"


def _stage_cell(row: Mapping[str, Any]) -> str:
    if row["step"] is None:
        return f"{row['stage']} (not begun)"
    if row["completed"] is False:
        return f"{row['stage']} ({format_progress(row['step'], row['total_steps'])})"
    return row["stage"]


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lays rows of `summary_rows` out as plain-text tables, without a final newline."""
    tables = [table_cells(rows), evaluation_cells(rows)]
    return "\n\n".join(format_cells(cells) for cells in tables if cells)


def format_cells(table: Sequence[Sequence[str]]) -> str:
    """Lays cells out as a plain-text table, the first row being headings; no final newline."""
    # Names come from files: a line break or an escape sequence must not reach the terminal.
    cells = [[_printable(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def format_goodput(summary: wall_time.Summary) -> str:
    """Says where a run's time went: 'goodput 91.3% of 2 h 3 min (...); 2 restarts, 4 min lost'."""
    text = f"goodput {format_percent(summary.goodput)} of {format_duration(summary.running)}"
    shares = [
        f"{wall_time.title(name)} {format_percent(summary.seconds[name] / summary.running)}"
        for name in wall_time.CATEGORIES[1:]
        if summary.running and summary.seconds[name] / summary.running >= 0.0005
    ]
    text += f" ({', '.join(shares)})" if shares else ""
    return f"{text}; {format_restarts(summary)}"


def format_restarts(summary: wall_time.Summary) -> str:
    """Says what interruptions cost: '2 restarts, 1 rewind, 4 min lost, down for 10 min'."""
    lost, down = summary.seconds["lost"], summary.seconds[wall_time.DOWN]
    parts = [_counted(summary.restarts, "restart")]
    parts += [_counted(summary.rewinds, "rewind")] if summary.rewinds else []
    parts += [f"{format_duration(lost)} lost"] if lost >= 0.05 else []
    parts += [f"down for {format_duration(down)}"] if down >= 0.05 else []
    return ", ".join(parts)


def _counted(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def format_count(value: float | None) -> str:
    """Formats a count: digits in groups up to ten million, then three figures and a unit."""
    if value is None:
        return MISSING
    if not math.isfinite(value) or abs(value) >= 1e7:
        return format_compact(value)
    if 0 < abs(value) < 10 and value != round(value):
        return f"{value:.1f}"
    return f"{value:,.0f}"


def format_compact(value: float) -> str:
    """Formats a number in at most three figures and a unit: 950, 12.8k, 400M, 12.8B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # Half a last figure below the unit already rounds up to it: 999.9k is 1M.
        if abs(value) >= size * 0.9995 and math.isfinite(value):
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def format_percent(value: float | None) -> str:
    """Formats a fraction in 0..1 as a percentage with one decimal."""
    return MISSING if value is None else f"{value:.1%}"


def format_duration(seconds: float | None) -> str:
    """Formats seconds by their two largest units: 8.2 s, 3 min 20 s, 5 h 2 min, 3 d 4 h."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (unit, size), (lower, lower_size) in itertools.pairwise(units):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // lower_size} {lower}"
    return f"{whole} s"
