"""Experiments of XManager: planned, shown, run on this machine by its local executor, stopped."""

import asyncio
import csv
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import experiments
import numpy as np
import pytest
import yaml
from chaos import killing
from process_families import FAMILY, all_gone, find_trainers, read_pids, wait_for

from launch import job, results, sweep, xm

FLAGS = ["--gin_file=gin/digits_stage1.gin"]


@pytest.fixture
def library():
    pytest.importorskip("xmanager", reason="xmanager is not installed: extra xmanager")


@pytest.fixture
def main(monkeypatch, pytestconfig, tmp_path):
    """Runs the command in the repository with an experiment in `tmp_path / 'experiment'`."""
    monkeypatch.chdir(pytestconfig.rootpath)
    return lambda *flags: xm.main([*FLAGS, f"--model_dir={tmp_path / 'experiment'}", *flags])


def test_the_dry_run_shows_every_job_and_does_nothing(main, tmp_path, capsys):
    assert (
        main(
            "--sweep=LEARNING_RATE=[1e-3, 2e-3]",
            "--topology=cpu-2",
            "--num_processes=2",
            "--dry_run",
        )
        == 0
    )
    out = capsys.readouterr().out
    assert not (tmp_path / "experiment").exists()
    commands = [line for line in out.splitlines() if line.startswith("exec ")]
    path = tmp_path / "experiment" / "LEARNING_RATE=2e-3" / "job.yaml"
    assert len(commands) == 2
    assert commands[1].endswith(f"-m launch.local --job={path} --num_processes=2")
    shown = "".join(line[4:] + "\n" for line in out.splitlines() if line.startswith("#   "))
    second = yaml.safe_load(shown[shown.rindex("gin_file:") :])
    assert second["model_dir"] == str(path.parent)
    assert second["gin_bindings"] == ["LEARNING_RATE = 2e-3"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--sweep=LEARNING_RATE=[1e-3] x LEARNING_RAT=[1]"], "Did you mean LEARNING_RATE?"),
        (["--sweep=LEARNING_RATE=[1e-3"], "never closed"),
        (["--max_parallel=0"], "--max_parallel=0"),
        (["--image=x"], "launch.local runs no containers"),
        (["--executor=vertex"], "needs --project"),
        (["--executor=vertex", "--project=p"], "give --image"),
        (["--model_dir=gs://bucket/x"], "give --experiment_dir"),
        (["--package=none"], "no folder"),
    ],
)
def test_mistakes_are_refused_in_one_line_before_anything_is_submitted(
    main, tmp_path, capsys, flags, part
):
    assert main(*flags) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert line.startswith("error: ") and part in line
    assert not (tmp_path / "experiment").exists()


def test_a_missing_library_is_named(main, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "xmanager", None)
    assert main() == 2
    assert "pip install 'clipa_t5x[xmanager]'" in capsys.readouterr().err
    assert not (tmp_path / "experiment").exists()


def test_a_folder_that_cannot_be_is_told_in_a_line(library, main, tmp_path, capsys):
    (tmp_path / "experiment").write_text("a file")
    assert main() == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "experiment's folder" in line and "--experiment_dir" in line


class Pretended:
    """Work units that run Python code, given its number and a folder of all."""

    def __init__(self, folder, code, count):
        spec = job.JobSpec(("a.gin",), str(folder / "experiment"))
        units = sweep.work_units(spec, [f"N={list(range(count))}"])
        self.plan = xm.Plan("pretended", folder / "experiment", units)
        self._commands = {
            unit.name: [sys.executable, "-I", "-S", "-c", code, unit.overrides["N"], str(folder)]
            for unit in units
        }

    def run(self, max_parallel):
        with xm.library(self.plan):
            return asyncio.run(xm.run_here(self.plan, self._commands, max_parallel))

    def statuses(self):
        return [unit.status for unit in results.Record.read(self.plan.folder).units]


