"""The controller and the official client against the service's messages, through all troubles."""

import dataclasses
import itertools
import random

import grpc
import pytest
from saved_runs import one_line_error

from clipa_t5x.errors import UserError
from launch.controller import Start

pytest.importorskip("google.cloud.tpu_v2", reason="google-cloud-tpu is not installed")

from fake_tpu import Fate  # noqa: E402
from rented_machines import (  # noqa: E402
    MACHINES,
    PLACE,
    POLICY,
    KilledError,
    ToldWorkers,
    Trainer,
    World,
)

from launch import cloud_tpu  # noqa: E402

CODE = grpc.StatusCode


@pytest.fixture
def world(server):
    world = World(server)
    yield world
    assert not world.tpu.mistakes


def test_a_job_from_the_queue_to_its_end(world):
    world.tpu.fates.append(Fate(waits=7200, provisions=300, deletes=120))
    assert world.run()
    assert not world.tpu.left and world.trainer.saved == 3600 and world.trainer.starts == 1
    assert world.said[:3] == [
        "Machines: WAITING_FOR_RESOURCES, after 5 s.",
        "Machines: PROVISIONING, after 2.0 h.",
        "Machines: ACTIVE, after 2.1 h.",
    ]


@pytest.mark.parametrize("how", ["SUSPENDED", "PREEMPTED", "TERMINATED", "gone"])
def test_preempted_machines_are_given_back_and_others_rented(world, how):
    world.tpu.fates.extend([Fate(preempted=1000, how=how, deletes=60), Fate()])
    assert world.run()
    assert not world.tpu.left and world.tpu.most_live == 1
    assert world.trainer.starts == 2 and world.trainer.saved == 3600
    assert world.controllers[0].restarts == 1


def test_the_restart_status_begins_again_on_the_same_machines(world):
    world.trainer.ends = [(1000, [75, 75]), (500, [75, 134])]
    assert world.run()
    assert world.trainer.starts == 3 and world.tpu.calls["create_queued_resource"] == 1


def test_machines_on_which_nothing_lives_long_are_changed(world):
    world.trainer.ends = [(60, [75, -9])] * 3
    assert world.run()
    assert world.tpu.calls["create_queued_resource"] == 2 and world.controllers[0].restarts == 3
    assert "3 short lives on these machines: others are rented." in world.said


def test_a_start_that_no_restart_mends_ends_the_job(world):
    world.trainer.ends = [(60, [1, 75])]
    one_line_error(world.run, "status 1, which no restart mends")
    assert not world.tpu.left and world.trainer.starts == 1


def test_restarts_are_bounded_and_farther_and_farther_apart(world):
    world.trainer.ends = [(1, [75, 75])] * 100
    one_line_error(world.run, "after 6 restarts (max_restarts = 6)")
    assert world.trainer.starts == 7 and not world.tpu.left
    delays = [line.split(", in ")[1] for line in world.said if ": restart " in line]
    assert delays == ["10 s.", "20 s.", "40 s.", "80 s.", "160 s.", "300 s."]


def test_the_others_of_a_lost_process_are_asked_to_end(world):
    calls = []

    class Half(ToldWorkers):
        def look(self):
            starts = super().look()
            life = self.machines["life"]
            if life and life.number == 1 and self.tpu.clock.time > life.began + 60:
                starts[0] = dataclasses.replace(starts[0], status=137)
            return starts

        def signal(self, number, name):
            calls.append((number, name))
            super().signal(number, name)

    original = world._workers
    world._workers = lambda resource: _as(Half, original(resource))
    assert world.run() and calls == [(1, "TERM")] and world.trainer.starts == 2


def _as(kind, workers):
    workers.__class__ = kind
    return workers


def test_workers_out_of_reach_are_waited_for_then_given_up(world):
    looks = itertools.count()
    world.unreachable = lambda: 5 < next(looks) < 15
    assert world.run() and world.controllers[0].restarts == 0
    world.unreachable = lambda: True
    one_line_error(world.run, "workers could not be reached", "after 6 restarts")
    assert not world.tpu.left


@pytest.mark.parametrize("field", ["refusal", "operation_error", "failure"])
def test_no_quota_leaves_nothing_behind(world, field):
    code = CODE.PERMISSION_DENIED if field == "failure" else CODE.RESOURCE_EXHAUSTED
    world.tpu.fates.append(Fate(**{field: (code, "Quota has been exceeded.")}))
    one_line_error(world.run, "Quota has been exceeded")
    assert not world.tpu.left and world.trainer.starts == 0


def test_quota_that_machines_just_given_back_still_hold_is_waited_for(world):
    full = (CODE.RESOURCE_EXHAUSTED, "Quota has been exceeded.")
    world.tpu.fates.extend([Fate(preempted=100), Fate(refusal=full), Fate(refusal=full)])
    assert world.run() and world.controllers[0].restarts == 3


def test_failed_requests_that_may_pass_are_made_again(world):
    world.tpu.fates.extend([Fate(failure=(CODE.INTERNAL, "Oops."))] * 2)
    assert world.run() and world.controllers[0].restarts == 2


