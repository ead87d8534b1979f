"""Runs on disk as points of a sweep; what cannot be compared is refused."""

import json

import pytest
from run_files import line, schedule_of, write
from saved_runs import one_line_error

from clipa_t5x import sweep_runs

CONFIG = """from __gin__ import dynamic_registration
from clipa_t5x import models
from clipa_t5x import optimizers
from clipa_t5x import train
from clipa_t5x.data import input_pipeline
from clipa_t5x.towers import vision_transformer

RANDOM_SEED = {seed}

train.train:
    model = @models.ClipModel()
    optimizer = @optimizers.adamw()
    random_seed = %RANDOM_SEED
    train_dataset_cfg = @input_pipeline.DatasetConfig()

models.ClipModel:
    image_tower = @vision_transformer.VisionTransformer()

input_pipeline.DatasetConfig:
    split = '{split}'

optimizers.adamw:
    learning_rate = {rate}

vision_transformer.VisionTransformer:
    depth = 4
    patch_size = 8
    width = {width}
"""


def make(folder, width=64, kept=36, seed=0, accuracy=0.5, split="train", step=10, rate=0.1,
         **info):  # fmt: skip
    stage = {"image_size": 48, "num_image_tokens": 36, "num_image_tokens_kept": kept,
             "text_length": 16, "num_params": width * 1000, "completed": True, "total_steps": 10,
             "train_flops_per_example": 100, **info}  # fmt: skip
    metrics = line(step, samples=80) + line(
        step, "inference_eval/zoo", accuracy=accuracy, num_examples=1000
    )
    write(folder, metrics, **stage)
    config = CONFIG.format(seed=seed, width=width, split=split, rate=rate)
    (folder / "config.gin").write_text(config)
    return folder


def test_runs_are_found_below_a_folder(tmp_path):
    make(tmp_path / "a" / "b", kept=9, seed=3)
    make(tmp_path / "c", width=32)
    sweep = sweep_runs.load([tmp_path])
    small, large = sweep.runs
    assert (small.size.name, small.size.params) == ("32x4/8", 32000)
    assert (large.image_tokens, large.image_area, large.text_tokens) == (9, 0.25, 16)
    assert (large.seed, large.samples, large.training_flops) == (3, 80, 8000)
    assert (large.accuracy, large.examples, large.missing) == (0.5, 1000, "")
    assert (sweep.evaluator, sweep.metric) == ("zoo", "accuracy")


def test_a_schedule_is_one_run_of_its_first_stage(tmp_path):
    schedule_of(tmp_path / "run", "s1", "s2")
    make(tmp_path / "run" / "s1", kept=9, accuracy=0.1)
    make(tmp_path / "run" / "s2", kept=36, accuracy=0.7)
    (run,) = sweep_runs.load([tmp_path]).runs
    assert (run.image_tokens, run.accuracy, run.samples) == (9, 0.7, 160)


def test_incomplete_runs_say_how_far_they_are(tmp_path):
    make(tmp_path / "a", completed=False, step=4)
    make(tmp_path / "b", seed=1)
    sweep = sweep_runs.load([tmp_path])
    assert [run.missing for run in sweep.runs] == ["step 4 of 10", ""]
    assert [run.name for run in sweep.completed] == ["b"]


@pytest.mark.parametrize(
    ("first", "second", "call", "parts"),
    [
        ({}, {"split": "other"}, {}, ["different data"]),
        ({}, {}, {"metric": "recall"}, ["recall", "zoo accuracy"]),
        ({}, {}, {"evaluator": "imagenet"}, ["imagenet", "zoo accuracy"]),
        ({"accuracy": 3.5}, {}, {}, ["3.5"]),
        ({}, {"rate": 0.2}, {}, ["64x4/8", "adamw.learning_rate is 0.1 in 'a' and 0.2 in 'b'"]),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, first, second, call, parts):
    make(tmp_path / "a", **first)
    make(tmp_path / "b", **{"seed": 1, **second})
    one_line_error(lambda: sweep_runs.load([tmp_path], **call), *parts)


def test_sizes_may_have_rates_of_their_own_which_is_noted(tmp_path):
    make(tmp_path / "a", width=32, rate=0.2)
    make(tmp_path / "b", width=64)
    assert sweep_runs.load([tmp_path]).notes == (
        "Sizes differ in optimizers.adamw.learning_rate, too.",
    )


def test_a_run_is_counted_once_however_often_it_is_named(tmp_path):
    make(tmp_path / "a")
    assert len(sweep_runs.load([tmp_path, tmp_path / "a", tmp_path / "." / "a"]).runs) == 1


def test_evaluation_of_an_earlier_step_is_not_the_end(tmp_path):
    make(tmp_path / "a", step=4)
    (run,) = sweep_runs.load([tmp_path]).runs
    assert run.missing == "zoo accuracy of step 4 only"


def test_runs_not_begun_are_shown_or_noted(tmp_path):
    make(tmp_path / "a")
    begun = make(tmp_path / "set_up", seed=1, completed=False)
    (begun / "metrics.jsonl").unlink()
    schedule_of(tmp_path / "none", "s1", "s2")
    sweep = sweep_runs.load([tmp_path])
    assert {run.name: run.missing for run in sweep.runs} == {"a": "", "set_up": "not begun"}
    (note,) = sweep.notes
    assert note.startswith("none does not tell its tokens")


@pytest.mark.parametrize(
    "field", ["image_size", "text_length", "num_image_tokens_kept", "num_image_tokens"]
)
def test_impossible_tokens_leave_a_run_out(tmp_path, field):
    make(tmp_path / "a")
    make(tmp_path / "b", **{field: 0})
    make(tmp_path / "c", num_params=-3, seed=2)
    sweep = sweep_runs.load([tmp_path])
    assert sorted(run.name for run in sweep.runs) == ["a", "c"] and len(sweep.notes) == 1
    one_line_error(lambda: sweep_runs.load([tmp_path / "b"]), "no run in", "b does not tell")


def test_no_runs_are_told(tmp_path):
    one_line_error(lambda: sweep_runs.load([tmp_path]), "no run in", str(tmp_path))


def test_hostile_files_are_no_reason_to_fail(tmp_path):
    folder = make(tmp_path / "a")
    (folder / "config.gin").write_text("\x1b[2J = (\n" * 50)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text("garbage\n")
    (tmp_path / "b" / "stage.json").write_text(json.dumps({"image_size": 48, "text_length": 16}))
    names = [run.name for run in sweep_runs.load([tmp_path]).runs]
    assert sorted(names) == ["a", "b"]
