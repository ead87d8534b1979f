"""An sbatch script is what was asked for, and does what restarts ask for."""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys

import experiments
import fake_slurm
import numpy as np
import pytest
from process_families import find_trainers, read_pids, wait_for
from saved_runs import one_line_error

from launch import job, restarts, slurm

HOSTILE = 'it\'s "x" $(touch pwned) `touch pwned` ;\n#SBATCH --time=1 \\ {command} é'
POLICY = job.RestartPolicy(max_restarts=3, first_delay=0)


def make(*flags, **fields):
    """(spec, allocation)"""
    policy = fields.pop("policy", POLICY)
    spec = job.make({"gin_file": ["a.gin"], "model_dir": "runs/a", **fields}, "a test")
    spec = dataclasses.replace(spec, restarts=policy)
    return spec, slurm.allocation(spec, slurm.parser().parse_args(flags))


def options(text):
    found = [line.split(maxsplit=1)[1] for line in text.splitlines() if line[:7] == "#SBATCH"]
    return dict(option.lstrip("-").partition("=")[::2] for option in found)


def test_what_sbatch_is_asked_for():
    spec, asked = make(
        "--nodes=2", "--time=1-12:00:00", "--partition=gpu_long", "--account=a.b",
        "--cpus_per_process=12", "--save_seconds=120", "--option=--mem=0",
        topology="gpu-h100-16", name="my-run",
    )  # fmt: skip
    text = slurm.script(spec, asked)
    assert options(text) == {
        "job-name": "my-run", "nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8",
        "cpus-per-task": "12", "time": "1-12:00:00", "partition": "gpu_long", "account": "a.b",
        "output": "my-run-%j.log", "open-mode": "append", "signal": "B:USR1@120", "requeue": "",
        "mem": "0",
    }  # fmt: skip
    assert "--gpu-bind=none" in text and "--cpus-per-task=12" in text
    assert "export JAX_PLATFORMS=cuda,cpu" in text


@pytest.mark.parametrize(
    ("flags", "fields", "expected"),
    [
        ([], {}, (1, 1, 0, 1)),
        (["--processes_per_node=2"], {}, (1, 2, 0, 1)),
        (["--processes_per_node=2"], {"topology": "cpu-8"}, (1, 2, 0, 4)),
        (["--nodes=2"], {"topology": "cpu-8"}, (2, 1, 0, 4)),
        (["--gpus_per_node=8", "--nodes=4"], {}, (4, 8, 8, 1)),
        (["--nodes=2"], {"topology": "gpu-a100-8"}, (2, 4, 4, 1)),
        (["--processes_per_node=2"], {"topology": "gpu-a100-8"}, (1, 2, 8, 4)),
    ],
)
def test_devices_are_divided(flags, fields, expected):
    found = make(*flags, **fields)[1]
    assert expected == (
        found.nodes, found.processes_per_node, found.gpus_per_node, found.devices_per_process
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "fields", "parts"),
    [
        ([], {"topology": "v5e-8"}, ["v5e-8"]),
        ([], {"image": "x", "package": None}, ["'x'"]),
        (["--nodes=0"], {}, ["--nodes=0"]),
        (["--nodes=3"], {"topology": "cpu-8"}, ["cpu-8", "--nodes=3"]),
        (["--processes_per_node=3"], {"topology": "gpu-a100-8"}, ["8 devices", "=3"]),
        (["--gpus_per_node=4"], {"topology": "gpu-a100-8"}, ["gpu-a100-8", "--gpus_per_node=4"]),
        (["--gpus_per_node=8"], {"topology": "cpu-8"}, ["cpu-8", "--gpus_per_node=8"]),
        (["--partition=a b"], {}, ["--partition='a b'"]),
        (["--partition=a\n#SBATCH --x"], {}, ["--partition='a"]),
        (["--account=$(id)"], {}, ["--account='$(id)'"]),
        (["--time=soon"], {}, ["--time='soon'", "12:00:00"]),
        (["--option=--mem=0 --x"], {}, ["--mem=0 --x"]),
        (["--save_seconds=3"], {}, ["--save_seconds=3"]),
        (["--cpus_per_process=0"], {}, ["--cpus_per_process=0"]),
    ],
)
def test_what_slurm_would_misread_is_refused(flags, fields, parts):
    one_line_error(lambda: make(*flags, **fields), *parts)


