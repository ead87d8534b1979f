"""The very lines that workers get, run by bash in a folder for each of two workers."""

import ast
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from process_families import wait_for
from saved_runs import one_line_error

from clipa_t5x import processes
from launch import job, package
from launch.controller import GONE, UnreachableError
from launch.workers import Plan, ShellWorkers

HOSTILE = ["", " ", "it's", 'a "b" c', "$(touch pwned) `touch pwned`", "a;touch pwned&", "a\nb",
           "\\", "*", "-n", "é日🙂", "$HOME", "!!", "\t'\"'\"'"]  # fmt: skip


def reach_in(folder):
    """Has bash run a line as a worker's shell would, at home in a folder of the worker's own."""

    def reach(worker, line):
        home = folder / f"worker{worker}"
        home.mkdir(exist_ok=True)
        path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
        return ["env", "-i", "-C", str(home), f"HOME={home}", f"PATH={path}", "bash", "-c", line]

    return reach


def workers_of(folder, *command, count=2, **given):
    said = []
    plan = Plan("my-run", tuple(command), **given)
    return ShellWorkers(plan, count, reach_in(folder), say=said.append), said


def ended(workers):
    def statuses():
        found = [start.status for start in workers.look()]
        return None not in found and found

    return wait_for(statuses, 20)


def test_hostile_values_arrive_as_they_are(tmp_path):
    code = "import sys, os; print(ascii(sys.argv[1:])); print(ascii(sorted(os.environ.items())))"
    environment = {f"A{i}": value for i, value in enumerate(HOSTILE)}
    workers, said = workers_of(
        tmp_path, "python", "-c", code, *HOSTILE, count=1, environment=tuple(environment.items())
    )
    workers.start(1, 0)
    assert ended(workers) == [0]
    assert said[0] == f"[0] {ascii(HOSTILE)}"
    assert environment.items() <= dict(ast.literal_eval(said[1][4:])).items()
    assert not list(tmp_path.rglob("pwned"))


def test_the_package_arrives_whole_and_is_set_up_once(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "it's a module.py").write_text("print('run')")
    (source / "untracked").write_text("a secret")
    for command in (["init", "-q"], ["add", "it's a module.py"]):
        subprocess.run(["git", "-C", str(source), *command], check=True)
    workers, said = workers_of(
        tmp_path, "python", "it's a module.py",
        package=package.pack(str(source)), setup="echo once >>$HOME/set_up; echo 'to stdout'",
    )  # fmt: skip
    workers.prepare()
    workers.prepare()
    workers.start(1, 0)
    assert ended(workers) == [0, 0] and said == ["[0] run"]
    for i in range(2):
        assert (tmp_path / f"worker{i}/set_up").read_text() == "once\n"
    assert not list((tmp_path / "worker0").rglob("untracked"))
    broken, said = workers_of(tmp_path, "true", package=package.pack(str(source)), setup="x")
    broken.prepare()  # It is the same package, and set up.
    (source / "it's a module.py").write_text("print('other')")
    broken, said = workers_of(
        tmp_path, "true", package=package.pack(str(source)), setup="echo why >&2; exit 255"
    )
    one_line_error(broken.prepare, "worker 0 cannot run the job: why")


def test_a_start_is_begun_once_and_the_next_one_has_its_own_log(tmp_path):
    workers, said = workers_of(tmp_path, "bash", "-c", "echo $$ >>$HOME/runs; echo hi; exit 75")
    assert [start.number for start in workers.look()] == [0, 0]
    workers.start(1, 0)
    workers.start(1, 0)
    assert ended(workers) == [75, 75]
    workers.start(1, 0)
    workers.start(2, 7)
    assert ended(workers) == [75, 75] and said == ["[0] hi", "[0] hi"]
    start = workers.look()[1]
    assert (start.number, start.restarts, start.command) == (2, 7, workers.fingerprint)
    for i in range(2):
        assert len((tmp_path / f"worker{i}/runs").read_text().split()) == 2


def test_lines_of_others_are_shown_where_they_fail(tmp_path):
    code = "for i in $(seq 30); do echo line $i; done; printf end; exit $(cat $HOME/status)"
    workers, said = workers_of(tmp_path, "bash", "-c", code, count=3)
    workers.look()
    for i, status in enumerate([0, 75, 1]):
        (tmp_path / f"worker{i}/status").write_text(f"{status}")
    workers.start(1, 0)
    assert ended(workers) == [0, 75, 1]
    shown = [f"[0] line {i}" for i in range(1, 31)] + ["[0] end"]
    assert said == shown + [f"[2] line {i}" for i in range(12, 31)] + ["[2] end"]
    ended(workers)
    assert len(said) == 51


