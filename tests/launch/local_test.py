"""Runs of several processes on this machine: started, watched, started again, ended."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import experiments
import numpy as np
import pytest
from process_families import PYTHON, all_gone, find_trainers, read_pids, wait_for
from saved_runs import one_line_error

from clipa_t5x import main
from launch import job, local, process_group

POLICY = job.RestartPolicy(max_restarts=3, first_delay=0.1)


class Trainers:
    """Two pretended trainers: Python code, which is given its index and a folder for both."""

    def __init__(self, folder, code):
        self.folder, self.starts = folder, 0
        self._code = "import os, pathlib, signal, sys, time\nfolder = pathlib.Path(sys.argv[2])\n"
        self._code += code

    def __call__(self):
        self.starts += 1
        return [
            process_group.Command(
                (*PYTHON, "-c", self._code, str(i), str(self.folder)),
                {"START": str(self.starts)},
                self.folder / "logs" / f"process_{i}.log",
            )
            for i in range(2)
        ]

    def supervise(self, policy=POLICY, patience=30.0):
        return local.supervise(self, policy, patience, str(self.folder))


def signal_when(seen, *signums):
    """Signals this process when it is time, from a thread."""

    def send():
        wait_for(seen)
        for signum in signums:
            os.kill(os.getpid(), signum)
            # Two at once would be one.
            threading.Event().wait(0.3)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_what_ends_early_is_begun_again_until_it_is_done(tmp_path, capfd):
    """One is killed, the other finds that; then both are told to stop by somebody; then done."""
    code = """
print("start", os.environ["START"], flush=True)
if os.environ["START"] == "1":
    if sys.argv[1] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
sys.exit(0 if os.environ["START"] == "3" else 75)
"""
    trainers = Trainers(tmp_path, code)
    assert trainers.supervise() == 0 and trainers.starts == 3
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == [f"[{i}] start {n}" for i in (0, 1) for n in (1, 2, 3)]
    assert "start 1 of at most 4: 2 processes" in err and "start 3 of at most 4" in err
    assert "process 1 ended with status 137 (SIGKILL)" in err
    assert "restart 1 of at most 3 in 0 s" in err and "ended with 75, 137 (SIGKILL)." in err
    assert "restart 2 of at most 3" in err
    assert "done after 3 starts" in err
    log = (tmp_path / "logs" / "process_1.log").read_text()
    assert log == "start 1\nstart 2\nstart 3\n"


@pytest.mark.parametrize(
    ("statuses", "status"), [((1, 75), 1), ((75, 2), 2), ((2, 2), 2), ((1, 2), 1), ((139, 75), 1)]
)
def test_what_no_restart_mends_ends(tmp_path, capfd, statuses, status):
    trainers = Trainers(tmp_path, f"sys.exit({statuses}[int(sys.argv[1])])")
    assert trainers.supervise() == status and trainers.starts == 1
    assert "given up after 1 start" in capfd.readouterr().err


def test_restarts_are_bounded(tmp_path, capfd):
    trainers = Trainers(tmp_path, "sys.exit(75)")
    policy = job.RestartPolicy(max_restarts=2, first_delay=0.01)
    assert trainers.supervise(policy) == 1 and trainers.starts == 3
    assert "after 2 restarts (max_restarts = 2)" in capfd.readouterr().err


SAVING = """
def end(*_):
    time.sleep(float({seconds}))
    os._exit({status})
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
(folder / f"{{sys.argv[1]}}.pid").write_text(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.parametrize(("ends_with", "status"), [(75, 75), (0, 0), (1, 1)])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_and_begins_nothing(tmp_path, capfd, signum, ends_with, status):
    trainers = Trainers(tmp_path, SAVING.format(seconds=0.1, status=ends_with))
    thread = signal_when(lambda: read_pids(tmp_path, 2), signum)
    assert trainers.supervise() == status and trainers.starts == 1
    thread.join()
    assert f"{signum.name}: 2 processes are told" in capfd.readouterr().err


def test_a_second_signal_ends_at_once(tmp_path):
    trainers = Trainers(tmp_path, SAVING.format(seconds=600, status=75))
    thread = signal_when(lambda: read_pids(tmp_path, 2), signal.SIGINT, signal.SIGTERM)
    assert trainers.supervise() == 128 + signal.SIGTERM
    thread.join()
    all_gone(read_pids(tmp_path, 2))


def test_a_signal_between_two_starts_ends_at_once(tmp_path):
    trainers = Trainers(tmp_path, "sys.exit(75)")
    done = tmp_path / "logs" / "process_1.log"
    thread = signal_when(done.exists, signal.SIGTERM)
    assert trainers.supervise(job.RestartPolicy(first_delay=600)) == 75 and trainers.starts == 1
    thread.join()


def test_a_reader_that_is_gone_ends_no_run(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(experiments.REPOSITORY)!r})
from clipa_t5x import main
from launch import job, local, process_group
line = ({sys.executable!r}, "-I", "-S", "-c", "print('line')")
command = process_group.Command(line, {{}}, pathlib.Path("log"))
sys.exit(local.supervise(lambda: [command], job.RestartPolicy(), 1))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=writer)
    os.close(writer)
    assert process.wait(120) == 0
    assert (tmp_path / "log").read_text() == "line\n"