def test_the_restart_statuses_are_those_of_every_launcher():
    text = slurm.script(*make())
    line = next(line.strip() for line in text.splitlines() if f"|{slurm._OUT_OF_MEMORY})" in line)
    statuses = {int(word) for word in line.partition(")")[0].split("|")}
    assert statuses - {slurm._OUT_OF_MEMORY} == {s for s in restarts.RESTART_STATUSES if s > 0}


@pytest.fixture
def cluster(tmp_path):
    return fake_slurm.Cluster(tmp_path)


# What every pretended trainer begins with. SLURM ends the others as soon as one fails: those that
# are to fail by themselves meet before.
PREAMBLE = """
import json, os, pathlib, signal, sys, time
state, index = pathlib.Path(os.environ["FAKE_SLURM"]), os.environ["SLURM_PROCID"]
def begun(index):
    path = state / f"starts {index}"
    return len(path.read_text()) if path.exists() else 0
start = begun(index)
def meet():
    (state / f"starts {index}").write_text("x" * (start + 1))
    while any(begun(i) < start + 1 for i in range(2)):
        time.sleep(0.01)
"""


def run(cluster, trainer, *flags, meanwhile=lambda life, process: None, **fields):
    """Writes a script whose trainer is Python code, and submits it; (statuses, log)."""
    python = cluster.program(cluster.folder / "the trainer's python", PREAMBLE + trainer)
    text = slurm.script(*make("--processes_per_node=2", *flags, **fields), str(python))
    script = cluster.folder / "job.sbatch"
    script.write_text(text, encoding="utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True)
    return cluster.submit(script, meanwhile)


def starts(cluster):
    return [len((cluster.state / f"starts {i}").read_text()) for i in range(2)]


def test_whatever_is_in_a_job_arrives_as_it_was(cluster):
    trainer = """
got = [sys.argv, os.environ["A"], os.environ["XLA_FLAGS"]]
(state / f"got {index}").write_text(json.dumps(got))
"""
    value = HOSTILE.replace("\n", " ")
    statuses, log = run(
        cluster,
        trainer,
        topology="cpu-8",
        model_dir=HOSTILE,
        gin_bindings=[f"A = {HOSTILE!r}", HOSTILE],
        arguments=[HOSTILE],
        environment={"A": value},
    )
    assert statuses == [0], log
    for i in range(2):
        argv, a, flags = json.loads((cluster.state / f"got {i}").read_text())
        assert argv[1:] == [
            "-m", "clipa_t5x.train", "--gin_file=a.gin", "--gin_search_paths=gin",
            f"--gin_bindings=A = {HOSTILE!r}", f"--gin_bindings={HOSTILE}",
            f"--gin_bindings=MODEL_DIR = {HOSTILE!r}", HOSTILE, "--multiprocess",
        ]  # fmt: skip
        assert a == value and flags.endswith("_device_count=4")
    assert not list(cluster.folder.rglob("pwned"))
    assert options((cluster.folder / "job.sbatch").read_text())["job-name"] == "clipa"


def test_what_ends_early_is_begun_again_until_it_is_done(cluster):
    """In the same allocation: one is killed, SLURM ends the other, which goes on where it was."""
    trainer = """
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
meet()
if start == 0:
    if index == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
sys.exit(75 if start == 1 else 0)
"""
    statuses, log = run(cluster, trainer)
    assert statuses == [0] and starts(cluster) == [3, 3], log
    assert "status 137 after" in log and "restart 1 of at most 3" in log
    assert "status 75 after" in log and "done after 3 starts" in log
    assert "--kill-on-bad-exit=1" in cluster.sruns()[0]["options"]


@pytest.mark.parametrize(
    ("codes", "status"), [((1, 75), 1), ((2, 75), 2), ((75, 3), 1), ((0, 139), 1), ((1, 137), 1)]
)
def test_what_no_restart_mends_ends(cluster, codes, status):
    """Even where another task has a status that is higher."""
    trainer = (
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN); meet(); sys.exit({codes}[int(index)])"
    )
    statuses, log = run(cluster, trainer)
    assert statuses == [status] and starts(cluster) == [1, 1], log
    assert "given up" in log


