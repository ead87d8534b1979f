"""Processes of one start: their lines, their statuses, their ends."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from process_families import FAMILY, PYTHON, all_gone, read_pids, wait_for
from saved_runs import one_line_error

from launch import process_group

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def a_terminal():
    """Where tests run without one, SIGHUP is ignored, and stays so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def command(tmp_path, index, code, *arguments, **environment):
    return process_group.Command(
        (*PYTHON, "-c", code, *map(str, arguments)), environment, tmp_path / f"process_{index}.log"
    )


def attend(tmp_path, *commands, signals=(), patience=60.0):
    """(statuses, lines that were shown, what was said, seconds)"""
    shown, said, begun = [], [], time.monotonic()
    group = process_group.ProcessGroup(
        commands, str(tmp_path), lambda number, line: shown.append((number, line))
    )
    with group:
        statuses = process_group.attend(group, signals, patience, said.append)
    return statuses, shown, said, time.monotonic() - begun


def test_lines_are_shown_as_they_are_and_kept(tmp_path):
    code = r"""
import os, sys
os.write(1, b"a\xff\r\n")
os.write(2, sys.argv[1].encode())
os.write(1, b"!")
"""
    commands = [command(tmp_path, i, code, f"of {i}\n") for i in range(2)]
    (tmp_path / "process_0.log").write_text("of an earlier start\n")
    statuses, shown, _, _ = attend(tmp_path, *commands)
    assert statuses == [0, 0]
    for i in range(2):
        assert [line for number, line in shown if number == i] == ["a\ufffd", f"of {i}", "!"]
    log = (tmp_path / "process_0.log").read_bytes()
    assert log == b"of an earlier start\na\xff\r\nof 0\n!"


def test_processes_get_their_environment_and_folder(tmp_path):
    code = "import os; print(os.environ['A'], os.environ['PATH'], os.getcwd())"
    _, shown, _, _ = attend(tmp_path, command(tmp_path, 0, code, A="b c"))
    assert shown == [(0, f"b c {os.environ['PATH']} {tmp_path}")]


def test_others_have_their_time_when_one_has_failed(tmp_path):
    failing = command(tmp_path, 0, "raise SystemExit(75)")
    slow = command(tmp_path, 1, "import time; time.sleep(0.5); raise SystemExit(134)")
    statuses, _, said, _ = attend(tmp_path, failing, slow)
    assert statuses == [75, 134]
    assert "process 0 ended with status 75" in said[0] and "may take 60 s" in said[1]
    assert "process 1 ended with status 134 (SIGABRT)" in said[2]


def test_those_that_do_not_end_are_killed(tmp_path):
    failing = command(tmp_path, 0, "raise SystemExit(75)")
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    statuses, _, said, seconds = attend(
        tmp_path, failing, command(tmp_path, 1, stubborn), patience=0.5
    )
    assert statuses == [75, 137] and seconds < 30
    assert any("killing 1 that did not end" in line for line in said)


def test_one_that_is_done_leaves_the_others_their_time(tmp_path):
    done = command(tmp_path, 0, "")
    slow = command(tmp_path, 1, "import time; time.sleep(0.7)")
    assert attend(tmp_path, done, slow, patience=0.1)[0] == [0, 0]


# Ends with 75 on SIGTERM, after a while, as one that saves.
SAVING = """
import os, pathlib, signal, sys, time
def end(*_):
    time.sleep(float(sys.argv[2]))
    print("saved", flush=True)
    os._exit(75)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1], f"{os.getpid()}.pid").write_text(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_goes_on_to_all(tmp_path, signum):
    def send():
        read_pids(tmp_path, 2)
        os.kill(os.getpid(), signum)

    commands = [command(tmp_path, i, SAVING, tmp_path, 0.2) for i in range(2)]
    with process_group.received_signals() as signals:
        threading.Thread(target=send).start()
        statuses, shown, said, _ = attend(tmp_path, *commands, signals=signals)
    assert statuses == [75, 75] and sorted(shown) == [(0, "saved"), (1, "saved")]
    assert any(signum.name in line and "2 processes are told" in line for line in said)


def test_the_second_signal_kills(tmp_path):
    def send():
        pids = read_pids(tmp_path, 2)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: len(signals) == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        all_gone(pids)

    commands = [command(tmp_path, i, SAVING, tmp_path, 600) for i in range(2)]
    with process_group.received_signals() as signals:
        thread = threading.Thread(target=send)
        thread.start()
        statuses, _, said, seconds = attend(tmp_path, *commands, signals=signals)
    thread.join()
    assert statuses == [137, 137] and seconds < 60
    assert any("SIGTERM again: killing 2" in line for line in said)


def test_a_closed_terminal_is_one_request_however_often_it_says_so():
    before = signal.getsignal(signal.SIGHUP)
    with process_group.received_signals() as signals:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: len(signals) > 1)
    assert signals == [signal.SIGHUP, signal.SIGINT]
    assert signal.getsignal(signal.SIGHUP) == before


def test_nothing_outlives_a_launcher_that_is_killed(tmp_path):
    launcher = f"""
import pathlib, sys
from launch import process_group
family, tmp = {FAMILY!r}, pathlib.Path({str(tmp_path)!r})
commands = [
    process_group.Command((*{PYTHON!r}, "-c", family, str(tmp)), {{}}, tmp / f"{{i}}.log")
    for i in range(2)
]
group = process_group.ProcessGroup(commands, str(tmp), print)
process_group.attend(group, [], 60, print)
"""
    process = subprocess.Popen([sys.executable, "-S", "-c", launcher], cwd=ROOT)
    pids = read_pids(tmp_path, 4)
    process.kill()
    process.wait()
    all_gone(pids)


def test_a_group_that_is_left_is_killed(tmp_path):
    with process_group.ProcessGroup(
        [command(tmp_path, 0, FAMILY, tmp_path)], str(tmp_path), lambda number, line: None
    ) as group:
        pids = read_pids(tmp_path, 2)
    all_gone(pids)
    assert group.statuses == [137]


def test_a_log_that_cannot_be_written_is_a_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    wrong = process_group.Command((*PYTHON, "-c", ""), {}, tmp_path / "file" / "log")
    one_line_error(
        lambda: process_group.ProcessGroup([wrong], str(tmp_path), print), "file/log", "written"
    )


@pytest.mark.parametrize(
    ("status", "text"), [(75, "75"), (137, "137 (SIGKILL)"), (-6, "-6 (SIGABRT)"), (255, "255")]
)
def test_statuses_are_described(status, text):
    assert process_group.described(status) == text
