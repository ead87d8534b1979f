"""Seconds are neither made nor lost: categories sum to wall time, whatever interrupts a run."""

import json
import random

import pytest

from clipa_t5x import wall_time

OF_STEPS = ("step", "data_wait")


def text(*lines):
    return "".join(line.to_json() + "\n" for line in lines)


def line(start, time, step, /, resumed_from=0, resumes=1, ended=False, **seconds):
    return wall_time.Line(start, time, resumes, resumed_from, step, seconds, ended)


def summarize(*lines):
    return wall_time.summarize(wall_time.parse(text(*lines)))


def assert_seconds(summary, **expected):
    everything = dict.fromkeys((*wall_time.CATEGORIES, wall_time.DOWN), 0.0)
    assert summary.seconds == pytest.approx(everything | expected)


FIRST = (
    line(0, 10, 0, init=7, compile=3),
    line(0, 30, 10, init=7, compile=3, step=18, data_wait=2),
    line(0, 70, 20, init=7, compile=3, step=38, data_wait=2, evaluation=15, checkpoint=5),
)


def test_a_whole_run():
    summary = summarize(*FIRST, line(0, 71, 20, **FIRST[-1].seconds, other=1, ended=True))
    assert_seconds(
        summary, init=7, compile=3, step=38, data_wait=2, evaluation=15, checkpoint=5, other=1
    )
    assert summary.goodput == 38 / 71 and summary.running == 71
    assert (summary.restarts, summary.rewinds) == (0, 0)


def test_no_lines():
    assert wall_time.summarize([]).goodput == 0.0
    assert_seconds(wall_time.summarize([]))


def test_steps_after_the_restarts_checkpoint_are_lost_by_their_share():
    """Steps 15 to 20 of a stretch that took 20 s from step 10: 10 s; all of it and 20 s: step 0."""
    ended = line(0, 71, 20, **FIRST[-1].seconds, other=1, ended=True)
    summary = summarize(*FIRST, ended, line(100, 104, 15, resumed_from=15, init=4))
    assert_seconds(summary, init=11, compile=3, step=28, data_wait=2, evaluation=15, checkpoint=5,
                   other=1, lost=10, down=29)  # fmt: skip
    summary = summarize(*FIRST, ended, line(100, 104, 0, init=4))
    assert summary.seconds["lost"] == 40 and summary.seconds["step"] == 0


def test_a_killed_start_is_charged_with_one_more_stretch_at_most():
    resumed = {"resumed_from": 20, "init": 4}
    long_after = summarize(*FIRST, line(100, 104, 20, **resumed))
    assert (long_after.seconds["lost"], long_after.seconds["down"]) == (20, 10)
    soon_after = summarize(*FIRST, line(75, 79, 20, **resumed))
    assert (soon_after.seconds["lost"], soon_after.seconds["down"]) == (5, 0)
    before_any_step = summarize(FIRST[0], line(100, 104, 0, init=4))
    assert (before_any_step.seconds["lost"], before_any_step.seconds["down"]) == (0, 90)


def test_a_rewind_loses_what_it_does_again():
    """At step 23, three seconds after the last line, back to 15; then on to 20 again."""
    before = {**FIRST[-1].seconds, "step": 41, "init": 9}
    again = line(0, 85, 20, resumed_from=15, resumes=2, **{**before, "step": 51})
    summary = summarize(*FIRST, line(0, 75, 15, resumed_from=15, resumes=2, **before), again)
    assert_seconds(summary, init=9, compile=3, step=38, data_wait=2, evaluation=15, checkpoint=5,
                   lost=13)  # fmt: skip
    assert (summary.restarts, summary.rewinds) == (0, 1)


def test_what_was_lost_is_not_lost_again():
    starts = [line(100 * n, 100 * n + 50, 10, step=50, ended=True) for n in range(1, 4)]
    summary = summarize(*FIRST[:2], *starts)
    assert summary.seconds["step"] == 50
    assert summary.seconds["lost"] == 20 + 20 + 100
    assert summary.restarts == 3


