"""A guard passes on signals and the status, and ends its command's group with its launcher."""

import os
import signal
import subprocess
import sys

import pytest
from process_families import FAMILY, PYTHON, all_gone, read_pids

from launch import guard


def start(code, *arguments):
    command = [*PYTHON, guard.__file__, *PYTHON, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(75)", 75),
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", 134),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_the_status_is_the_commands(code, status):
    assert start(code).wait(30) == status


def test_what_cannot_be_run_is_told_in_a_line():
    command = [*PYTHON, guard.__file__, "/none/such"]
    result = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert result.returncode == guard.NOT_FOUND
    assert result.stderr == "error: /none/such cannot be run: No such file or directory.\n"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_go_on_to_the_command_alone(tmp_path, signum):
    """Its child is left to it: workers that a signal ends would fail the save."""
    code = """
import os, pathlib, signal, sys, time
signum, folder = int(sys.argv[2]), pathlib.Path(sys.argv[1])
child = os.fork()
if child == 0:
    signal.signal(signum, lambda *_: (folder / "told").touch())
def end(*_):
    time.sleep(0.3)
    os._exit(75)
if child:
    signal.signal(signum, end)
(folder / f"{os.getpid()}.pid").write_text(str(os.getpid()))
time.sleep(600)
"""
    process = start(code, tmp_path, int(signum))
    pids = read_pids(tmp_path, 2)
    process.send_signal(signum)
    assert process.wait(30) == 75
    assert not (tmp_path / "told").exists()
    # And what it leaves behind is killed.
    all_gone(pids)


def test_a_closed_pipe_kills_the_whole_group(tmp_path):
    process = start(FAMILY, tmp_path)
    pids = read_pids(tmp_path, 2)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 137
    all_gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="by Linux's PR_SET_PDEATHSIG")
def test_a_killed_guard_takes_its_command_along(tmp_path):
    code = FAMILY.replace("child = os.fork()", "")
    process = start(code, tmp_path)
    pids = read_pids(tmp_path, 1)
    process.kill()
    all_gone(pids)
    assert process.wait(30) == -signal.SIGKILL


def test_the_command_has_a_group_of_its_own(tmp_path):
    process = start(FAMILY, tmp_path)
    pids = read_pids(tmp_path, 2)
    groups = {os.getpgid(pid) for pid in pids}
    assert len(groups) == 1 and not groups & {os.getpgid(0), os.getpgid(process.pid)}
    assert process.stdin is not None
    process.stdin.close()
    process.wait(30)
