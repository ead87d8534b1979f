"""Every end of a job leads to another start or to a stated failure, and there is an end to it."""

import pytest

from launch.job import RestartPolicy
from launch.restarts import Decision, Restarts

POLICY = RestartPolicy(max_restarts=5, first_delay=2, max_delay=6, healthy_seconds=100)


@pytest.mark.parametrize("statuses", [[75], [0, 75], [134, 75], [-9], [137, 75, 0], [143], [-15]])
def test_what_is_begun_again(statuses):
    assert Restarts(POLICY).after(statuses, 1) == Decision(2)


@pytest.mark.parametrize("statuses", [[1], [2], [75, 1], [-11, 75], [139], [127]])
def test_what_no_restart_mends(statuses):
    decision = Restarts(POLICY).after(statuses, 1)
    assert decision.delay is None and "which no restart mends" in decision.failure


def test_done_is_done():
    assert Restarts(POLICY).after([0, 0], 1) == Decision(None)


def test_delays_grow_with_short_lives_and_begin_anew_after_a_long_one():
    restarts = Restarts(POLICY)
    delays = [restarts.after([75], lived).delay for lived in (1, 1, 1, 100, 1)]
    assert delays == [2, 4, 6, 2, 4]
    last = restarts.after([75], 1)
    assert last.delay is None and "after 5 restarts (max_restarts = 5)" in last.failure
    assert restarts.count == 5


def test_delays_of_any_number_of_lives_are_bounded():
    assert RestartPolicy().delay(10_000) == RestartPolicy().max_delay
