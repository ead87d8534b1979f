import contextlib
import re
import threading
import time

import programs
import pytest

from clipa_t5x import preemption, watchdog
from clipa_t5x.errors import UserError


def blocked_in_a_lock(lock):
    with lock:
        pass


def test_a_hang_is_told_once_for_each_timeout_with_all_stacks(tmp_path, capfd):
    lock = threading.Lock()
    path = tmp_path / "hang_0.txt"
    with watchdog.Watchdog(timeout_seconds=1).watching(str(tmp_path)) as watch:
        watch.completed(41)
        watch.beat("saving step 41")
        with lock:
            thread = threading.Thread(target=blocked_in_a_lock, args=(lock,))
            thread.start()
            time.sleep(2.7)
        thread.join()
    err = capfd.readouterr().err
    reports = re.findall(r"Nothing got done for (\d) s .* since (.*);.* step is (\d+)", err)
    assert reports == [("1", "saving step 41", "41"), ("2", "saving step 41", "41")]
    assert "blocked_in_a_lock" in path.read_text()
    assert "blocked_in_a_lock" in err
    time.sleep(1.5)  # It has stopped.
    assert not capfd.readouterr().err


def test_whatever_gets_done_keeps_it_quiet(tmp_path, capfd):
    with watchdog.Watchdog(timeout_seconds=1).watching(str(tmp_path)) as watch:
        for step in range(8):
            time.sleep(0.3)
            watch.completed(step) if step % 2 else watch.beat("a batch of an evaluation")
    assert not list(tmp_path.iterdir())
    assert "Nothing got done" not in capfd.readouterr().err


def test_storage_that_fails_does_not_hide_the_report(tmp_path, capfd):
    folder = tmp_path / "file"
    folder.write_text("no folder")
    with watchdog.Watchdog(timeout_seconds=1).watching(str(folder)):
        time.sleep(1.5)
    assert "the last completed step is none" in capfd.readouterr().err


def test_without_a_timeout_nothing_watches(tmp_path):
    before = threading.active_count()
    with watchdog.Watchdog(timeout_seconds=None).watching(str(tmp_path)) as watch:
        watch.completed(1)
        assert threading.active_count() == before


@pytest.mark.parametrize(
    "kwargs, name",
    [
        ({"timeout_seconds": 0}, "HANG_TIMEOUT is 0"),
        ({"timeout_seconds": "1h"}, "HANG_TIMEOUT is '1h'"),
        ({"abort": "yes"}, "ABORT_ON_HANG is 'yes'"),
    ],
)
def test_what_is_no_time_is_refused(kwargs, name):
    with pytest.raises(UserError, match=name):
        watchdog.Watchdog(**kwargs)


HANG = """
import ctypes, sys, threading, time
import jax
from clipa_t5x import watchdog
watchdog._WRITE_SECONDS = 1.0

def lock():
    never = threading.Lock()
    never.acquire()
    never.acquire()

def sleep():
    time.sleep(1000)

def callback():
    call = lambda x: (time.sleep(1000), x)[1]
    f = jax.jit(lambda x: jax.pure_callback(call, jax.ShapeDtypeStruct((), "float32"), x))
    jax.block_until_ready(f(jax.numpy.float32(1)))

def interpreter_held():
    ctypes.PyDLL(None).sleep(1000)

with watchdog.Watchdog(timeout_seconds=2, abort=True).watching(sys.argv[2]) as watch:
    watch.completed(7)
    globals()[sys.argv[1]]()
"""


def test_a_hang_can_end_the_process_wherever_it_is(tmp_path):
    names = ("lock", "sleep", "callback", "interpreter_held")
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(programs.alone(HANG, name, str(tmp_path / name)))
            for name in names
        }
        for name in names:
            (tmp_path / name).mkdir()
        ends = {name: program.end() for name, program in running.items()}
    for name, (status, _, err) in ends.items():
        assert name in err, err  # A stack of its function.
        if name == "interpreter_held":
            assert status == -6
        else:
            assert status == preemption.RESTART_STATUS
            assert "the last completed step is 7" in (tmp_path / name / "hang_0.txt").read_text()
