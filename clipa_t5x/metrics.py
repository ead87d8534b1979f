"""Where metrics go: TensorBoard, `metrics.jsonl`, and a line of progress on the console."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import metric_writers
from etils import epath

GROUP_TRAIN = "train"


def format_seconds(seconds: float) -> str:
    """'1:02:03' or '2:03'; '-' for what cannot be known."""
    if not np.isfinite(seconds):
        return "-"
    minutes, secs = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


class MetricsWriter:
    """Writes scalars of a group ('train', 'training_eval/<task>', 'inference_eval/<name>').

    TensorBoard events lie in a folder per group, T5X's way; `metrics.jsonl` has a line
    {"step", "group", "time", "values"} for each call. Only process 0 writes.
    """

    def __init__(self, model_dir: str):
        """Writes under `model_dir`."""
        self._model_dir = model_dir
        self._writers: dict[str, metric_writers.MetricWriter] = {}
        self._active = jax.process_index() == 0

    def group(self, group: str) -> metric_writers.MetricWriter:
        """The clu writer of a group, asynchronous so that no step waits for a file."""
        if group not in self._writers:
            writer = metric_writers.MultiWriter([])
            if self._active:
                writer = metric_writers.AsyncWriter(
                    metric_writers.SummaryWriter(os.path.join(self._model_dir, group))
                )
            self._writers[group] = writer
        return self._writers[group]

    def write(self, step: int, group: str, values: Mapping[str, Any]) -> None:
        """Writes scalars that hold after `step` updates."""
        if not self._active:
            return
        scalars = {name: float(value) for name, value in values.items()}
        self.group(group).write_scalars(step, scalars)
        record = {"step": step, "group": group, "time": time.time(), "values": scalars}
        path = epath.Path(self._model_dir) / "metrics.jsonl"
        with path.open("a") as f:
            f.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Waits until all is written."""
        for writer in self._writers.values():
            writer.flush()
            writer.close()
        self._writers.clear()


class StepTimer:
    """Throughput, data-wait share and time left, between two log lines."""

    def __init__(self, first_step: int, total_steps: int, batch_size: int):
        """Starts at `first_step` updates of `total_steps`."""
        self._total_steps, self._batch_size = total_steps, batch_size
        self._step, self._start, self._waited = first_step, time.perf_counter(), 0.0
        self._paused = 0.0

    def pause(self, seconds: float) -> None:
        """Leaves `seconds` (of evaluation) out of the rates."""
        self._paused += seconds

    def lap(self, step: int, wait_seconds: float) -> dict[str, float]:
        """Rates since the last lap; `wait_seconds` is the data iterator's running total."""
        now = time.perf_counter()
        seconds = max(now - self._start - self._paused, 1e-9)
        steps_per_second = (step - self._step) / seconds
        rates = {
            "samples_per_second": steps_per_second * self._batch_size,
            "data_wait_share": min((wait_seconds - self._waited) / seconds, 1.0),
            "seconds_left": (self._total_steps - step) / max(steps_per_second, 1e-9),
        }
        self._step, self._start, self._waited, self._paused = step, now, wait_seconds, 0.0
        return rates


def log_progress(name: str, step: int, total_steps: int, values: Mapping[str, float]) -> None:
    """One console line: where the run is, how well, how fast, and how long it will take."""
    logging.info(
        "%s step %d/%d (%d%%) | loss %.4f | accuracy %.3f | scale %.1f | lr %.2e | %.0f images/s | "
        "data-wait %.0f%% | ETA %s",
        name, step, total_steps, 100 * step // total_steps, values["loss"], values["accuracy"],
        values["logit_scale"], values["learning_rate"], values["samples_per_second"],
        100 * values["data_wait_share"], format_seconds(values["seconds_left"]),
    )  # fmt: skip


def mean(metrics: list[Mapping[str, jax.Array]]) -> dict[str, float]:
    """Means over steps; one transfer for all of them."""
    host = jax.device_get(metrics)
    return {name: float(np.mean([m[name] for m in host])) for name in host[0]}
