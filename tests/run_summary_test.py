"""Summaries say what the records say, and dashes where they say nothing."""

import math

import pytest
from run_files import line, schedule_of, write

from clipa_t5x import run_history, run_summary, wall_time


def test_summary_of_a_run(tmp_path):
    speeds = [5, 100, 400, 200, 200]
    metrics = "".join(
        line(10 * i, samples=640 * i, samples_per_second=speed) for i, speed in enumerate(speeds, 1)
    )
    metrics += line(30, "inference_eval/x", accuracy=0.25, num_examples=8)
    metrics += line(50, "inference_eval/x", accuracy=0.5, num_examples=8)
    metrics += line(50, "inference_eval/other", recall=1)
    info = {"image_size": 32, "num_image_tokens": 16, "num_image_tokens_kept": 8}
    info |= {"text_length": 8, "total_steps": 60, "completed": False}
    history = run_history.load(write(tmp_path / "low", metrics, **info))
    assert run_summary.summary_rows(history) == [
        {
            "stage": "low",
            "step": 50,
            "total_steps": 60,
            "completed": False,
            "pixels": 32,
            "tokens_kept": 8,
            "tokens": 16,
            "text_tokens": 8,
            "samples": 3200,
            "images_per_second": 200,
            "zero_shot": {"x": 0.5},
            "seconds": 128 + 6.4 + 1.6 + 3.2 + 3.2,
        }
    ]
    header, rule, row = run_summary.format_table(run_summary.summary_rows(history)).split("\n")
    assert header.split("  ")[0] == "stage" and set(rule) == {"-", " "}
    assert row.startswith("low (step 50 of 60)  ")
    assert " ".join(row.split()[5:]) == "32 8 of 16 8 3,200 200 50.0% 2 min 22 s"


def test_training_time_is_unknown_where_a_speed_is(tmp_path):
    metrics = "".join(
        line(step, samples=64 * step, samples_per_second=speed)
        for step, speed in ((1, 10.0), (2, math.nan), (3, 10.0))
    )
    history = run_history.load(write(tmp_path, metrics))
    (row,) = run_summary.summary_rows(history)
    assert row["seconds"] is None and row["images_per_second"] == 10


def test_first_record_alone_tells_no_speed(tmp_path):
    history = run_history.load(write(tmp_path, line(1, samples_per_second=3)))
    assert run_summary.summary_rows(history)[0]["images_per_second"] is None


@pytest.mark.parametrize("info", ["", "{", "[]", "3", '{"image_size": "32", "completed": "yes"}'])
def test_missing_and_mistaken_fields_show_dashes(tmp_path, info):
    write(tmp_path, line(1, loss=1))
    (tmp_path / "stage.json").write_text(info)
    row = run_summary.table_cells(run_summary.summary_rows(run_history.load(tmp_path)))[1]
    assert row == [tmp_path.name, *["-"] * 6]


def test_table_covers_evaluators_of_any_stage(tmp_path):
    schedule_of(tmp_path, "a", "b")
    write(tmp_path / "a", line(1, "inference_eval/x", accuracy=0.1))
    write(tmp_path / "b", line(1, "inference_eval/y\x1b[2J", accuracy=1.0))
    rows = run_summary.summary_rows(run_history.load(tmp_path))
    assert [list(row["zero_shot"].values()) for row in rows] == [[0.1, None], [None, 1.0]]
    table = run_summary.format_table(rows)
    assert "\x1b" not in table and len({len(text) for text in table.split("\n")}) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (8.24, "8.2 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s")]
    + [(3600, "1 h 0 min"), (90000, "1 d 1 h"), (0, "0.0 s")],
)
def test_durations(seconds, text):
    assert run_summary.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "full", "compact"),
    [(0, "0", "0"), (999.9, "1,000", "1k"), (64000, "64,000", "64k"), (12.8e9, "12.8B", "12.8B")]
    + [
        (2.55, "2.5", "2.55"),
        (1e7, "10M", "10M"),
        (math.nan, "nan", "nan"),
        (5e-4, "0.0", "0.0005"),
    ],
)
def test_counts(value, full, compact):
    assert run_summary.format_count(value) == full
    assert run_summary.format_compact(value) == compact


def test_where_the_time_went_in_a_line():
    seconds = dict.fromkeys((*wall_time.CATEGORIES, wall_time.DOWN), 0.0)
    assert (
        run_summary.format_goodput(wall_time.Summary(seconds))
        == "goodput 0.0% of 0.0 s; no restarts"
    )
    seconds |= {
        "step": 6843,
        "data_wait": 150,
        "compile": 2.0,
        "lost": 240,
        "init": 268,
        "down": 60,
    }
    told = run_summary.format_goodput(wall_time.Summary(seconds, restarts=2, rewinds=1))
    assert told == (
        "goodput 91.2% of 2 h 5 min (data wait 2.0%, init 3.6%, lost 3.2%); "
        "2 restarts, 1 rewind, 4 min 0 s lost, down for 1 min 0 s"
    )