def make(**fields):
    return job.make({"gin_file": ["a.gin"], "model_dir": "runs/a", **fields}, "a test")


@pytest.mark.parametrize(
    ("topology", "given", "expected"),
    [
        ("cpu-1", (1, None), ("cpu", 1, 1)),
        ("cpu-1", (2, 4), ("cpu", 2, 4)),
        ("cpu-8", (2, None), ("cpu", 2, 4)),
        ("gpu-h100-8", (8, None), ("gpu", 8, 1)),
        ("gpu-h100-8", (1, 8), ("gpu", 1, 8)),
        ("v5e-8", (1, None), ("tpu", 1, 8)),
    ],
)
def test_layouts(topology, given, expected):
    assert local.layout(make(topology=topology), *given) == local.Layout(*expected)


@pytest.mark.parametrize(
    ("fields", "given", "parts"),
    [
        ({"topology": "cpu-8"}, (2, 3), ["cpu-8", "8 devices", "take 6"]),
        ({"topology": "cpu-8"}, (3, None), ["cpu-8", "take 6"]),
        ({}, (2, None), ["cpu-1", "take 2"]),
        ({}, (0, None), ["--num_processes=0"]),
        ({}, (2, 0), ["--devices_per_process=0"]),
        ({"topology": "v5e-8"}, (2, None), ["v5e-8", "one process"]),
        ({"image": "x", "package": None}, (1, None), ["'x'", "--package"]),
    ],
)
def test_what_fits_no_machine_is_refused(fields, given, parts):
    one_line_error(lambda: local.layout(make(**fields), *given), *parts)