def test_restarts_are_bounded_over_all_lives_of_a_job(cluster):
    """Those in an allocation, and those by way of the queue."""

    def meanwhile(life, process):
        if life == 0:  # In its second start.
            read_pids(cluster.state, 2)
            process.send_signal(signal.SIGUSR1)

    trainer = """
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
meet()
if start == 1:
    (state / f"{index}.pid").write_text(str(os.getpid()))
    time.sleep(600)
sys.exit(75)
"""
    statuses, log = run(cluster, trainer, meanwhile=meanwhile)
    assert statuses == [75, 1], log
    assert starts(cluster) == [4, 4]
    assert "after 3 restarts (max_restarts = 3)" in log


SAVING = """
def end(*_):
    time.sleep(0.3)
    (state / f"saved {index}").touch()
    os._exit(75)
signal.signal(signal.SIGTERM, end)
meet()
if start == 0:
    (state / f"{index}.pid").write_text(str(os.getpid()))
    time.sleep(600)
"""


def test_before_the_time_limit_it_saves_and_goes_back_to_the_queue(cluster):
    def meanwhile(life, process):
        if life == 0:
            read_pids(cluster.state, 2)
            process.send_signal(signal.SIGUSR1)

    statuses, log = run(cluster, SAVING, meanwhile=meanwhile)
    assert statuses == [75, 0] and starts(cluster) == [2, 2], log
    assert (cluster.state / "saved 0").exists() and (cluster.state / "saved 1").exists()
    assert "told to save" in log and "back to the queue" in log and "start 2 of at most 4" in log


def test_where_it_cannot_be_requeued_it_says_so(cluster):
    def meanwhile(life, process):
        read_pids(cluster.state, 2)
        process.send_signal(signal.SIGUSR1)

    cluster.environment["FAKE_NO_REQUEUE"] = "1"
    statuses, log = run(cluster, SAVING, meanwhile=meanwhile)
    assert statuses == [75] and "it cannot be requeued: submit it again" in log


def test_when_the_job_is_cancelled_it_saves_and_is_not_begun_again(cluster):
    """SLURM itself signals all, the script too."""

    def meanwhile(life, process):
        pids = read_pids(cluster.state, 2)
        for pid in (*pids, process.pid):
            os.kill(pid, signal.SIGTERM)

    statuses, log = run(cluster, SAVING, meanwhile=meanwhile)
    assert statuses == [75] and starts(cluster) == [1, 1], log
    assert (cluster.state / "saved 0").exists() and "submitted again, the job goes on" in log


def test_a_signal_between_two_starts_ends_at_once(cluster):
    def meanwhile(life, process):
        wait_for((cluster.folder / "clipa-77.restarts").exists)
        process.send_signal(signal.SIGTERM)

    policy = job.RestartPolicy(first_delay=600)
    statuses, log = run(cluster, "meet(); sys.exit(75)", meanwhile=meanwhile, policy=policy)
    assert statuses == [75] and starts(cluster) == [1, 1], log


def test_delays_grow_as_the_policy_says(cluster):
    """The pauses are made by a `sleep` that writes down for how long it was asked."""
    sleep = (
        "import os, sys; open(os.environ['FAKE_SLURM'] + '/slept', 'a').write(sys.argv[1] + ' ')"
    )
    cluster.program(cluster.folder / "programs" / "sleep", sleep)
    policy = job.RestartPolicy(max_restarts=5, first_delay=2, max_delay=7, healthy_seconds=100)
    statuses, _ = run(cluster, "sys.exit(75)", policy=policy)
    assert statuses == [1]
    found = [float(word) for word in (cluster.state / "slept").read_text().split()]
    expected = restarts.Restarts(policy)
    assert found == [expected.after([75], 1).delay for _ in range(5)] == [2, 4, 7, 7, 7]