def test_torn_doubled_missing_and_foreign_lines():
    whole = text(*FIRST)
    expected = wall_time.summarize(FIRST)
    assert wall_time.summarize(wall_time.parse(whole + whole)) == expected
    assert wall_time.summarize(wall_time.parse(whole + "garbage\n[]\n{}\n\0\0\n")) == expected
    without_middle = wall_time.summarize(wall_time.parse(text(FIRST[0], FIRST[2])))
    assert without_middle.seconds == expected.seconds
    last = text(FIRST[2])
    for cut in range(len(last)):
        lines = wall_time.parse(text(*FIRST[:2]) + last[:cut] + last)
        assert wall_time.summarize(lines) == expected, cut
        if cut < len(last) - 1:
            assert wall_time.parse(text(*FIRST[:2]) + last[:cut]) == list(FIRST[:2]), cut


@pytest.mark.parametrize("value", ["NaN", "1e999", "null", '"x"', "[1]"])
def test_times_that_are_no_numbers_are_left_out(value):
    record = json.loads(FIRST[1].to_json())
    bad = json.dumps(record).replace("18", value, 1)
    assert wall_time.parse(bad) == []


def random_run(rng):
    """Lines of a run with restarts, kills and rewinds, and the time it took by an outer clock."""
    lines, clock, saved = [], 0.0, 0
    for _ in range(rng.randint(1, 5)):
        clock += rng.uniform(0, 50)
        start, step, resumes, origin, seconds = clock, saved, 1, saved, {}

        def spend(name, most, seconds=seconds):
            nonlocal clock
            passed = round(rng.uniform(0, most), 3)
            clock += passed
            seconds[name] = seconds.get(name, 0.0) + passed

        spend("init", 9)
        for event in ["log"] * rng.randint(0, 8) + ["end"]:
            lines.append(line(start, clock, step, origin, resumes, **seconds))
            for name in ("step", "data_wait", "evaluation", "checkpoint", "compile"):
                spend(name, 5)
            if rng.random() < 0.2:
                resumes, origin = resumes + 1, saved
                step = saved
            else:
                step += rng.randint(0, 20)
                saved = step if rng.random() < 0.4 else saved
            if event == "end" and rng.random() < 0.5:
                lines.append(line(start, clock, step, origin, resumes, ended=True, **seconds))
    return lines


@pytest.mark.parametrize("seed", range(200))
def test_categories_sum_to_wall_time(seed):
    lines = random_run(random.Random(seed))
    summary = wall_time.summarize(wall_time.parse(text(*lines)))
    assert sum(summary.seconds.values()) == pytest.approx(lines[-1].time - lines[0].start)
    assert min(summary.seconds.values()) >= 0
    assert summary.restarts == len({each.start for each in lines}) - 1
    kept = sum(summary.seconds[name] for name in OF_STEPS)
    spent = sum(
        max(each.seconds.get(name, 0) for each in lines if each.start == start)
        for start in {each.start for each in lines}
        for name in OF_STEPS
    )
    # What comes after a start's last step is no step's.
    elsewhere = summary.seconds["lost"] + summary.seconds["other"]
    assert kept <= spent + 1e-6 <= kept + elsewhere + 2e-6
    doubled = wall_time.summarize([each for each in lines for _ in range(2)])
    assert doubled.seconds == pytest.approx(summary.seconds)


def test_time_of_two_starts_at_once_counts_once():
    summary = summarize(*FIRST, line(65, 80, 20, resumed_from=20, init=15))
    assert summary.seconds["init"] == 7 + 10
    assert sum(summary.seconds.values()) == 80


def test_stages_add_up():
    one, two = summarize(*FIRST), summarize(FIRST[0], line(50, 60, 5, step=6, init=4))
    both = wall_time.total([one, two])
    assert sum(both.seconds.values()) == pytest.approx(70 + 60)
    assert both.restarts == 1
