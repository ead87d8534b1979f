"""Evaluates the checkpoints of a run as they come, beside training: `eval --watch`."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from clipa_t5x import (
    agreement,
    checkpoint_folders,
    checkpoint_writer,
    evaluation_records,
    metrics,
    preemption,
    run_history,
    run_summary,
    stage_handover,
    stage_info,
    supervision,
)
from clipa_t5x.errors import UserError, check_number, storage_errors

# Seconds between two questions whether to stop.
_NAP = 0.5


class RecordWriter(metrics.MetricsWriter):
    """Keeps values until all of a checkpoint's are there, then writes its record.

    TensorBoard's events lie where training writes them; a kill between them and the record leaves
    events that the next evaluation repeats.
    """

    def __init__(self, model_dir: str):
        """Writes under `model_dir`."""
        super().__init__(model_dir)
        self._results: dict[str, dict[str, float]] = {}

    def write(self, step: int, group: str, values: Mapping[str, Any]) -> None:
        """Keeps scalars that hold after `step` updates."""
        del step
        self._results[group] = {name: float(value) for name, value in values.items()}

    def finish(self, step: int) -> None:
        """Writes all that was kept, beside what is there: it counts as evaluated from here on.

        Raises:
          UserError: the record cannot be written.
        """
        results, self._results = self._results, {}
        if not self._active:
            return
        for group, values in results.items():
            self.write_events(step, group, values)
        self.flush()
        path = epath.Path(self._model_dir) / evaluation_records.file_name(step)
        try:
            earlier = read_record(self._model_dir, step)
            results = {**(earlier.results if earlier else {}), **results}
            record = evaluation_records.Evaluation(step, time.time(), results)
            path.write_text(record.to_json())
        except storage_errors() as error:
            raise UserError(
                f"{path} cannot be written ({error}): mend that and start again; this evaluation "
                "is done anew."
            ) from error


def read_record(model_dir: str, step: int) -> evaluation_records.Evaluation | None:
    """What an earlier watch found of a step; None where that is nothing, or half a file.

    Raises:
      storage_errors(): it cannot be read.
    """
    path = epath.Path(model_dir) / evaluation_records.file_name(step)
    record = evaluation_records.parse(path.read_text()) if path.exists() else None
    return record if record is not None and record.step == step else None


@dataclasses.dataclass(frozen=True)
class Patience:
    """How a watch waits.

    Attributes:
      poll_seconds: between two looks.
      news_timeout_seconds: after which, without any new checkpoint, it ends; None never.
    """

    poll_seconds: float = 10.0
    news_timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuses what is no time.

        Raises:
          UserError: names the flag.
        """
        check_number("--poll_seconds", self.poll_seconds, minimum=0)
        if self.news_timeout_seconds is not None:
            check_number("--news_timeout_seconds", self.news_timeout_seconds, minimum=0)