def test_long_logs_come_whole_and_to_a_late_reader_their_end(tmp_path):
    code = "print(*(str(i).zfill(99) for i in range(9000)), sep='\\n')"
    workers, said = workers_of(tmp_path, "python", "-c", code, count=1)
    workers.look()
    workers.start(1, 0)
    assert ended(workers) == [0]
    assert said == [f"[0] {i:099}" for i in range(9000)]
    late, last = workers_of(tmp_path, "python", "-c", code, count=1)
    late.look()
    assert 600 < len(last) < 700 and last[1:] == said[-len(last) + 1 :]


def test_signals_go_to_the_start_alone_and_once(tmp_path):
    # One that leaves the group, as a stranger's process would be, and one that is in it.
    code = """
import os, signal, subprocess, sys, time
stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
child = subprocess.Popen(["sleep", "60"])
count = 0
def handle(*_):
    global count
    count += 1
signal.signal(signal.SIGTERM, handle)
print(stranger.pid, child.pid, flush=True)
while not count: time.sleep(.02)
time.sleep(.3)
print("signals", count, flush=True)
sys.exit(75)
"""
    workers, said = workers_of(tmp_path, "python", "-c", code, count=1)
    workers.start(1, 0)
    wait_for(lambda: workers.look() and said, 20)
    stranger, child = map(int, said[0].split()[1:])
    try:
        workers.signal(1, "TERM", "stopped")
        workers.signal(1, "TERM")
        assert ended(workers) == [75] and said[1] == "[0] signals 1"
        assert workers.look()[0].is_stopped
        assert processes.start_ticks(stranger) is not None
        wait_for(lambda: processes.start_ticks(child) is None, 20)
    finally:
        os.kill(stranger, signal.SIGKILL)


def test_what_is_killed_is_gone_with_all_its_group(tmp_path):
    workers, said = workers_of(tmp_path, "bash", "-c", "sleep 60 & echo $!; wait", count=1)
    workers.start(1, 0)
    wait_for(lambda: workers.look() and said, 20)
    assert [start.status for start in workers.look()] == [None]
    child = int(said[0].split()[1])
    workers.signal(1, "KILL")
    assert ended(workers) == [GONE]
    wait_for(lambda: processes.start_ticks(child) is None, 20)


def test_the_number_of_another_process_is_no_target(tmp_path):
    workers, _ = workers_of(tmp_path, "sleep", "60", count=1)
    workers.start(1, 0)
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    path = tmp_path / "worker0/clipa_t5x/my-run/start-00001/pid"
    pid, began = map(int, path.read_text().split())
    try:
        # As after a reboot: the number is given away, and what has it began at another time.
        path.write_text(f"{stranger.pid} {began - 1}\n")
        assert [start.status for start in workers.look()] == [GONE]
        workers.signal(1, "TERM")
        workers.signal(1, "KILL")
        time.sleep(0.2)
        assert stranger.poll() is None and processes.start_ticks(pid) is not None
    finally:
        stranger.kill()
        stranger.wait()
        os.killpg(pid, signal.SIGKILL)


def test_workers_that_cannot_be_reached(tmp_path):
    plan = Plan("my-run", ("true",))
    broken = ShellWorkers(plan, 2, lambda worker, line: ["bash", "-c", "echo lost >&2; exit 255"])
    with pytest.raises(UnreachableError, match="worker 0: lost"):
        broken.look()
    silent = ShellWorkers(plan, 1, lambda worker, line: ["true"])
    with pytest.raises(UnreachableError, match="answered b''"):
        silent.look()
    absent = ShellWorkers(plan, 1, lambda worker, line: ["no-such-ssh", line])
    one_line_error(absent.look, "no-such-ssh is not installed")


def test_a_command_without_a_package_runs_at_home(tmp_path):
    workers, said = workers_of(tmp_path, "pwd", count=1)
    workers.prepare()
    workers.start(1, 0)
    assert ended(workers) == [0] and said == [f"[0] {tmp_path}/worker0"]


def test_what_cannot_be_started_ends_with_a_status(tmp_path):
    workers, said = workers_of(tmp_path, "no-such-command", count=1)
    workers.start(1, 0)
    assert ended(workers) == [127] and "no-such-command" in said[0]
    assert job.quoted(["a b"]) == "'a b'"
