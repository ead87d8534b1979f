"""Experiments as XManager gets them, and one that it really runs, by its local executor."""

import importlib.util
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import experiments
import numpy as np
import pytest
from saved_runs import one_line_error

from launch import job, results, sweep, xm

HAS_XMANAGER = importlib.util.find_spec("xmanager") is not None
needs_xmanager = pytest.mark.skipif(
    not HAS_XMANAGER, reason="XManager is not installed: pip install 'clipa_t5x[xmanager]'"
)
DIGITS = f"--gin_file={experiments.GIN}/digits_stage1.gin"
PATHS = f"--gin_search_paths={experiments.GIN}"


def units(**changes):
    spec = job.JobSpec(("gin/a.gin",), "runs/exp", **changes)
    return sweep.work_units(spec, ["RATE=[1e-3, 2e-3]"])


def test_a_dry_run_prints_what_would_run_and_begins_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [DIGITS, PATHS, "--model_dir=exp", "--sweep=LEARNING_RATE=[1e-3, 2e-3]", "--dry_run"]
    assert xm.main(flags) == 0
    printed = capsys.readouterr().out
    assert printed.count("-m launch.local --job=exp/LEARNING_RATE=") == 2
    assert "- LEARNING_RATE = 2e-3" in printed and not list(tmp_path.iterdir())


@pytest.mark.parametrize("executor", ["vertex", "kubernetes"])
def test_containers_are_told_with_their_accelerators(executor):
    text = xm.describe(units(image="reg/x:1", package=None, topology="v5e-256"), executor)
    assert f"# {executor}, image reg/x:1, 1 x TPU_V5E=16x16" in text
    assert "--gin_bindings=RATE = 2e-3" in text and "runs/exp/RATE=2e-3" in text


@pytest.mark.parametrize(
    ("topology", "needs"),
    [("v4-32", {"TPU_V4": "2x4x4"}), ("gpu-h100-8", {"H100": 8}), ("cpu-4", {"cpu": 4})],
)
def test_accelerators_have_xmanagers_names(topology, needs):
    assert xm.requirements(job.JobSpec(("a",), "b", topology=topology)) == needs


def test_a_macro_that_the_recipe_has_not_is_refused_before_anything_begins(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert xm.main([DIGITS, PATHS, "--model_dir=exp", "--sweep=LEARNIG_RATE=[1, 2]"]) == 2
    error = capsys.readouterr().err
    assert "LEARNIG_RATE" in error and "Did you mean LEARNING_RATE?" in error
    assert not list(tmp_path.iterdir())


@needs_xmanager
@pytest.mark.parametrize("executor", ["vertex", "kubernetes"])
def test_containers_are_xmanagers(executor):
    unit = units(image="reg/x:1", package=None, topology="gpu-h100-8", environment={"A": "b"})[1]
    packageable, place = xm.cloud_job(unit, executor)
    assert type(place).__name__.lower() == executor
    assert packageable.executable_spec.image_path == "reg/x:1"
    assert dict(packageable.env_vars) == {"A": "b"}
    assert shlex.split(" ".join(packageable.args.to_list())) == unit.spec.command()
    assert "h100=8" in str(place.requirements)


def test_containers_need_an_image():
    if not HAS_XMANAGER:
        one_line_error(lambda: xm.cloud_job(units()[0], "vertex"), "clipa_t5x[xmanager]")
    else:
        one_line_error(lambda: xm.cloud_job(units()[0], "vertex"), "--image")


def trainers(model_dir):
    """Process ids of a work unit's trainer."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        is_trainer = command.split(b"\0")[1:3] == [b"-m", b"clipa_t5x.train"]  # And not its guard.
        if is_trainer and str(model_dir).encode() + b"'" in command:
            found.append(int(path.parent.name))
    return found


@needs_xmanager
@pytest.mark.slow
def test_four_work_units_of_which_one_is_killed_twice(tmp_path):
    experiments.digits_dir(str(tmp_path))
    bindings = (
        *experiments.UNEVALUATED,
        "TRAIN_STEPS = 60",
        "CHECKPOINT_PERIOD = 5",
        "LOG_PERIOD = 1",
    )
    rates = ("1e-3", "2e-3", "3e-3", "4e-3")
    (tmp_path / "job.yaml").write_text("restarts: {first_delay: 0.5}\n")
    command = [
        sys.executable, "-m", "launch.xm", "--job=job.yaml", DIGITS, PATHS, "--model_dir=exp",
        "--max_parallel=2", f"--sweep=LEARNING_RATE=[{', '.join(rates)}]",
        *(f"--gin_bindings={each}" for each in bindings),
    ]  # fmt: skip
    environment = experiments.environment(1, optimized=True)
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    victim = "exp/LEARNING_RATE=2e-3"
    metrics = tmp_path / victim / "metrics.jsonl"
    deadline = time.monotonic() + 900
    for steps in (8, 30):
        while not metrics.exists() or metrics.read_text().count('"train"') < steps:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        (pid,) = trainers(victim)
        os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-3000:]
    found = {each.name: each for each in results.collect(str(tmp_path / "exp"))}
    assert [each.state for each in found.values()] == ["completed"] * 4
    assert [each.restarts for each in found.values()] == [0, 2, 0, 0]
    assert "LEARNING_RATE=4e-3" in output and (tmp_path / "exp" / "results.csv").exists()
    assert (tmp_path / "exp" / "xmanager.sqlite3").exists()
    # The killed one's end is that of a run that nobody disturbed.
    undisturbed = experiments.command(
        "train", DIGITS, "--gin.MODEL_DIR='alone'", "--gin.LEARNING_RATE=2e-3",
        *(f"--gin_bindings={each}" for each in bindings),
    )  # fmt: skip
    done = experiments.run(undisturbed, str(tmp_path), optimized=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    killed, alone = (experiments.saved_state(str(tmp_path / d), 60) for d in (victim, "alone"))
    assert killed.keys() == alone.keys()
    for name in killed:
        np.testing.assert_array_equal(killed[name], alone[name], err_msg=name)
