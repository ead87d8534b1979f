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
from absl import logging

from clipa_t5x import (
    bad_numbers,
    checkpoints,
    evaluation,
    metrics,
    preemption,
    stage_info,
    supervision,
    train_state,
)
from clipa_t5x import trainer as trainer_lib
from clipa_t5x.data import input_pipeline
from clipa_t5x.errors import UnsavableError, check_number


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
        clock.dispatched(step, step_metrics)
        yield step, state, step_metrics


@dataclasses.dataclass(frozen=True)
class Periods:
    """How long, and how often; all in steps.

    Attributes:
      total: absolute, those of earlier starts included.
      evaluation: between evaluations; the last step is evaluated, too. None leaves all of them to
        another process, `eval --watch`.
      log: between lines of metrics; each is the mean over these steps.
    """

    total: int
    evaluation: int | None
    log: int

    def __post_init__(self) -> None:
        """Refuses what is none.

        Raises:
          UserError: names the setting.
        """
        named = {"TRAIN_STEPS": self.total, "EVAL_PERIOD": self.evaluation, "LOG_PERIOD": self.log}
        for name, value in named.items():
            if name != "EVAL_PERIOD" or value is not None:
                check_number(name, value, minimum=1, whole=True)

    def is_evaluated(self, step: int) -> bool:
        """Whether the parameters after `step` updates are to be evaluated here."""
        if self.evaluation is None:
            return False
        return step == self.total or step % self.evaluation == 0


@dataclasses.dataclass(frozen=True)
class Start:
    """Where training begins, or goes on.

    Attributes:
      state: after the last update.
      position: of the next batch's first sample in the endless sequence.
      evaluation_due: whether the state was saved before its evaluation was done.
      rewinds: how many times the run went back for bad numbers.
      rows_at_once: rows of a batch whose activations a device held at a time; None for a new run.
    """

    state: train_state.TrainState
    position: int = 0
    evaluation_due: bool = False
    rewinds: int = 0
    rows_at_once: int | None = None

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.state.step)

    @classmethod
    def restored(cls, checkpoint: checkpoints.Restored, position: int) -> "Start":
        """What a run goes on from; an older version's checkpoint says less."""
        saved = checkpoint.data_state
        return cls(
            checkpoint.state,
            position,
            evaluation_due=saved.get("evaluation_due", False),
            rewinds=saved.get("rewinds", 0),
            rows_at_once=saved.get("rows_at_once"),
        )


class RewindError(Exception):
    """The run must go back to its last checkpoint; the data to leave out end with `bad_step`'s."""

    def __init__(self, bad_step: int):
        super().__init__(f"bad numbers at step {bad_step}")
        self.bad_step = bad_step


