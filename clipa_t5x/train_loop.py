"""The training loop: fetch, update, log, evaluate, save.

A *step* is one update; "after step n" means n updates are done. The order within a step is law:
update, log, evaluate, save. Evaluation comes before saving, so that a run killed in between repeats
the evaluation rather than lose it.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from clipa_t5x import checkpoints, evaluation, metrics, stage_info, train_state
from clipa_t5x import trainer as trainer_lib
from clipa_t5x.data import input_pipeline
from clipa_t5x.errors import UserError


class Batches(Protocol):
    """An endless iterator of global batches that tells how long the last one took to come."""

    waited_seconds: float

    def __next__(self) -> Mapping[str, jax.Array]: ...


def training_steps(
    state: train_state.TrainState,
    train_step: Callable[..., Any],
    batches: Batches,
    clock: metrics.StepClock,
    steps: Iterable[int],
) -> Iterator[tuple[int, train_state.TrainState, trainer_lib.Metrics]]:
    """Fetches and updates, once for each of `steps`.

    Nothing here waits for the device: a step is dispatched as soon as its batch is there.

    Yields:
      (step, state after it, its metrics); the state before is donated, and gone.
    """
    for step in steps:
        batch = next(batches)
        clock.before_dispatch(batches.waited_seconds)
        state, step_metrics = train_step(state, batch)
        clock.dispatched(step_metrics)
        yield step, state, step_metrics


class Progress:
    """Gathers the metrics of steps and, when asked, writes their means and a console line."""

    def __init__(self, writer: metrics.MetricsWriter, info: stage_info.StageInfo, first_step: int):
        """Begins after `first_step` updates."""
        self._writer, self._info = writer, info
        self._pending: list[trainer_lib.Metrics] = []
        self.clock = metrics.StepClock()
        self.timer = metrics.StepTimer(first_step, info.total_steps, info.batch_size)

    def add(self, step_metrics: trainer_lib.Metrics) -> None:
        """Keeps a step's metrics, on the device, until the next `log`."""
        self._pending.append(step_metrics)

    def check_finite(self, step: int) -> dict[str, float]:
        """The means over the steps since the last `log`; waits for the device.

        Where an update's norms are finite, so are the parameters after it: they may be saved.

        Raises:
          UserError: the loss or a norm is not a finite number.
        """
        means = metrics.mean(self._pending) if self._pending else {}
        bad = {name: value for name, value in means.items() if not np.isfinite(value)}
        if bad:
            name, value = next((n, bad[n]) for n in ("loss", *bad) if n in bad)
            raise UserError(
                f"the {name} is {value} at step {step}: training has diverged. Lower LEARNING_RATE "
                "or lengthen WARMUP_STEPS, and start again from the last checkpoint."
            )
        return means

    def log(self, step: int, data_statistics: Mapping[str, float]) -> None:
        """Writes the means over the steps since the last call, and what the input pipeline says.

        Raises:
          UserError: as `check_finite`.
        """
        means = self.check_finite(step)
        self._pending.clear()
        rates = self.timer.lap(step, self.clock.stalled_seconds)
        values = {**means, **rates, **data_statistics}
        metrics.log_progress(self._info.resolution, step, self._info.total_steps, values)
        del values["seconds_left"]
        values["samples"] = step * self._info.batch_size
        self._writer.write(step, metrics.GROUP_TRAIN, values)


@dataclasses.dataclass
class TrainLoop:
    """What one run trains with.

    Attributes:
      train_step: (state, batch) -> (state, metrics); its state argument is donated.
      dataset_cfg: the training data.
      layout: where their rows go.
      checkpointer: of the run.
      evaluate: its evaluations.
      progress: its metrics.
      total_steps: absolute, those of earlier starts included.
      eval_period: steps between evaluations; the last step is evaluated, too.
      stats_period: steps between lines of metrics.
    """

    train_step: Callable[..., Any]
    dataset_cfg: input_pipeline.DatasetConfig
    layout: input_pipeline.BatchLayout
    checkpointer: checkpoints.Checkpointer
    evaluate: evaluation.Evaluation
    progress: Progress
    total_steps: int
    eval_period: int
    stats_period: int

    def run(self, state: train_state.TrainState, position: int) -> train_state.TrainState:
        """Trains from `state`, whose next batch begins at sample `position`, to the end."""
        steps = range(int(state.step) + 1, self.total_steps + 1)
        batches = input_pipeline.TrainIterator(self.dataset_cfg, self.layout, position)
        updates = training_steps(state, self.train_step, batches, self.progress.clock, steps)
        with contextlib.closing(batches), contextlib.closing(self.progress.clock):
            for step, state, step_metrics in updates:
                self.progress.add(step_metrics)
                is_last = step == self.total_steps
                if step % self.stats_period == 0 or is_last:
                    self.progress.log(step, batches.statistics())
                if step % self.eval_period == 0 or is_last:
                    with self.progress.timer.paused():
                        self.evaluate(step, state.params, is_last)
                if self.checkpointer.is_due(step, self.total_steps):
                    self.progress.check_finite(step)
                    self.checkpointer.save(step, state, batches.state())
        return state
