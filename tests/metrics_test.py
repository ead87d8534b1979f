import json
import logging
import math
import os
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from clipa_t5x import metrics


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3599.7, "1:00:00"),
    (3723, "1:02:03"), (360_000, "100:00:00"), (math.inf, "-"), (math.nan, "-"),
])  # fmt: skip
def test_format_seconds(seconds, text):
    assert metrics.format_seconds(seconds) == text


def test_mean_is_over_steps():
    steps = [{"loss": jnp.float32(i), "scale": jnp.float32(2 * i)} for i in (1, 2, 6)]
    means = metrics.mean(steps)
    assert means == {"loss": 3.0, "scale": 6.0}
    assert all(type(value) is float for value in means.values())
    assert math.isnan(metrics.mean([*steps, {"loss": jnp.nan, "scale": jnp.float32(0)}])["loss"])


# Files.


def lines(model_dir):
    return [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """{(step, name): value} of the scalars in a TensorBoard folder."""
    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found[event.step, value.tag] = float(tf.make_ndarray(value.tensor))
    return found


def test_metrics_are_lines_of_json(tmp_path):
    start = time.time()
    writer = metrics.MetricsWriter(str(tmp_path))
    writer.write(5, metrics.GROUP_TRAIN, {"loss": jnp.float32(1.5), "images": np.int64(40)})
    writer.write(10, "inference_eval/imagenet", {"accuracy": 0.25})
    assert [line["step"] for line in lines(tmp_path)] == [5, 10]  # without waiting for the end
    writer.close()
    first, second = lines(tmp_path)
    assert first.keys() == {"step", "group", "time", "values"}
    assert (first["step"], first["group"]) == (5, "train")
    assert first["values"] == {"loss": 1.5, "images": 40.0}
    assert second["group"] == "inference_eval/imagenet"
    assert second["values"] == {"accuracy": 0.25}
    assert start <= first["time"] <= second["time"] <= time.time()


def test_a_second_start_appends(tmp_path):
    for step in (1, 2):
        writer = metrics.MetricsWriter(str(tmp_path))
        writer.write(step, "train", {"loss": step})
        writer.close()
    assert [line["values"]["loss"] for line in lines(tmp_path)] == [1, 2]
    assert events(tmp_path / "train") == {(1, "loss"): 1, (2, "loss"): 2}


def test_events_alone_leave_no_line(tmp_path):
    writer = metrics.MetricsWriter(str(tmp_path))
    writer.write_events(3, "inference_eval/digit", {"accuracy": 0.5})
    writer.flush()
    assert events(tmp_path / "inference_eval" / "digit") == {(3, "accuracy"): 0.5}
    writer.close()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_tensorboard_has_a_folder_per_group(tmp_path):
    writer = metrics.MetricsWriter(str(tmp_path))
    for step in range(1, 30):
        writer.write(step, "train", {"loss": 1 / step, "learning_rate": step / 1e6})
    writer.write(29, "training_eval/shapes", {"loss": 7.0})
    writer.close()
    found = events(tmp_path / "train")
    assert len(found) == 2 * 29
    for step in range(1, 30):
        assert found[step, "loss"] == pytest.approx(1 / step)
        assert found[step, "learning_rate"] == pytest.approx(step / 1e6)
    assert events(tmp_path / "training_eval" / "shapes") == {(29, "loss"): 7.0}


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    writer = metrics.MetricsWriter(str(tmp_path))
    writer.write(1, "train", {"loss": 1.0})
    writer.group("train").write_scalars(1, {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


# Rates.


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

        time = staticmethod(time.time)

    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


CORES = os.cpu_count()


def test_step_timer_arithmetic(clock):
    timer = metrics.StepTimer(first_step=20, total_steps=100, batch_size=64)
    clock.now += 5
    assert timer.lap(30, 1.0) == pytest.approx(
        {
            "samples_per_second": 10 / 5 * 64,
            "data_wait_share": 1 / 5,
            "seconds_left": 70 / 2,
            "data/needed_per_core": 10 / 4 * 64 / CORES,
        }
    )
    # Only what happened since counts: 8 seconds, of which 3 were an evaluation's.
    clock.now += 5
    for seconds in (1, 2):
        with timer.paused():
            clock.now += seconds
    assert timer.lap(50, 1.5) == pytest.approx(
        {
            "samples_per_second": 20 / 5 * 64,
            "data_wait_share": 0.5 / 5,
            "seconds_left": 50 / 4,
            "data/needed_per_core": 20 / 4.5 * 64 / CORES,
        }
    )
    clock.now += 2
    rates = timer.lap(100, 100.0)
    assert rates == pytest.approx(
        {"samples_per_second": 25 * 64, "data_wait_share": 1.0, "seconds_left": 0,
         "data/needed_per_core": 25_000 * 64 / CORES}
    )  # fmt: skip


def test_mfu_is_the_share_of_the_devices_peak(clock):
    timer = metrics.StepTimer(0, 100, 64, peak_seconds=1 / 320)
    clock.now += 5
    assert timer.lap(10, 0.0)["mfu"] == pytest.approx(128 / 320)


def test_step_timer_survives_a_lap_without_time(clock):
    timer = metrics.StepTimer(0, 10, 8)
    rates = timer.lap(0, 0.0)
    assert all(np.isfinite(value) for value in rates.values())
    assert rates["samples_per_second"] == 0


class Step:
    """Outputs of a step that runs until it is told to end."""

    def __init__(self):
        self.finished = threading.Event()

    def block_until_ready(self):
        assert self.finished.wait(10)
        return self


@pytest.fixture
def step_clock(monkeypatch, clock):
    monkeypatch.setattr(metrics.jax, "block_until_ready", lambda x: x.block_until_ready())
    step_clock = metrics.StepClock()
    yield step_clock
    step_clock.close()


def wait_until_idle(step_clock):
    for _ in range(1000):
        if step_clock._in_flight == 0:
            return
        time.sleep(0.005)
    raise AssertionError("the step does not end")


def test_waiting_counts_only_where_the_device_idles(step_clock, clock):
    clock.now += 3
    step_clock.before_dispatch(2.0)  # idle for 3 seconds, of which 2 were for the data
    assert step_clock.stalled_seconds == 2
    first, second = Step(), Step()
    step_clock.dispatched(1, first)
    clock.now += 5
    step_clock.before_dispatch(5.0)  # the first is still running
    assert step_clock.stalled_seconds == 2
    step_clock.dispatched(2, second)
    first.finished.set()
    second.finished.set()
    wait_until_idle(step_clock)
    clock.now += 1
    step_clock.before_dispatch(4.0)  # three of these four seconds lie before the end
    assert step_clock.stalled_seconds == 3


def test_no_more_than_two_steps_are_in_flight(step_clock):
    steps = [Step() for _ in range(3)]
    for step in steps[:2]:
        step_clock.before_dispatch(0.0)
        step_clock.dispatched(0, step)
    third = threading.Thread(target=step_clock.before_dispatch, args=(0.0,))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    steps[0].finished.set()
    third.join(10)
    assert not third.is_alive()
    steps[1].finished.set()


def test_a_failed_step_does_not_stop_the_clock(step_clock):
    class Failed:
        def block_until_ready(self):
            raise RuntimeError("out of memory")

    for _ in range(5):
        step_clock.before_dispatch(0.0)
        step_clock.dispatched(0, Failed())
    wait_until_idle(step_clock)


# The console.


def test_progress_is_one_line(caplog):
    values = {
        "loss": 1.23456, "accuracy": 0.4567, "logit_scale": 14.28, "learning_rate": 2.048e-3,
        "samples_per_second": 1234.5, "data_wait_share": 0.031, "seconds_left": 3723.0,
    }  # fmt: skip
    with caplog.at_level(logging.INFO, logger="absl"):
        metrics.log_progress("84 px / 8 tokens", 50, 200, values)
    (record,) = caplog.records
    assert record.getMessage() == (
        "84 px / 8 tokens step 50/200 (25%) | loss 1.2346 | accuracy 0.457 | scale 14.3 | "
        "lr 2.05e-03 | 1234 images/s | data-wait 3% | ETA 1:02:03"
    )


def test_progress_tells_of_supply_and_of_bad_records(caplog):
    values = {
        "loss": 1.0, "accuracy": 0.5, "logit_scale": 14.28, "learning_rate": 1e-3,
        "samples_per_second": 100.0, "data_wait_share": 0.5, "seconds_left": 60.0,
        "data/needed_per_core": 100.2, "data/supplied_per_core": 49.6, "data/bad/not_an_image": 2.0,
        "data/bad/empty_caption": 1.0, "data/mended/CMYK": 9.0,
    }  # fmt: skip
    with caplog.at_level(logging.INFO, logger="absl"):
        metrics.log_progress("84 px", 1, 2, {**values, "mfu": 0.4321})
    assert (
        caplog.records[0]
        .getMessage()
        .endswith(
            "| 100 images/s | MFU 43.2% | data-wait 50% (asked 100, given 50 images/s/core) | "
            "3 bad records | ETA 1:00"
        )
    )