class Watch:
    """Evaluates every complete checkpoint of a MODEL_DIR once, the oldest first.

    Of each, what neither an earlier watch nor training has evaluated. All processes do the same at
    the same time.
    """

    def __init__(
        self,
        model_dir: str,
        abstract_params: Any,
        groups: Sequence[str],
        evaluate: Callable[[int, Any, Sequence[str]], Any],
        writer: RecordWriter,
        stop: preemption.StopRequest,
        check_lease: Callable[[], None] = lambda: None,
        save_period: int | None = None,
    ):
        """Looks at nothing yet.

        Args:
          model_dir: of the run.
          abstract_params: how parameters are laid out.
          groups: all that is to be evaluated, as of `evaluation.Evaluation.groups`.
          evaluate: (step, parameters, which of the groups) -> None, writing to `writer`.
          writer: of records.
          stop: asks whether to end.
          check_lease: called before a record is written; raises where another watch has taken over.
          save_period: steps between checkpoints, to tell of those that came and went unseen.
        """
        self._model_dir, self._abstract_params = model_dir, abstract_params
        self._groups, self._evaluate, self._writer = groups, evaluate, writer
        self._stop, self._check_lease = stop, check_lease
        self._save_period = save_period
        self._there: list[int] = []
        self._gone: set[int] = set()
        self._by_training: dict[int, set[str]] | None = None
        self._evaluated: set[int] = set()
        self._passed_over: set[int] = set()
        self._news = time.monotonic()

    def run(self, patience: Patience) -> None:
        """Returns when the run is completed and none of its checkpoints is left to evaluate.

        Raises:
          RestartError: it was asked to stop, or nothing new came for too long.
          UserError: a checkpoint is of another model, the storage does not give one that may be
            whole, or a record cannot be written.
        """
        while True:
            self._leave_if_asked()
            seen = json.loads(agreement.same_for_all("evaluation_watch", self._look))
            if seen["due"] is not None:
                self._evaluate_step(seen["due"], seen["groups"])
            elif seen["completed"]:
                logging.info("%s is completed: nothing is left to evaluate.", self._model_dir)
                return
            else:
                self._wait(patience, seen["silence"])

    def _look(self) -> str:
        """On process 0: what to evaluate next, whether training is done, seconds of silence."""
        due, groups, completed = None, [], False
        self._by_training = None
        try:
            # In this order: what comes after a run is completed is not to be missed.
            completed = stage_info.is_completed(self._model_dir)
            there = checkpoint_folders.complete_steps(self._model_dir)
            self._tell_of_missed(there)
            # Who is gone and comes back is another one.
            self._passed_over &= set(there)
            for due in there:
                if groups := self._groups_due(due):
                    break
            else:
                due = None
        except storage_errors() as error:
            completed = False
            logging.warning("Cannot look at %s (%s): will try again.", self._model_dir, error)
        else:
            if due is not None or there != self._there:
                self._news = time.monotonic()
            self._there = there
        silence = time.monotonic() - self._news
        return json.dumps(
            {"due": due, "groups": groups, "completed": completed, "silence": silence}
        )

    def _groups_due(self, step: int) -> list[str]:
        """What is still to be evaluated of a step; told in the log where some is there."""
        if step in self._evaluated or step in self._passed_over:
            return []
        due = self._groups_missing(step)
        if not due:
            logging.info("The evaluation after step %d is there already.", step)
            self._evaluated.add(step)
        elif len(due) < len(self._groups):
            logging.info("Of the evaluation after step %d, %s is missing.", step, ", ".join(due))
        return due

    def _groups_missing(self, step: int) -> list[str]:
        record = read_record(self._model_dir, step)
        done = set(record.results) if record else set()
        if not done.issuperset(self._groups):
            if self._by_training is None:  # once a look, as there may be many steps
                path = epath.Path(self._model_dir) / run_history.METRICS_FILE
                text = path.read_text() if path.exists() else ""
                self._by_training = evaluation_records.groups_in_metrics(text)
            done |= self._by_training.get(step, set())
        return [group for group in self._groups if group not in done]

    def _tell_of_missed(self, there: Sequence[int]) -> None:
        """Warns of checkpoints that are gone and were not evaluated."""
        period, last = self._save_period, there[-1] if there else 0
        expected = range(period, last, period) if period else ()
        gone = {*expected, *self._there} - {*there, *self._passed_over, *self._gone}
        missed = [s for s in sorted(gone) if s not in self._evaluated and self._groups_missing(s)]
        self._gone |= gone
        if missed:
            some = ", ".join(map(str, missed[:10])) + (", ..." if len(missed) > 10 else "")
            logging.warning(
                "%d checkpoints of %s were removed before they were evaluated, of steps %s: a "
                "greater KEEP_CHECKPOINTS, or KEEP_CHECKPOINT_PERIOD, leaves time for it.",
                len(missed), self._model_dir, some,
            )  # fmt: skip

    def _evaluate_step(self, step: int, groups: Sequence[str]) -> None:
        began = time.monotonic()
        params = self._load(step)
        if params is None:
            self._passed_over.add(step)
            return
        try:
            self._evaluate(step, params, groups)
        except supervision.StopRequestedError:
            raise self._stopped() from None
        self._check_lease()
        self._writer.finish(step)
        self._evaluated.add(step)
        took = run_summary.format_duration(time.monotonic() - began)
        logging.info("Evaluated %s after step %d, in %s.", self._model_dir, step, took)

    def _load(self, step: int) -> Any:
        """A checkpoint's parameters; None, told in the log, where it is damaged or gone."""
        params, damage, failure = None, "", None
        folder = checkpoint_folders.folder_of(self._model_dir, step)
        try:
            whole, damages = checkpoint_folders.newest_whole(self._model_dir, [step])
            damage = damages.get(step, "")
            if whole is not None:
                params = stage_handover.load_checkpoint(
                    self._model_dir, step, self._abstract_params
                ).params
        except Exception as error:  # Anything may come of files that vanish while they are read.
            failure = error
        word = damage or (checkpoint_writer.cause(failure) if failure else "")
        word = agreement.agree("evaluation_loaded", word, agreement.first_word)
        if not word:
            return params
        is_there = lambda: "yes" if checkpoint_folders.is_complete(folder) else ""  # noqa: E731
        if not agreement.same_for_all("evaluation_there", is_there):
            logging.warning("%s was removed before it was evaluated: it is left out.", folder)
            self._gone.add(step)
            return None
        if damage:
            logging.warning("%s is left out, for it is damaged: %s.", folder, damage)
            return None
        raise failure or UserError(f"{folder} cannot be read by another process: {word}.")

    def _wait(self, patience: Patience, silence: float) -> None:
        timeout = patience.news_timeout_seconds
        if timeout is not None and silence > timeout:
            raise preemption.RestartError(
                f"No new checkpoint in {self._model_dir} for {run_summary.format_duration(silence)}"
                " (--news_timeout_seconds), and its run is not completed: the watch ends"
            )
        for _ in range(max(math.ceil(patience.poll_seconds / _NAP), 1)):
            time.sleep(min(_NAP, patience.poll_seconds))
            self._leave_if_asked()

    def _leave_if_asked(self) -> None:
        if self._stop.requested():
            raise self._stopped()

    def _stopped(self) -> preemption.RestartError:
        return preemption.RestartError(
            f"The watch of {self._model_dir} stopped on request; what was evaluated is recorded"
        )


def lease_folder(model_dir: str) -> str:
    """What a watch holds, so that there is one for each MODEL_DIR."""
    return os.path.join(model_dir, evaluation_records.FOLDER)
