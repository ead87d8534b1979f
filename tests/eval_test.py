import contextlib
import json
import logging
import pathlib
import signal
import subprocess
import time

import experiments
import jax
import numpy as np
import pytest

from clipa_t5x import eval as eval_lib
from clipa_t5x import (
    evaluation_records,
    evaluation_watch,
    gin_utils,
    preemption,
    run_history,
    stage_handover,
)
from clipa_t5x.errors import UserError

SOON = evaluation_watch.Patience(poll_seconds=0.05)


def test_a_checkpoint_is_evaluated_as_in_training(tmp_path, monkeypatch):
    monkeypatch.chdir(experiments.digits_dir(str(tmp_path)))
    run = str(tmp_path / "run")
    experiments.train("digits_stage1", *experiments.MINIATURE, f"MODEL_DIR = {run!r}",
                      "TRAIN_STEPS = 4", "EVAL_PERIOD = 2", "CHECKPOINT_PERIOD = 2")  # fmt: skip
    in_training = experiments.records(run, "inference_eval/digit")
    # The run's own configuration is all that is needed, and any checkpoint can be named.
    arguments = arguments_of(run)
    loss = experiments.records(run, "training_eval/digits_eval")
    assert eval_lib.evaluate(**arguments)["inference_eval/digit"] == in_training[4]
    earlier = eval_lib.evaluate(**arguments, checkpoint=f"{run}/checkpoint_2")
    assert earlier["inference_eval/digit"] == in_training[2]
    assert earlier["training_eval/digits_eval"] == loss[2]
    # Another run's results belong to that run.
    other = {**arguments, "model_dir": str(tmp_path / "other")}
    again = eval_lib.evaluate(**other, checkpoint=run)
    assert again["inference_eval/digit"] == in_training[4]
    assert not (tmp_path / "other").exists()
    # Those of a file of weights have no run: they belong to MODEL_DIR, which need not be there.
    weights = str(tmp_path / "weights.npz")
    params = stage_handover.open_checkpoint(run, 4)
    np.savez(weights, **{f"params/{name}": params.read(name) for name in params.saved})
    again = eval_lib.evaluate(**other, checkpoint=weights)
    assert again["inference_eval/digit"] == pytest.approx(in_training[4])
    written = {path.name for path in (tmp_path / "other").iterdir()}
    assert {"metrics.jsonl", "confusion_digits_zero_shot.json", "gallery.json"} <= written
    with pytest.raises(UserError, match="no complete checkpoint at .*checkpoint_3 .*checkpoint_4"):
        eval_lib.evaluate(**arguments, checkpoint=f"{run}/checkpoint_3")


@pytest.mark.parametrize("bindings, message", [
    ("EVAL_BATCH_SIZE = 100", "batch_size of .* is 100, which the mesh cannot split into 8"),
    ("TextTransformer.vocab_size = 20", "pieces and TextTransformer.vocab_size is 20"),
    ("digit/zero_shot.ZeroShotClassification.class_names_path = 'gone'", "gone does not exist"),
    ("", "nothing to evaluate"),
    ("MODEL_DIR = ''", "MODEL_DIR is empty"),
    ("MODEL_DIR = 'data/digits/vocab.txt'", "MODEL_DIR .* is a file"),
])  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_before_loading(
    tmp_path, monkeypatch, bindings, message
):
    monkeypatch.chdir(experiments.digits_dir(str(tmp_path.parent)))
    settings = (*experiments.MINIATURE, bindings) if bindings else experiments.UNEVALUATED
    experiments.parse("digits_stage1", "MODEL_DIR = 'gone'", *settings)
    arguments = gin_utils.build_arguments(experiments.TRAIN)
    for evaluate in (eval_lib.evaluate, lambda **kw: eval_lib.watch(**kw, patience=SOON)):
        with pytest.raises(UserError, match=message):
            evaluate(**arguments)
    assert not pathlib.Path("gone").exists()


def arguments_of(run):
    gin_utils.parse([f"{run}/config.gin"], [], [], root=experiments.TRAIN)
    return gin_utils.build_arguments(experiments.TRAIN)


def records(run):
    found = {}
    for path in (pathlib.Path(run) / evaluation_records.FOLDER).glob("*.json"):
        record = evaluation_records.parse(path.read_text())
        if record is not None:
            found[record.step] = record.results
    return found