def test_processes_of_a_node_take_their_own_gpus(cluster):
    trainer = "(state / f'ids {index}').write_text(os.environ['JAX_LOCAL_DEVICE_IDS'])"
    statuses, log = run(cluster, trainer, topology="gpu-h100-8")
    assert statuses == [0], log
    ids = [(cluster.state / f"ids {i}").read_text() for i in range(2)]
    assert ids == ["0,1,2,3", "4,5,6,7"]


def test_a_script_is_written_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(experiments.REPOSITORY)
    flags = ["--gin_file=gin/shapes_stage1.gin", "--model_dir=runs/x", "--processes_per_node=2"]
    output = tmp_path / "my job.sbatch"
    assert slurm.main([*flags, f"--output={output}"]) == 0
    said = capsys.readouterr().out
    assert shlex.split(said.partition(": ")[2]) == ["sbatch", str(output)]
    assert slurm.main([*flags, "--dry_run"]) == 0
    assert capsys.readouterr().out == output.read_text()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--output=x"], "--gin_file"),
        (["--gin_file=gin/shapes_stage1.gin", "--model_dir=x"], "--output"),
        (["--gin_file=gin/shapes_stage1.gin", "--model_dir=x", "--output=/none/x"], "/none/x"),
        (["--gin_file=gin/shapes_stage1.gin", "--model_dir=x", "--output=x", "--arguments=a\0"],
         "code 0"),
        (["--gin_file=gin/shapes_stage1.gin", "--model_dir=x", "--output=x", "--gin.BATCH_SIZ=1"],
         "BATCH_SIZE"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_status_2(monkeypatch, capsys, flags, part):
    monkeypatch.chdir(experiments.REPOSITORY)
    assert slurm.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and part in err
    assert not pathlib.Path("x").exists()


@pytest.mark.slow
def test_real_processes_join_by_slurms_variables_and_come_to_the_same_end(tmp_path):
    """One is killed; later the time limit is near; the job goes on in its next life."""
    workspace, steps = experiments.digits_dir(str(tmp_path)), 40
    environment = {**experiments.environment(1), "SLURM_JOB_ID": str(os.getpid())}
    cluster = fake_slurm.Cluster(workspace, **environment)

    def submit(name, meanwhile=lambda life, process: None):
        bindings = [
            *experiments.UNEVALUATED, f"TRAIN_STEPS = {steps}", "LOG_PERIOD = 1",
            "CHECKPOINT_PERIOD = 4", "IMAGE_MASK_RATIO = 0.5",
        ]  # fmt: skip
        spec, asked = make(
            "--processes_per_node=2",
            name=name,
            topology="cpu-8",
            gin_file=[f"{experiments.GIN}/digits_stage1.gin"],
            gin_search_paths=[str(experiments.GIN)],
            model_dir=name,
            gin_bindings=bindings,
            arguments=["--peer_timeout_seconds=15", "--join_timeout_seconds=120"],
        )
        script = cluster.folder / f"{name}.sbatch"
        script.write_text(slurm.script(spec, asked, sys.executable))
        statuses, log = cluster.submit(script, meanwhile, timeout=900)
        assert statuses[-1] == 0, log
        return statuses, log, experiments.saved_state(os.path.join(workspace, name), steps)

    def done(name):
        path = pathlib.Path(workspace, name, "metrics.jsonl")
        return path.read_text().count('"group": "train"') if path.exists() else 0

    def disturb(life, process):
        if life == 0:
            wait_for(lambda: done("disturbed") > 6, 600)
            os.kill(find_trainers(workspace)[1], signal.SIGKILL)
            wait_for(lambda: done("disturbed") > 14, 600)
            process.send_signal(signal.SIGUSR1)

    _, _, whole = submit("whole")
    statuses, log, end = submit("disturbed", disturb)
    print(*(line for line in log.splitlines() if line.startswith("launch: ")), sep="\n")
    assert statuses == [75, 0], log
    assert "status 137 after" in log and "back to the queue" in log
    assert whole.keys() == end.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(value, end[name], err_msg=name)