def test_no_machines_for_too_long(world):
    world.tpu.fates.append(Fate(waits=1e9))
    one_line_error(
        world.run, "no machines after 12.0 h (WAITING_FOR_RESOURCES)", "--max_wait_hours"
    )
    assert not world.tpu.left


def delete_all(tpu):
    tpu.queued.clear()
    tpu.nodes.clear()


@pytest.mark.parametrize("when", [10, 500])
def test_machines_that_somebody_deletes_are_not_rented_again(world, when):
    world.tpu.fates.append(Fate(waits=120))
    advance = world.tpu._advance

    def deleted():
        advance()
        if world.clock.time > when and world.tpu.calls["get_queued_resource"] > 2:
            delete_all(world.tpu)

    world.tpu._advance = deleted
    one_line_error(world.run, "somebody deleted the job's machines")
    assert world.tpu.calls["create_queued_resource"] == 1


@pytest.mark.parametrize("when", [60, 1000])
def test_asked_to_stop_it_saves_gives_back_and_goes_on_another_time(world, when):
    world.tpu.fates.append(Fate(waits=300))
    sleep = world.clock.sleep

    def stop_then(seconds):
        sleep(seconds)
        if world.clock.time > when:
            world.clock.stop()

    world.clock.sleep = stop_then
    assert world.run() is False
    # Started at 305, asked at 1025 and ended 20 later, it keeps all that it trained until then.
    assert not world.tpu.left and world.trainer.saved == (0 if when < 300 else 1045 - 305)
    world.clock.sleep, world.clock.is_stopping = sleep, False
    assert world.run() and world.trainer.saved == 3600


def test_a_start_that_was_stopped_on_the_workers_is_not_begun_again(world):
    world.trainer.ends = [(300, [75, 75])]
    looks = itertools.count()

    def stop():
        for rented in world._rented.values():
            if rented["life"] and next(looks) == 2:
                rented["life"].is_stopped = True
        return False

    world.unreachable = stop
    assert world.run() is False
    assert world.trainer.starts == 1 and not world.tpu.left


def test_keep_leaves_the_machines(world):
    assert world.run(keep=True)
    assert len(world.tpu.left) == 2
    assert world.run() and not world.tpu.left and world.trainer.starts == 1


def test_machines_busy_with_another_command_are_left_alone(world):
    class Others(ToldWorkers):
        def look(self):
            return [Start(3, None, "another"), Start(3, None, "another")]

    original = world._workers
    world._workers = lambda resource: _as(Others, original(resource))
    world.controller()._cloud.create(0)
    one_line_error(world.run, "busy with another command", "choose another --name")
    assert len(world.tpu.left) == 2 and world.tpu.calls["delete_queued_resource"] == 0


def test_machines_that_somebody_else_asked_for_a_moment_earlier_are_left_alone(world):
    other = dataclasses.replace(MACHINES, accelerator_type="v5litepod-64")

    def another_is_faster(method):
        if method == "create_queued_resource" and not world.tpu.queued:
            request = cloud_tpu.creation(PLACE, other, 0)
            world.tpu.create_queued_resource(request, None)

    world.tpu.troubles = another_is_faster
    one_line_error(world.run, "has 1 x v5litepod-64", "choose another --name")
    assert len(world.tpu.left) == 2 and world.tpu.calls["delete_queued_resource"] == 0


@pytest.mark.parametrize("how", ["SUSPENDED", "PREEMPTED", "gone"])
def test_chip_hours_are_those_of_all_machines(world, how):
    """16 chips: for 1,000 s, and until what was saved at 900 s has become 3,600 s."""
    world.tpu.fates.append(Fate(preempted=1000, how=how, deletes=60))
    world.run(keep=True)
    labels = cloud_of(world)._labels(next(iter(world.tpu.queued.values())).message)
    first = int(labels["clipa_t5x-chip-seconds"]) / 16
    assert first == pytest.approx(1000, abs=120)
    expected = (first + 3600 - world.trainer.period * 3) * 16 / 3600
    assert cloud_of(world).meter.chip_hours == pytest.approx(expected, rel=0.03)
    # One that comes later knows as much.
    again = world.controller()._cloud
    again.find()
    assert again.meter.chip_hours == pytest.approx(expected, rel=0.03)


def cloud_of(world):
    return world.controllers[0]._cloud


def test_a_service_that_stays_away_ends_the_job_and_says_what_may_be_left(world):
    world.trainer.seconds = 1e6
    world.tpu.troubles = lambda method: (
        (CODE.UNAVAILABLE, "ask") if world.clock.time > 1000 else None
    )
    one_line_error(world.run, "has not answered", "launch.gce status")
    assert any("launch.gce status" in line for line in world.said)


# Random schedules.

ENDS = [[75, 75], [75, 75], [134, 75], [137, 75], [-9, -9], [0, 75], [143, 143]]
PASSING = [CODE.UNAVAILABLE, CODE.INTERNAL, CODE.DEADLINE_EXCEEDED, CODE.ABORTED, CODE.UNKNOWN]
LASTING = [CODE.PERMISSION_DENIED, CODE.INVALID_ARGUMENT, CODE.NOT_FOUND]


