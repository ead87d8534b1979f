"""Killed at any moment, a run comes to the same end, bit for bit."""

import random

import experiments
import numpy as np
import pytest
from chaos import killing

PERIOD = 4


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return experiments.digits_dir(str(tmp_path_factory.mktemp("workspace")))


@pytest.fixture(scope="module")
def make_run(workspace, tmp_path_factory):
    """Returns a function that makes a run of a few steps, in its own folder."""

    def make(num_processes=1, steps=32, evaluated=False):
        model_dir = tmp_path_factory.mktemp("runs") / "run"
        macros = {
            "TRAIN_STEPS": steps, "CHECKPOINT_PERIOD": PERIOD, "LOG_PERIOD": 1,
            "EVAL_PERIOD": steps // 2, "IMAGE_MASK_RATIO": 0.5, "MODEL_DIR": str(model_dir),
        }  # fmt: skip
        sizes = experiments.MINIATURE if evaluated else experiments.UNEVALUATED
        bindings = [*sizes, *(f"{k} = {v!r}" for k, v in macros.items())]
        command = experiments.command(
            "train",
            f"--gin_file={experiments.GIN}/digits_stage1.gin",
            "--peer_timeout_seconds=15",
            "--join_timeout_seconds=30",
            *(f"--gin_bindings={binding}" for binding in bindings),
        )
        return killing.Run(command, model_dir, workspace, num_processes, optimized=False)

    return make


def assert_same_end(run, whole, steps):
    ends = [experiments.saved_state(each.model_dir, steps) for each in (run, whole)]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        np.testing.assert_array_equal(value, ends[1][name], err_msg=name)


def test_a_run_that_is_killed_and_stopped_comes_to_the_same_end(make_run):
    """In a save, and by a request in a step, which loses nothing."""
    whole, run, rng = make_run(), make_run(), random.Random(0)
    whole.finish()
    kill = run.kill("save", rng, within=0.1)
    assert kill is not None and kill.statuses == (-9,)
    kill = run.kill("step", rng, with_signal="SIGTERM", within=0.1)
    assert kill is not None and kill.statuses == (75,) and kill.redone == 0
    run.finish()
    assert_same_end(run, whole, 32)


@pytest.mark.slow
def test_the_survivor_of_two_processes_ends_and_the_run_goes_on(make_run):
    whole, run, rng = make_run(2, 40, True), make_run(2, 40, True), random.Random(0)
    whole.finish()
    for moment in ("start", "step", "save", "evaluation"):
        kill = run.kill(moment, rng, timeout=60)
        if kill is None:
            break
        assert sorted(kill.statuses)[0] == -9 and set(kill.statuses) - {-9} <= {75, -6, 134}
        assert kill.seconds < 60
    else:
        run.finish()
    assert_same_end(run, whole, 40)