def test_so_many_work_units_at_a_time_and_one_that_fails_stops_no_other(
    library, tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    code = """
import os, sys, time
number, folder = sys.argv[1:]
print("hello of", number, flush=True)
open(f"{folder}/running.{number}", "w")
time.sleep(0.5)
with open(f"{folder}/seen", "a") as file:
    file.write(str(sum(name.startswith("running.") for name in os.listdir(folder))))
os.remove(f"{folder}/running.{number}")
sys.exit(3 if number in "12" else 0)
"""
    experiment = Pretended(tmp_path, code, 5)
    assert experiment.run(2) == 1
    assert experiment.statuses() == [0, 3, 3, 0, 0]
    seen = (tmp_path / "seen").read_text()
    assert len(seen) == 5 and set(seen) <= set("12") and "2" in seen
    out, err = capsys.readouterr()
    assert "Traceback" not in err + caplog.text
    assert all(f"[N={i}] hello of {i}" in out for i in range(5))
    assert "failed (3)" in out
    # XManager's records are with the experiment, and nothing is in the user's home.
    with sqlite3.connect(experiment.plan.folder / "experiments.sqlite3") as database:
        assert database.execute("SELECT experiment_title FROM experiment").fetchall() == [
            ("pretended",)
        ]
        assert database.execute("SELECT count(*) FROM work_unit").fetchone() == (5,)
    assert not (tmp_path / "home").exists()


def stopped_when_it_runs(folder, code, count):
    """An experiment that is told to stop when its first work unit runs."""

    def stop():
        wait_for((folder / "running.0").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    return Pretended(folder, code, count)


def test_told_to_stop_it_tells_those_that_run_and_begins_no_more(library, tmp_path):
    code = """
import signal, sys, time
number, folder = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(f"{folder}/running.{number}", "w")
time.sleep(600)
"""

    experiment = stopped_when_it_runs(tmp_path, code, 3)
    assert experiment.run(1) == 75
    assert experiment.statuses() == [75, None, None]
    assert not (tmp_path / "running.1").exists()


# An experiment of one work unit that sleeps, under its own guard as all of them are.
SLEEPING = """
import asyncio, pathlib, sys
from launch import guard, job, sweep, xm
folder = pathlib.Path(sys.argv[1])
plan = xm.Plan("sleeping", folder, sweep.work_units(job.JobSpec(("a.gin",), str(folder)), []))
command = [sys.executable, "-I", "-S", "-c", sys.argv[2], str(folder)]
with xm.library(plan):
    asyncio.run(xm.run_here(plan, {"base": guard.guarded(command)}, 1))
"""


def test_nothing_outlives_a_killed_experiment(library, tmp_path):
    command = [sys.executable, "-c", SLEEPING, str(tmp_path), FAMILY]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=experiments.environment(1), stdout=log, stderr=log)
    pids = read_pids(tmp_path, 2)
    process.kill()
    process.wait()
    all_gone(pids)


def test_a_work_unit_that_hears_of_a_stop_too_early_has_not_failed(library, tmp_path):
    code = """
import sys, time
number, folder = sys.argv[1:]
open(f"{folder}/running.{number}", "w")
time.sleep(600)
"""
    experiment = stopped_when_it_runs(tmp_path, code, 1)
    assert experiment.run(1) == 75 and experiment.statuses() == [75]


STEPS = 40
UNITS = [
    f"LEARNING_RATE={rate},IMAGE_MASK_RATIO={n}" for rate in ("1e-3", "2e-3") for n in (0.5, 0.75)
]


@pytest.fixture
def start(library, tmp_path):
    """Starts the command in a folder with data; returns the process and the experiment's folder."""
    workspace = experiments.digits_dir(str(tmp_path))

    def begin(name, sweep_text):
        bindings = [
            *experiments.MINIATURE, f"TRAIN_STEPS = {STEPS}", "CHECKPOINT_PERIOD = 4",
            "LOG_PERIOD = 1", f"EVAL_PERIOD = {STEPS}",
        ]  # fmt: skip
        spec = {
            "gin_file": f"{experiments.GIN}/digits_stage1.gin",
            "gin_search_paths": str(experiments.GIN),
            "gin_bindings": bindings,
            "model_dir": name,
            "restarts": {"first_delay": 0.1, "max_restarts": 5},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(spec))
        with open(tmp_path / f"{name}.log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.xm", f"--job={path}", f"--sweep={sweep_text}",
                 "--max_parallel=2"],
                cwd=workspace,
                env=experiments.environment(1),
                stdout=log,
                stderr=log,
            )  # fmt: skip
        return process, tmp_path / name

    return begin


def kill_trainer(launcher, workspace, model_dir, moment, rng):
    """Kills a work unit's trainer after something has been seen of it; returns the step."""
    before = killing.Snapshot.of(model_dir)
    chosen = killing.MOMENTS[moment]
    wait_for(
        lambda: launcher.poll() is not None or chosen.seen(before, killing.Snapshot.of(model_dir)),
        900,
    )
    assert launcher.poll() is None
    time.sleep(rng.uniform(0, 0.1))
    binding = f"--gin_bindings=MODEL_DIR = {str(model_dir.relative_to(workspace))!r}"
    [trainer] = find_trainers(workspace, binding)
    os.kill(trainer, signal.SIGKILL)
    wait_for(lambda: trainer not in find_trainers(workspace, binding))
    return killing.Snapshot.of(model_dir).lines["train"]


@pytest.mark.slow
def test_four_work_units_one_killed_twice_come_to_the_same_end(start, tmp_path):
    began, rng = time.monotonic(), random.Random(0)
    process, experiment = start("sweep", "LEARNING_RATE=[1e-3,2e-3] x IMAGE_MASK_RATIO=[0.5,0.75]")
    killed = UNITS[1]
    at = [
        kill_trainer(process, tmp_path, experiment / killed, moment, rng)
        for moment in ("save", "step")
    ]
    log = tmp_path / "sweep.log"
    assert process.wait(3600) == 0, log.read_text()[-4000:]
    seconds = time.monotonic() - began
    table = json.loads((experiment / results.JSON_FILE).read_text())["work_units"]
    assert [each["work_unit"] for each in table] == UNITS
    for each in table:
        assert (each["state"], each["step"], each["total_steps"]) == ("done", STEPS, STEPS)
        assert each["metrics"]["train/loss"] > 0
        assert [v for k, v in each["metrics"].items() if k.endswith("/accuracy")]
        assert each["restarts"] == (2 if each["work_unit"] == killed else 0)
    with (experiment / results.CSV_FILE).open(newline="") as file:
        assert [row["IMAGE_MASK_RATIO"] for row in csv.DictReader(file)] == ["0.5", "0.75"] * 2
    text = log.read_text()
    assert text.count("ended with 137 (SIGKILL)") == 2
    print(f"killed after {at} steps; {seconds:.0f} s\n{text[text.index('LEARNING_RATE  ') :]}")

    process, undisturbed = start("whole", "LEARNING_RATE=[1e-3] x IMAGE_MASK_RATIO=[0.75]")
    assert process.wait(3600) == 0
    ends = [
        experiments.saved_state(str(each / killed), STEPS) for each in (experiment, undisturbed)
    ]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        np.testing.assert_array_equal(value, ends[1][name], err_msg=name)
    print(f"{len(ends[0])} arrays bit-identical")
