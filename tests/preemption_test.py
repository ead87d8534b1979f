import os
import signal
import threading
import time

import programs
import pytest

from clipa_t5x import preemption


def _wait(stop):
    for _ in range(1000):
        if stop.requested():
            return
        time.sleep(0.005)
    raise AssertionError("nothing was requested")


@pytest.mark.parametrize("signum", preemption.SIGNALS)
def test_a_signal_is_a_request_and_handlers_come_back(signum, capfd):
    before = {s: signal.getsignal(s) for s in preemption.SIGNALS}
    with preemption.stop_requests() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signum)
        _wait(stop)
        assert stop.requested()
    assert {s: signal.getsignal(s) for s in preemption.SIGNALS} == before
    assert f"{signal.Signals(signum).name}: the run will finish its step" in capfd.readouterr().err
    with preemption.stop_requests() as stop:  # A later run knows nothing of it.
        assert not stop.requested()


def test_signals_are_the_inner_contexts():
    names = []
    with preemption.signals_end_the_process(names.append):
        with preemption.stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            _wait(stop)
        assert not names
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            if names:
                break
            time.sleep(0.005)
    assert names == ["SIGINT"]


def test_other_threads_hear_no_signals_and_break_nothing():
    answers = []

    def run():
        with preemption.stop_requests() as stop:
            answers.append(stop.requested())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [False]


def test_polls_are_cheap():
    with preemption.stop_requests() as stop:
        start = time.perf_counter()
        for _ in range(1000):
            stop.requested()
        assert time.perf_counter() - start < 0.1


STUCK = """
import ctypes, threading
from clipa_t5x import preemption
with preemption.stop_requests() as stop:
    print("stuck", flush=True)
    never = threading.Lock()
    never.acquire()
    never.acquire()
"""


def test_the_second_signal_ends_a_process_that_is_stuck():
    with programs.alone(STUCK) as program:
        program.wait_for_line("stuck")
        program.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert program.process.poll() is None
        program.process.send_signal(signal.SIGINT)
        status, _, err = program.end()
    assert status == 128 + signal.SIGINT
    assert "ending at once" in err


# One process is slower than the other, and all waits are in collectives.
STEPS = """
with preemption.stop_requests() as stop:
    start = time.perf_counter()
    for _ in range(1000):
        stop.requested()
    microseconds = 1000 * (time.perf_counter() - start)
    steps = 0
    while not stop.requested():
        step()
        steps += 1
        time.sleep(0.002 * index)
        if steps == 10:
            print("stepping")
print(steps, microseconds)
peers.leave()
"""


@pytest.mark.parametrize(
    "victim, signum",
    [(1, signal.SIGTERM), pytest.param(0, signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_signal_to_any_process_stops_all_at_the_same_step(victim, signum):
    with programs.joined(STEPS) as both:
        for program in both:
            program.wait_for_line("stepping")
        both[victim].process.send_signal(signum)
        ends = [program.end() for program in both]
    assert [status for status, _, _ in ends] == [0, 0], ends
    steps, microseconds = zip(*(out.split() for _, out, _ in ends), strict=True)
    assert steps[0] == steps[1]
    assert max(map(float, microseconds)) < 500


def test_jax_s_own_notice_stops_all_too():
    """What jax's service hears before, or instead of, Python: here through its handler in C."""
    early = """
jax._src.distributed.global_state.preemption_sync_manager.shutdown()
manager = jax._src.lib._jax.create_preemption_sync_manager()
manager.initialize(jax._src.distributed.global_state.client)
jax._src.distributed.global_state.preemption_sync_manager = manager
if index == 1:
    os.kill(os.getpid(), signal.SIGTERM)
"""
    with programs.joined(early + STEPS) as both:
        ends = [program.end() for program in both]
    assert [status for status, _, _ in ends] == [0, 0], ends
    steps = {out.split()[-2] for _, out, _ in ends}
    assert len(steps) == 1


def test_no_thread_is_left_in_native_code_when_python_ends():
    """One that comes back from there then aborts the process, which was done."""
    code = """
import atexit
with preemption.stop_requests():
    step()
time.sleep(index)
peers.leave()
atexit._run_exitfuncs()
print([thread.name for thread in threading.enumerate() if thread.name == "stop"])
"""
    with programs.joined(code) as both:
        ends = [program.end() for program in both]
    assert [(status, out.splitlines()[-1]) for status, out, _ in ends] == [(0, "[]")] * 2, ends