def draw_fate(rng, is_cruel):
    """What happens to one request for machines."""
    fate = Fate(
        waits=rng.choice([0, 30, 600, 20_000]),
        provisions=rng.choice([0, 200]),
        deletes=rng.choice([0, 0, 90, 1000]),
        orphans=rng.random() < 0.2,
        how=rng.choice(["SUSPENDED", "SUSPENDED", "PREEMPTED", "TERMINATED", "gone"]),
    )
    if rng.random() < (0.9 if is_cruel else 0.5):
        fate.preempted = rng.choice([0, 5, 60, 700, 2000])
    luck = rng.random()
    if luck < 0.05:
        fate.refusal = (CODE.RESOURCE_EXHAUSTED, "Quota.")
    elif luck < 0.07:
        fate.refusal = (rng.choice(LASTING), "Refused.")
    elif luck < 0.10:
        fate.operation_error = (rng.choice([CODE.RESOURCE_EXHAUSTED, *LASTING]), "Refused later.")
    elif luck < 0.18:
        fate.failure = (rng.choice([CODE.INTERNAL, CODE.UNAVAILABLE, *LASTING]), "Failed.")
    if rng.random() < 0.02:
        fate.waits = 1e7
    return fate


def draw_world(server, seed, machines):
    """A world in which everything goes wrong that can."""
    rng = random.Random(seed)
    is_cruel = rng.random() < 0.3
    trainer = Trainer(seconds=rng.choice([600, 3000, 9000]), period=rng.choice([100, 600]))
    for _ in range(rng.choice([0, 1, 2, 5, 30 if is_cruel else 3])):
        statuses = [1, 75] if rng.random() < 0.05 else rng.choice(ENDS)
        trainer.ends.append((rng.choice([0, 10, 400, 1500]), statuses))
    world = World(server, trainer, machines)
    world.tpu.fates.extend(draw_fate(rng, is_cruel) for _ in range(200))
    rate = rng.choice([0, 0.05, 0.3])
    row = itertools.count()

    def trouble(method):
        nonlocal row
        if rng.random() >= rate or next(row) > 6:
            row = itertools.count()
            return None
        return rng.choice(PASSING), rng.choice(["ask", "answer"])

    world.tpu.troubles = trouble
    out_of_reach = rng.choice([0, 0, 0.1, 0.3])
    world.unreachable = lambda: rng.random() < out_of_reach
    return world, rng


def run_killed(world, rng, most_kills):
    """Runs controllers, one after the other, until one comes to its end; what that was."""
    kills = 0
    while True:
        world.clock.looks_left = rng.randrange(3, 150) if kills < most_kills else None
        try:
            return world.run() or "stopped", kills
        except KilledError:
            kills += 1
        except UserError as error:
            return str(error), kills


def check_end(world, outcome, kills):
    trainer, tpu = world.trainer, world.tpu
    assert not tpu.mistakes
    assert not tpu.left, "something is left behind"
    assert tpu.most_live <= 1, "two at once"
    if outcome is True:
        assert trainer.saved == trainer.seconds
    else:
        assert outcome and "\n" not in outcome
    most = POLICY.max_restarts + 1
    assert all(controller.restarts < most for controller in world.controllers)
    assert trainer.starts <= most * (kills + 1)
    assert tpu.calls["create_queued_resource"] <= most * (kills + 1) * 8  # And their troubles.
    assert len(tpu.seen) <= most * (kills + 1)


def run_schedules(server, seeds, most_kills):
    outcomes = []
    for seed in seeds:
        slices = dataclasses.replace(MACHINES, num_slices=1 + seed % 2)
        world, rng = draw_world(server, seed, slices)
        outcome, kills = run_killed(world, rng, most_kills)
        try:
            check_end(world, outcome, kills)
        except AssertionError as error:
            said = "\n".join(world.said)
            raise AssertionError(f"seed {seed}: {outcome}: {error}\n{said}") from error
        outcomes.append(outcome)
    return outcomes


def test_random_schedules_end_done_or_with_a_reason(server):
    assert True in run_schedules(server, range(300, 315), most_kills=0)


@pytest.mark.slow
def test_200_random_schedules_end_done_or_with_a_reason(server):
    outcomes = run_schedules(server, range(200), most_kills=0)
    done = outcomes.count(True)
    assert 60 < done < 180, "the schedules are too kind, or too cruel, to tell"
    assert len({outcome for outcome in outcomes if outcome is not True}) > 10


@pytest.mark.parametrize(
    "seeds", [range(1200, 1205), pytest.param(range(1000, 1060), marks=pytest.mark.slow)]
)
def test_controllers_killed_anywhere_are_followed_by_one_that_goes_on(server, seeds):
    outcomes = run_schedules(server, seeds, most_kills=4)
    assert outcomes.count(True) > len(seeds) / 4