def test_cpu_devices_are_added_to_xlas_flags():
    layout = local.Layout("cpu", 2, 4)
    variables = layout.environment(1, {"XLA_FLAGS": "--a"})
    assert variables == {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--a --xla_force_host_platform_device_count=4",
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, ["0,1", "2,3"]), ({"CUDA_VISIBLE_DEVICES": "7,5,3,1"}, ["7,5", "3,1"])],
)
def test_gpus_are_divided(given, expected):
    layout = local.Layout("gpu", 2, 2)
    found = [layout.environment(i, given) for i in range(2)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == expected
    assert {each["JAX_LOCAL_DEVICE_IDS"] for each in found} == {"0,1"}
    one_line_error(
        lambda: layout.environment(0, {"CUDA_VISIBLE_DEVICES": "0,1"}), "'0,1'", "need 4"
    )


def test_processes_meet_at_a_port_that_is_new_for_each_start(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    spec = make(environment={"A": "b", "XLA_FLAGS": "--a"})
    starts = [local.commands(spec, local.Layout("cpu", 2, 4), tmp_path) for _ in range(2)]
    ports = []
    for start in starts:
        for i, command in enumerate(start):
            assert command.arguments[: len(spec.command())] == tuple(spec.command(sys.executable))
            address, *counts = command.arguments[len(spec.command()) :]
            assert counts == ["--process_count=2", f"--process_index={i}"]
            assert command.environment["A"] == "b"
            assert command.environment["XLA_FLAGS"].startswith("--a --xla_force")
            assert address == (
                f"--coordinator_address={command.environment['JAX_COORDINATOR_BIND_ADDRESS']}"
            )
            ports.append(int(address.rpartition(":")[2]))
        assert {command.log.name for command in start} == {"process_0.log", "process_1.log"}
    assert ports[0] == ports[1] != ports[2] == ports[3]


def test_one_process_needs_no_port(tmp_path):
    (command,) = local.commands(make(), local.Layout("cpu", 1, 1), tmp_path)
    assert command.arguments == tuple(make().command(sys.executable))


def test_a_free_port_is_free_and_not_the_kernels_to_give():
    port = local.free_port()
    with socket.socket() as s:
        s.bind(("127.0.0.1", port))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        assert port < s.getsockname()[1]


def test_the_patience_is_the_trainers():
    assert local.patience(make()) == main._FLAGS["peer_timeout_seconds"].default + 30
    spec = make(arguments=["--peer_timeout_seconds=15", "--watch", "--peer_timeout_seconds=20"])
    assert local.patience(spec) == 50


HOSTILE = """it's "x" $(touch pwned) `id`; #"""


def test_a_dry_run_prints_what_a_shell_would_start(tmp_path, monkeypatch, capsys):
    """Values that a shell would make something else of arrive as they are."""
    printer = tmp_path / "python printer"
    printer.write_text(
        f"#!{sys.executable} -S\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ['A'], os.environ['XLA_FLAGS'], os.getcwd()]))\n"
    )
    printer.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(printer))
    package = tmp_path / "my package"
    package.symlink_to(experiments.REPOSITORY)
    flags = [
        "--gin_file=gin/shapes_stage1.gin", f"--model_dir={HOSTILE}", "--num_processes=2",
        "--devices_per_process=4", f"--environment=A={HOSTILE}", f"--package={package.name}",
    ]  # fmt: skip
    assert local.main([*flags, "--dry_run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("# ")]
    for i, line in enumerate(lines):
        result = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
        arguments, a, xla_flags, folder = json.loads(result.stdout)
        assert f"--gin_bindings=MODEL_DIR = {HOSTILE!r}" in arguments and a == HOSTILE
        assert arguments[-1] == f"--process_index={i}" and "device_count=4" in xla_flags
        assert pathlib.Path(folder).samefile(experiments.REPOSITORY)
    assert len(lines) == 2 and not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([], "--gin_file"),
        (["--gin_file=gin/shapes_stage1.gin", "--model_dir=x", "--num_processes=2"], "cpu-1"),
        (["--gin_file=gin/none.gin", "--model_dir=x", "--dry_run"], "none.gin"),
        (["--gin_file=a", "--model_dir=x", "--package=none"], "no folder"),
        (["--gin_file=gin/shapes_stage1.gin", "--model_dir=x", "--gin.LEARNING_RAT=1", "--dry_run"],
         "LEARNING_RATE"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_status_2(monkeypatch, capsys, flags, part):
    monkeypatch.chdir(experiments.REPOSITORY)
    assert local.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and part in err


class RealRuns:
    """The digits recipe on two processes of four devices, by the command line."""

    STEPS, PERIOD = 40, 4

    def __init__(self, folder):
        self.workspace = experiments.digits_dir(str(folder))

    def start(self, name, *flags, macros=()):
        bindings = [
            *experiments.UNEVALUATED, f"TRAIN_STEPS = {self.STEPS}", "LOG_PERIOD = 1",
            f"CHECKPOINT_PERIOD = {self.PERIOD}", "IMAGE_MASK_RATIO = 0.5", *macros,
        ]  # fmt: skip
        spec = job.JobSpec(
            (f"{experiments.GIN}/digits_stage1.gin",),
            name,
            gin_bindings=tuple(bindings),
            gin_search_paths=(str(experiments.GIN),),
            arguments=("--peer_timeout_seconds=15", "--join_timeout_seconds=120"),
            restarts=job.RestartPolicy(max_restarts=3, first_delay=1),
        )
        path = pathlib.Path(self.workspace, f"{name}.yaml")
        path.write_text(spec.as_yaml())
        launcher = [sys.executable, "-m", "launch.local", f"--job={path.name}"]
        return subprocess.Popen(
            [*launcher, "--num_processes=2", "--devices_per_process=4", *flags],
            cwd=self.workspace,
            env=experiments.environment(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, process):
        out, _ = process.communicate(timeout=900)
        return process.returncode, out

    def steps(self, name):
        path = pathlib.Path(self.workspace, name, "metrics.jsonl")
        return path.read_text().count('"group": "train"') if path.exists() else 0

    def trainer(self, name, index):
        """The number of a trainer's process."""
        words = (f"--gin_bindings=MODEL_DIR = {name!r}", f"--process_index={index}")
        return wait_for(lambda: find_trainers(self.workspace, *words))[0]


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory):
    return RealRuns(tmp_path_factory.mktemp("real"))


@pytest.mark.slow
def test_one_of_two_real_processes_is_killed_and_the_run_comes_to_the_same_end(real_runs):
    status, out = real_runs.end(real_runs.start("whole"))
    assert status == 0, out[-4000:]
    disturbed = real_runs.start("disturbed")
    for killed, steps in ((1, 6), (0, 14)):
        wait_for(lambda steps=steps: real_runs.steps("disturbed") > steps, 600)
        os.kill(real_runs.trainer("disturbed", killed), signal.SIGKILL)
    status, out = real_runs.end(disturbed)
    assert status == 0, out[-4000:]
    said = [line for line in out.splitlines() if line.startswith("launch: ")]
    print("\n".join(said))
    # Both ended by themselves, both were begun again, twice.
    for killed in (1, 0):
        assert sum(f"process {killed} ended with status 137" in line for line in said) == 1
        assert sum(f"process {1 - killed} ended with status 75" in line for line in said) == 1
    assert not any("did not end" in line for line in said)
    assert "done after 3 starts" in said[-1]
    ends = [
        experiments.saved_state(os.path.join(real_runs.workspace, name), real_runs.STEPS)
        for name in ("whole", "disturbed")
    ]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        np.testing.assert_array_equal(value, ends[1][name], err_msg=name)


@pytest.mark.slow
def test_a_real_run_stops_on_a_signal_and_goes_on_when_given_again(real_runs):
    stopped = real_runs.start("stopped")
    wait_for(lambda: real_runs.steps("stopped") > 5, 600)
    stopped.send_signal(signal.SIGTERM)
    status, out = real_runs.end(stopped)
    assert status == 75, out[-4000:]
    assert "given again, the command goes on" in out
    saved = real_runs.steps("stopped")
    status, out = real_runs.end(real_runs.start("stopped"))
    assert status == 0, out[-4000:]
    # Nothing was done twice: it was saved where it stopped.
    assert real_runs.steps("stopped") == real_runs.STEPS > saved


@pytest.mark.slow
def test_nothing_real_outlives_a_killed_launcher(real_runs):
    launcher = real_runs.start("orphans")
    wait_for(lambda: real_runs.steps("orphans") > 0, 600)
    trainers = [real_runs.trainer("orphans", i) for i in (0, 1)]
    launcher.kill()
    launcher.wait()
    all_gone(trainers)


@pytest.mark.slow
def test_a_recipe_that_does_not_train_ends_with_status_2(real_runs):
    process = real_runs.start("wrong", macros=["LEARNING_RAT = 1"])
    status, out = real_runs.end(process)
    assert status == 2 and "[0] error: " in out and "Did you mean LEARNING_RATE?" in out
    assert "Traceback" not in out and "start 2" not in out
