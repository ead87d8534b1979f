import signal
import time

import programs
import pytest

from clipa_t5x import peers, preemption


def test_jax_s_service_waits_longer():
    for timeout in (10, 100, 3600):
        assert peers.service_timeout(timeout) / 2 > timeout


def test_errors_that_a_loss_can_cause():
    gloo = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]")
    assert peers.may_come_from_a_loss(gloo)
    wrapped = RuntimeError("a save failed")
    wrapped.__cause__ = gloo
    assert peers.may_come_from_a_loss(wrapped)
    for own in ("RESOURCE_EXHAUSTED: out of memory", "INVALID_ARGUMENT: shapes", "a bug"):
        assert not peers.may_come_from_a_loss(ValueError(own))


# Waits in a collective, or where no error would ever come.
IN_COLLECTIVES = """
print("running")
def run():
    while True:
        step()
        time.sleep(0.01)
status = 1
try:
    run()
except Exception as error:
    peers.end_if_lost(error, 10)
peers.abandon(1, "failed")
"""
IN_A_LOCK = """
print("running")
never = threading.Lock()
never.acquire()
never.acquire()
"""


@pytest.mark.parametrize(
    "code, victim",
    [
        (IN_COLLECTIVES, 0),
        (IN_A_LOCK, 1),
        pytest.param(IN_COLLECTIVES, 1, marks=pytest.mark.slow),
        pytest.param(IN_A_LOCK, 0, marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_ends_the_other_to_be_started_again(code, victim):
    with programs.joined(code) as both:
        for program in both:
            program.wait_for_line("running")
        time.sleep(0.5)
        both[victim].process.send_signal(signal.SIGKILL)
        survivor = both[1 - victim]
        seconds = programs.seconds_until_all_end([survivor], timeout=60)
        status, _, err = survivor.end()
    assert status == preemption.RESTART_STATUS, err[-4000:]
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f"process {victim}" in line
    assert "Start all processes of the run again" in line
    assert seconds < 10 + 2  # Of the machine's own slowness.


def test_a_process_that_fails_tells_the_others_at_once():
    code = """
print("running")
if index == 1:
    peers.abandon(1, "failed (KeyError)")
threading.Event().wait()
"""
    with programs.joined(code) as both:
        for program in both:
            program.wait_for_line("running")
        assert programs.seconds_until_all_end(both, timeout=60) < 10
        ends = [program.end() for program in both]
    assert [status for status, _, _ in ends] == [preemption.RESTART_STATUS, 1]
    assert "error: process 1 failed (KeyError)" in ends[0][2]


def test_process_0_keeps_its_own_status_and_tells_the_others():
    code = """
print("running")
if index == 0:
    peers.abandon(2, "was given something wrong")
threading.Event().wait()
"""
    with programs.joined(code) as both:
        for program in both:
            program.wait_for_line("running")
        ends = [program.end() for program in both]
    assert [status for status, _, _ in ends] == [2, preemption.RESTART_STATUS]
    assert "error: process 0 was given something wrong" in ends[1][2]


def test_leaving_in_good_order_is_no_loss():
    code = """
step()
if index == 1:
    time.sleep(3)
peers.leave()
sys.exit(75)
"""
    with programs.joined(code) as both:
        ends = [program.end() for program in both]
    assert [(status, "error: " in err) for status, _, err in ends] == [(75, False)] * 2, ends