class Progress:
    """Gathers the metrics of steps and, when asked, writes their means and a console line."""

    def __init__(
        self,
        writer: metrics.MetricsWriter,
        info: stage_info.StageInfo,
        supervisor: supervision.Supervisor,
        policy: bad_numbers.Policy | None = None,
        peak_flops: float | None = None,
    ):
        """Writes to `writer`; of `policy` are the steps made; `peak_flops` is of all devices."""
        self._writer, self._info = writer, info
        per_sample = info.train_flops_per_example
        self._peak_seconds = per_sample / peak_flops if per_sample and peak_flops else None
        self._supervisor, self._policy = supervisor, policy
        self.clock = metrics.StepClock(supervisor.watchdog.completed)
        self._begin(0, 0)

    def restart(self, step: int, rewinds: int) -> None:
        """Begins after `step` updates, forgetting what came before."""
        self._begin(step, rewinds)
        self._supervisor.recorder.resume(step)

    def _begin(self, step: int, rewinds: int) -> None:
        self._pending: list[trainer_lib.Metrics] = []
        self._logged_step, self._rewinds = step, rewinds
        self.timer = metrics.StepTimer(
            step, self._info.total_steps, self._info.batch_size, self._peak_seconds
        )

    def add(self, step_metrics: trainer_lib.Metrics) -> None:
        """Keeps a step's metrics, on the device, until the next `log`."""
        self._pending.append(step_metrics)

    def look(self) -> bad_numbers.Continue:
        """What to write of the steps since the last `log`; waits for the device.

        Where this returns, the parameters after these steps may be saved.

        Raises:
          BadNumbersError: training ends here.
          RewindError: it goes on from the last checkpoint.
        """
        steps = jax.device_get(self._pending)
        if not steps:
            return bad_numbers.Continue({}, "")
        verdict = bad_numbers.judge(self._policy, self._logged_step + 1, steps, self._rewinds)
        if isinstance(verdict, bad_numbers.Stop):
            raise bad_numbers.BadNumbersError(verdict.message)
        if isinstance(verdict, bad_numbers.Rewind):
            logging.warning("%s", verdict.notice)
            raise RewindError(verdict.bad_step)
        return verdict

    def log(self, step: int, data_statistics: Mapping[str, float]) -> None:
        """Writes the means over the steps since the last call, and what the input pipeline says.

        Raises:
          BadNumbersError, RewindError: as `look`.
        """
        seen = self.look()
        if seen.notice:
            logging.warning("%s", seen.notice)
        self._pending.clear()
        rates = self.timer.lap(step, self.clock.stalled_seconds)
        values = {**seen.values, **rates, **data_statistics}
        metrics.log_progress(self._info.resolution, step, self._info.total_steps, values)
        del values["seconds_left"]
        values["samples"] = step * self._info.batch_size
        self._writer.write(step, metrics.GROUP_TRAIN, values)
        self._logged_step = step
        self._supervisor.recorder.log(step, self.clock.stalled_seconds)


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
      supervisor: what watches over it.
      start_over: finds where to go on from when the run must go back.
      periods: how long, and how often.
      rows_at_once: see `Start`.
    """

    train_step: Callable[..., Any]
    dataset_cfg: input_pipeline.DatasetConfig
    layout: input_pipeline.BatchLayout
    checkpointer: checkpoints.Checkpointer
    evaluate: evaluation.Evaluation
    progress: Progress
    supervisor: supervision.Supervisor
    start_over: Callable[[], Start]
    periods: Periods
    rows_at_once: int

    def __post_init__(self) -> None:
        """Nothing is evaluated yet."""
        self._evaluation_due = False

    def run(self, start: Start) -> train_state.TrainState:
        """Trains to the end.

        Raises:
          PreemptedError: the run was asked to stop; its state is saved.
          BadNumbersError: it diverged; nothing of that is saved.
        """
        if start.step < self.periods.total:
            logging.info("Training steps %d to %d.", start.step + 1, self.periods.total)
        with contextlib.closing(self.progress.clock), self.supervisor.recorder.phase("step"):
            try:
                state = self._run_with_rewinds(start)
            except Exception:
                # A save that is under way is worth waiting for; the error that ends the run is not
                # to be hidden by what becomes of it.
                with contextlib.suppress(Exception), self.supervisor.recorder.phase("checkpoint"):
                    self.checkpointer.wait()
                raise
            self._close_checkpointer()
            # Asked to while the last save was under way: no next stage is to begin.
            if self.supervisor.stop.requested():
                raise preemption.PreemptedError(self.periods.total)
            return state

    def _close_checkpointer(self) -> None:
        with self.supervisor.recorder.phase("checkpoint"):
            self.checkpointer.close()

    def _run_with_rewinds(self, start: Start) -> train_state.TrainState:
        while True:
            try:
                return self._run(start)
            except RewindError as error:
                bad_step = error.bad_step
            # Out here, where the exception no longer holds on to the state that went wrong: there
            # is no room for two.
            start = self._rewound(start, bad_step)

    def _rewound(self, start: Start, bad_step: int) -> Start:
        """The last checkpoint, with the data that follow `bad_step` of the run from `start`."""
        taken = bad_step - self._first_step
        return dataclasses.replace(
            self.start_over(),
            position=start.position + taken * self.dataset_cfg.batch_size,
            evaluation_due=False,
            rewinds=start.rewinds + 1,
        )

    def _run(self, start: Start) -> train_state.TrainState:
        """Trains until the end, or until the run must go back."""
        self._first_step = step = start.step
        state = start.state
        self.progress.restart(step, start.rewinds)
        if start.evaluation_due:
            self._evaluate_again(step, state)
        batches = input_pipeline.TrainIterator(self.dataset_cfg, self.layout, start.position)
        steps = range(step + 1, self.periods.total + 1)
        updates = training_steps(state, self.train_step, batches, self.progress.clock, steps)
        with contextlib.closing(batches):
            try:
                for step, state, step_metrics in updates:
                    self.progress.add(step_metrics)
                    self._finish_step(step, state, batches, start.rewinds)
            except Exception as error:
                if step > self._first_step and self._loses_steps(error, state):
                    self._save_after(error, step, state, batches, start.rewinds)
                raise
        return state

    def _finish_step(self, step: int, state: Any, batches: Any, rewinds: int) -> None:
        """Logs, evaluates and saves what is due after `step` updates."""
        is_last = step == self.periods.total
        stopping, results = self.supervisor.stop.requested(), {}
        if stopping or is_last or step % self.periods.log == 0:
            self.progress.log(step, batches.statistics())
        self._evaluation_due = self.periods.is_evaluated(step)
        if self._evaluation_due and not stopping:
            try:
                results = self._evaluate(step, state)
            except supervision.StopRequestedError:
                stopping = True
        if stopping or self.checkpointer.is_due(step, self.periods.total):
            self._save(step, state, batches, rewinds, results)
        if stopping:
            self._close_checkpointer()
            raise preemption.PreemptedError(step)
        with self.supervisor.recorder.phase("checkpoint"):
            self.checkpointer.limit_unsaved(step)

    def _evaluate(self, step: int, state: train_state.TrainState) -> dict[str, float]:
        with self.progress.timer.paused(), self.supervisor.recorder.phase("evaluation"):
            results = self.evaluate(step, state.params, step == self.periods.total)
        self._evaluation_due = False
        return results

    def _evaluate_again(self, step: int, state: train_state.TrainState) -> None:
        """The evaluation that was left for stopping; the checkpoint says still that it is due."""
        try:
            self._evaluate(step, state)
        except supervision.StopRequestedError:
            raise preemption.PreemptedError(step) from None

    def _save(
        self,
        step: int,
        state: train_state.TrainState,
        batches: input_pipeline.TrainIterator,
        rewinds: int,
        results: Mapping[str, float],
    ) -> None:
        self.progress.look()
        self.supervisor.check_lease()
        data_state = {
            **batches.state(),
            "evaluation_due": self._evaluation_due,
            "rewinds": rewinds,
            "rows_at_once": self.rows_at_once,
        }
        with self.supervisor.recorder.phase("checkpoint"):
            self.checkpointer.save(step, state, data_state, results)
        self.supervisor.watchdog.beat(f"saving step {step}")

    def _loses_steps(self, error: Exception, state: train_state.TrainState) -> bool:
        """Whether an error ends the run for reasons that are none against saving its state.

        Of several processes only one may have failed, and saving takes all.
        """
        reasons = (RewindError, UnsavableError, preemption.PreemptedError)
        return (
            jax.process_count() == 1
            and not isinstance(error, reasons)
            and not state.step.is_deleted()
        )

    def _save_after(
        self, error: Exception, step: int, state: Any, batches: Any, rewinds: int
    ) -> None:
        """Saves what an error would lose; what fails here must not hide that error."""
        name = type(error).__name__
        try:
            self._save(step, state, batches, rewinds, {})
            self.checkpointer.wait(last=True)
            logging.error("%s after step %d, which is saved.", name, step)
        except Exception as another:
            logging.error("%s after step %d, which cannot be saved: %s", name, step, another)
