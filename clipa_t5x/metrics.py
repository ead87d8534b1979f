"""Where metrics go: TensorBoard, `metrics.jsonl`, and a line of progress on the console."""

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import metric_writers
from etils import epath

from clipa_t5x.errors import storage_errors

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
    {"step", "group", "time", "values"} for each call. Only process 0 writes. What cannot be
    written, on a full disk say, is told in the log: a run is not to end for it.
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
        record = {"step": step, "group": group, "time": time.time(), "values": scalars}
        path = epath.Path(self._model_dir) / "metrics.jsonl"
        try:
            with path.open("a") as f:
                f.write(json.dumps(record) + "\n")
        except storage_errors() as error:
            logging.error("Cannot write %s (%s): the run goes on.", path, error)
        self.write_events(step, group, scalars)

    def write_events(self, step: int, group: str, scalars: Mapping[str, float]) -> None:
        """Writes scalars for TensorBoard alone."""
        with self._events(group):
            self.group(group).write_scalars(step, scalars)

    @contextlib.contextmanager
    def _events(self, group: str) -> Iterator[None]:
        """Within, TensorBoard events of a group are written; a writer that fails is given up.

        It raises in a later call, and of whatever kind, what failed in its thread.
        """
        try:
            yield
        except Exception as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            logging.error("Cannot write events of %s (%s): the run goes on.", group, cause)
            self._writers.pop(group, None)

    def flush(self) -> None:
        """Waits until all is written."""
        for group, writer in list(self._writers.items()):
            with self._events(group):
                writer.flush()

    def close(self) -> None:
        """Waits until all is written, and ends."""
        self.flush()
        for group, writer in list(self._writers.items()):
            with self._events(group):
                writer.close()
        self._writers.clear()


class StepClock:
    """Watches when the device finishes each step, to tell how long it stood idle for want of data.

    Waiting for a batch costs nothing while earlier steps are still running; only what the device
    idles counts. It also keeps the host from running ahead by more than a few steps, whose batches
    would fill the device's memory.

    Attributes:
      stalled_seconds: total time that the device had nothing to do while the host waited for data.
    """

    def __init__(
        self, completed: Callable[[int], None] = lambda step: None, max_in_flight: int = 2
    ):
        """Calls `completed` with every step that ends on the device, in a thread of its own.

        Allows `max_in_flight` steps dispatched and not finished.
        """
        self._completed = completed
        self.stalled_seconds = 0.0
        self._slots = threading.Semaphore(max_in_flight)
        self._lock = threading.Lock()
        self._in_flight, self._idle_since = 0, time.perf_counter()
        self._outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="step-clock", daemon=True).start()

    def _watch(self) -> None:
        while (item := self._outputs.get()) is not None:
            step, outputs = item
            try:
                jax.block_until_ready(outputs)
                self._completed(step)
            except Exception:  # the main thread meets it, too, where it reads these outputs
                logging.debug("A step failed.", exc_info=True)
            with self._lock:
                self._in_flight -= 1
                self._idle_since = time.perf_counter()
            self._slots.release()

    def before_dispatch(self, waited_seconds: float) -> None:
        """Call with the next batch in hand, after waiting `waited_seconds` for it."""
        with self._lock:
            if self._in_flight == 0:
                idle = time.perf_counter() - self._idle_since
                self.stalled_seconds += min(idle, waited_seconds)
        self._slots.acquire()

    def dispatched(self, step: int, outputs: Any) -> None:
        """Call with the outputs of the step that was just dispatched."""
        with self._lock:
            self._in_flight += 1
        self._outputs.put((step, outputs))

    def close(self) -> None:
        """Ends the watching thread."""
        self._outputs.put(None)


class StepTimer:
    """Throughput, MFU, data-wait share and time left, between two log lines."""

    def __init__(
        self,
        first_step: int,
        total_steps: int,
        batch_size: int,
        peak_seconds: float | None = None,
    ):
        """Starts at `first_step` updates of `total_steps`.

        Args:
          first_step: updates done.
          total_steps: of the run.
          batch_size: samples of a step.
          peak_seconds: seconds that training on one sample would take at the devices' peak; None
            where that is not known, and then no MFU is told.
        """
        self._total_steps, self._batch_size = total_steps, batch_size
        self._peak_seconds = peak_seconds
        self._step, self._start, self._stalled = first_step, time.perf_counter(), 0.0
        self._paused = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what is done within (an evaluation) out of the rates."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def lap(self, step: int, stalled_seconds: float) -> dict[str, float]:
        """Rates since the last lap; `stalled_seconds` is the step clock's running total."""
        now = time.perf_counter()
        seconds = max(now - self._start - self._paused, 1e-9)
        steps_per_second = (step - self._step) / seconds
        samples_per_second = steps_per_second * self._batch_size
        wait_share = min((stalled_seconds - self._stalled) / seconds, 1.0)
        cores = (os.cpu_count() or 1) * jax.process_count()
        rates = {
            "samples_per_second": samples_per_second,
            "data_wait_share": wait_share,
            # What the chips would take of every core of their hosts if they never waited.
            "data/needed_per_core": samples_per_second / max(1 - wait_share, 1e-3) / cores,
            "seconds_left": (self._total_steps - step) / max(steps_per_second, 1e-9),
        }
        if self._peak_seconds is not None:
            rates["mfu"] = samples_per_second * self._peak_seconds
        self._step, self._start, self._stalled, self._paused = step, now, stalled_seconds, 0.0
        return rates


def log_progress(name: str, step: int, total_steps: int, values: Mapping[str, float]) -> None:
    """One console line: where the run is, how well, how fast, and how long it will take."""
    logging.info(
        "%s step %d/%d (%d%%) | loss %.4f | accuracy %.3f | scale %.1f | lr %.2e | %.0f images/s%s "
        "| data-wait %.0f%%%s | ETA %s",
        name, step, total_steps, 100 * step // total_steps, values["loss"], values["accuracy"],
        values["logit_scale"], values["learning_rate"], values["samples_per_second"],
        _mfu(values), 100 * values["data_wait_share"], _supply(values),
        format_seconds(values["seconds_left"]),
    )  # fmt: skip


def _mfu(values: Mapping[str, float]) -> str:
    return f" | MFU {values['mfu']:.1%}" if "mfu" in values else ""


def _supply(values: Mapping[str, float]) -> str:
    """What the chips ask of each core of the hosts, and what the input pipeline gives; bad records.

    Empty where it was not measured.
    """
    text = ""
    if "data/supplied_per_core" in values:
        needed, supplied = (values[f"data/{k}_per_core"] for k in ("needed", "supplied"))
        text = f" (asked {needed:.0f}, given {supplied:.0f} images/s/core)"
    bad = sum(value for name, value in values.items() if name.startswith("data/bad/"))
    return text + (f" | {bad:.0f} bad records" if bad else "")


def mean(metrics: list[Mapping[str, jax.Array]]) -> dict[str, float]:
    """Means over steps; one transfer for all of them."""
    host = jax.device_get(metrics)
    return {name: float(np.mean([m[name] for m in host])) for name in host[0]}
