"""The stopwatch against an outer clock; tests/wall_time_test.py tests what its lines come to."""

import time

import pytest

from clipa_t5x import goodput, processes, wall_time


def lines(model_dir):
    return wall_time.parse((model_dir / wall_time.FILE).read_text())


def summary(model_dir):
    return wall_time.summarize(lines(model_dir))


def test_a_run_and_its_resumption(tmp_path):
    """Bounded by clocks read just outside and just inside of what it counts."""
    outer = time.time()
    recorder = goodput.Recorder(str(tmp_path))
    inner = time.time()
    time.sleep(0.02)
    recorder.resume(0)
    with recorder.phase("compile"):
        time.sleep(0.03)
    with recorder.phase("step"):
        time.sleep(0.1)
        recorder.log(10, stalled_seconds=0.04)
        with recorder.phase("evaluation"):
            time.sleep(0.05)
        time.sleep(0.06)
        recorder.log(20, stalled_seconds=0.05)
    with recorder.phase("checkpoint"):
        time.sleep(0.01)
    inner = time.time() - inner
    recorder.close()
    recorder.close()
    found = summary(tmp_path)
    assert inner - 0.01 <= sum(found.seconds.values()) <= time.time() - outer + 0.01
    least = {"init": 0.02, "compile": 0.03, "step": 0.11, "evaluation": 0.05, "checkpoint": 0.01}
    for name, value in least.items():
        assert value - 0.002 <= found.seconds[name], name
    assert found.seconds["data_wait"] == pytest.approx(0.05, abs=0.002)
    assert found.seconds["lost"] == 0

    time.sleep(0.1)
    recorder = goodput.Recorder(str(tmp_path))
    recorder.resume(15)
    recorder.close()
    again = summary(tmp_path)
    assert again.restarts == 1
    assert again.seconds["down"] >= 0.098  # Moments are written to the millisecond.
    ten, twenty = (line.seconds for line in lines(tmp_path)[1:3])
    stretch = sum(twenty[name] - ten[name] for name in ("step", "data_wait"))
    assert again.seconds["lost"] == pytest.approx(stretch / 2)
    assert sum(again.seconds.values()) <= time.time() - outer + 0.01


def test_more_waiting_than_time_is_none_of_the_steps(tmp_path):
    recorder = goodput.Recorder(str(tmp_path))
    recorder.resume(0)
    with recorder.phase("step"):
        time.sleep(0.02)
        recorder.log(1, stalled_seconds=5.0)
        recorder.resume(0)  # A rewind: the loop's new clock begins anew.
        time.sleep(0.02)
        recorder.log(1, stalled_seconds=0.01)
    recorder.close()
    seconds = summary(tmp_path).seconds
    assert 0 <= seconds["data_wait"] <= 0.012 and seconds["step"] >= 0.008
    assert seconds["lost"] >= 0.019


def test_a_process_counts_from_its_start(tmp_path):
    goodput.count_from(processes.start_time())
    for name, least, most in (("first", 0.2, 1e5), ("second", 0.0, 0.2)):
        recorder = goodput.Recorder(str(tmp_path / name))
        (tmp_path / name).mkdir()
        recorder.resume(0)
        recorder.close()
        assert least <= summary(tmp_path / name).seconds["init"] <= most


def test_a_start_that_never_had_a_state_leaves_nothing(tmp_path):
    recorder = goodput.Recorder(str(tmp_path))
    with recorder.phase("compile"):
        recorder.close()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_costs_no_run_and_no_seconds(tmp_path):
    recorder = goodput.Recorder(str(tmp_path / "later"))
    recorder.resume(0)  # There is no folder to write in.
    with recorder.phase("step"):
        time.sleep(0.02)
        recorder.log(5, stalled_seconds=0.0)
    (tmp_path / "later").mkdir()
    recorder.close()
    assert summary(tmp_path / "later").seconds["step"] >= 0.02
    recorder.log_summary()