@contextlib.contextmanager
def watching(run, log, *arguments):
    """The command in a process of its own, killed at the end where it still runs."""
    command = experiments.command(
        "eval", "--watch", "--poll_seconds=0.1", f"--gin_file={run}/config.gin", *arguments
    )
    with open(log, "w") as stderr:
        process = subprocess.Popen(command, env=experiments.environment(8), stderr=stderr)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for(condition, process, log):
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
        time.sleep(0.02)


@contextlib.contextmanager
def compilations():
    """Names of what is compiled within."""
    seen = []

    class Handler(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("Compiling "):
                seen.append(record.getMessage().split()[1])

    logger, handler = logging.getLogger("jax._src.interpreters.pxla"), Handler()
    logger.addHandler(handler)
    with jax.log_compiles():
        yield seen
    logger.removeHandler(handler)


@pytest.mark.slow
def test_a_watch_that_is_killed_goes_on_and_evaluates_all_of_a_run_once(tmp_path, monkeypatch):
    monkeypatch.chdir(experiments.digits_dir(str(tmp_path)))
    run, log = str(tmp_path / "run"), tmp_path / "log"
    settings = (
        *experiments.MINIATURE, f"MODEL_DIR = {run!r}", "CHECKPOINT_PERIOD = 1",
        "KEEP_CHECKPOINTS = None", "EVAL_PERIOD = None",
    )  # fmt: skip
    experiments.train("digits_stage1", *settings, "EVAL_EXAMPLES = 256", "TRAIN_STEPS = 4")
    # The first watch sees a run that is not done.
    stage = tmp_path / "run" / "stage.json"
    completed = stage.read_text()
    stage.write_text(json.dumps({**json.loads(completed), "completed": False}))
    assert "training_eval" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    with watching(run, log) as process:
        wait_for(lambda: len(records(run)) == 1, process, log)
        with pytest.raises(UserError, match=f"in use by another watch: process {process.pid} on"):
            eval_lib.watch(**arguments_of(run), patience=SOON)
        wait_for(lambda: len(records(run)) == 2, process, log)
        process.send_signal(signal.SIGKILL)
        process.wait()
    first = {path: path.read_bytes() for path in (tmp_path / "run/evaluations").glob("*.json")}
    stage.write_text(completed)
    arguments = arguments_of(run)
    with compilations() as compiled:
        eval_lib.watch(**arguments, patience=SOON)
    assert records(run).keys() == {1, 2, 3, 4}
    assert all(path.read_bytes() == text for path, text in first.items())
    assert compiled.count("jit(embed)") == compiled.count("jit(step)") + 1 == 2
    # Numbers are those of the command for one checkpoint.
    assert eval_lib.evaluate(**arguments, checkpoint=f"{run}/checkpoint_2") == records(run)[2]
    (history,) = run_history.load(run).stages
    points = history.points("inference_eval/digit", "accuracy")
    assert [step for step, _ in points] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "gallery.json").exists()


@pytest.mark.slow
def test_training_and_a_watch_beside_it(tmp_path, monkeypatch):
    """Killed and stopped in the middle, with training going on and retention removing."""
    monkeypatch.chdir(experiments.digits_dir(str(tmp_path)))
    run, log = str(tmp_path / "run"), tmp_path / "log"
    settings = [f"--gin.{setting.replace(' = ', '=')}" for setting in experiments.MINIATURE]
    settings += [f"--gin.MODEL_DIR='{run}'", "--gin.TRAIN_STEPS=60", "--gin.CHECKPOINT_PERIOD=4"]
    settings += ["--gin.EVAL_PERIOD=None", f"--gin_file={experiments.GIN}/digits_stage1.gin"]
    train = subprocess.Popen(
        experiments.command("train", *settings), env=experiments.environment(8),
        stderr=(tmp_path / "train_log").open("w"),
    )  # fmt: skip
    try:
        wait_for((tmp_path / "run" / "config.gin").exists, train, tmp_path / "train_log")
        with watching(run, log) as process:
            wait_for(lambda: len(records(run)) == 1, process, log)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == preemption.RESTART_STATUS
            assert "stopped on request" in log.read_text()
        with watching(run, log) as process:
            wait_for(lambda: len(records(run)) >= 2, process, log)
        with watching(run, log) as process:
            assert process.wait(240) == 0, log.read_text()[-4000:]
        assert train.wait(1) == 0
    finally:
        train.kill()
    steps = set(records(run))
    assert 60 in steps and steps <= set(range(4, 61, 4))
    arguments = arguments_of(run)
    alone = eval_lib.evaluate(**arguments)
    assert records(run)[60]["inference_eval/digit"] == alone["inference_eval/digit"]
