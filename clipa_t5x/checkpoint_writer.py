"""Writing a checkpoint beside training: arrays, manifest, and what it makes superfluous."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from clipa_t5x import (
    agreement,
    checkpoint_folders,
    checkpoint_manifest,
    checkpoint_retention,
    evaluation_records,
    train_state,
)
from clipa_t5x.errors import storage_errors

# Where all cores are busy, a save gets what the threads of the train step leave.
_NICENESS = 19


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a save, the same on every process.

    Attributes:
      step: that was saved.
      failure: why it failed, with the first process that could not; '' where it did not.
      steps: of the complete checkpoints that there are now.
    """

    step: int
    failure: str
    steps: list[int]


@dataclasses.dataclass(frozen=True)
class _Save:
    """A save that is under way.

    Attributes:
      step: that is saved.
      metrics: of this step's evaluation.
      mesh: axis sizes.
      commits: what orbax writes in the background.
      failure: why it failed before the background, '' where it did not.
    """

    step: int
    metrics: Mapping[str, float]
    mesh: Mapping[str, int]
    commits: Sequence[Any]
    failure: str


def state_handler() -> ocp.PyTreeCheckpointHandler:
    """What writes and reads a train state: few files for many arrays, as they are in memory.

    Compressing floats would take ten times the processor's time for a twelfth of the size.
    """
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)


class CheckpointWriter:
    """Writes one checkpoint after the other into a MODEL_DIR, in a thread.

    All methods are called by every process, in the same order.
    """

    def __init__(
        self,
        model_dir: str,
        retention: checkpoint_retention.Retention,
        best_metric: str | None = None,
    ):
        """Writes nothing yet; `best_metric` is what `retention` ranks by."""
        self._model_dir, self._retention, self._best_metric = model_dir, retention, best_metric
        self._handler = state_handler()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[str] | None = None

    def start(
        self,
        step: int,
        state: train_state.TrainState,
        data_state: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> None:
        """Begins a save, when the one before has been waited for; see `Checkpointer.save`."""
        failure = agreement.same_for_all(
            "checkpoint_begun", lambda: self._begin(self._folder(step), data_state)
        )
        commits: list[Any] = []
        if not failure:
            copy = self._worker.submit(_attempt, lambda: commits.extend(self._copy(step, state)))
            failure = copy.result()
        mesh = getattr(state.step.sharding, "mesh", None)
        save = _Save(step, metrics, mesh.shape if mesh else {}, commits, failure)
        self._pending = self._worker.submit(self._write, save)

    def wait(self) -> Outcome | None:
        """What became of the save that is under way; None where none is."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        return Outcome(**json.loads(pending.result()))

    def close(self) -> None:
        """Ends the thread."""
        self._worker.shutdown()

    def _folder(self, step: int) -> epath.Path:
        return checkpoint_folders.folder_of(self._model_dir, step)

    def _begin(self, folder: epath.Path, data_state: Mapping[str, Any]) -> str:
        """Makes the folder and writes all but the arrays; '' or why it could not."""

        def begin() -> None:
            checkpoint_folders.clear_leftovers(self._model_dir)
            checkpoint_folders.begin(folder)
            config = epath.Path(self._model_dir) / "config.gin"
            text = config.read_text() if config.exists() else ""
            (folder / "data" / "metadata").write_text(json.dumps(dict(data_state)))
            (folder / "config" / "metadata").write_text(json.dumps({"gin": text}))

        return _attempt(begin)

    def _copy(self, step: int, state: train_state.TrainState) -> Sequence[Any]:
        """Takes the state off the devices; what is returned still has to be written.

        In a thread, for asyncio runs in none that has an event loop, as notebooks do.
        """
        _yield_to_training()
        save = self._handler.async_save(
            self._folder(step) / "state",
            args=ocp.args.PyTreeSave(state.as_tree()),  # pyright: ignore[reportCallIssue]
        )
        return asyncio.run(save) or ()  # pyright: ignore[reportArgumentType]

    def _write(self, save: _Save) -> str:
        """In the background, on every process: what became of a save, as JSON."""
        failures = [save.failure, *(_attempt(commit.result) for commit in save.commits)]
        failure = agreement.first_word(failures)
        return agreement.agree(
            "checkpoint_written",
            failure,
            lambda failures: self._complete(save, agreement.first_word(failures)),
        )

    def _complete(self, save: _Save, failure: str) -> str:
        """On process 0, when all have written: manifest and retention, or removal of the rest."""
        folder = self._folder(save.step)
        failure = failure or _attempt(lambda: self._make_count(folder, save))
        if not failure:
            # The checkpoint counts, whatever becomes of those that it makes superfluous.
            if left := _attempt(self._remove_superseded):
                logging.error("A checkpoint that is no longer kept cannot be removed: %s.", left)
        elif not checkpoint_folders.is_complete(folder):
            # It may still be written into: what is left goes with the next save.
            _attempt(lambda: checkpoint_folders.empty(folder))
        steps: list[int] = []
        _attempt(lambda: steps.extend(checkpoint_folders.complete_steps(self._model_dir)))
        return json.dumps({"step": save.step, "failure": failure, "steps": steps})

    def _make_count(self, folder: epath.Path, save: _Save) -> None:
        self._handler.finalize(folder / "state")
        checkpoint_manifest.write(folder, save.step, save.metrics, save.mesh)
        checkpoint_folders.finish(folder)

    def _remove_superseded(self) -> None:
        saved = {
            step: self._metric(step) for step in checkpoint_folders.complete_steps(self._model_dir)
        }
        for step in self._retention.superseded(saved):
            checkpoint_folders.remove(self._folder(step))

    def _metric(self, step: int) -> float | None:
        if not self._retention.keep_best or self._best_metric is None:
            return None
        try:
            metrics = checkpoint_manifest.read(self._folder(step))["metrics"]
        except (checkpoint_manifest.DamageError, checkpoint_manifest.UnreadableError):
            return None
        if self._best_metric in metrics:
            return metrics[self._best_metric]
        return self._metric_of_another_process(step, self._best_metric)

    def _metric_of_another_process(self, step: int, name: str) -> float | None:
        """What `eval --watch` has found so far."""
        path = epath.Path(self._model_dir) / evaluation_records.file_name(step)
        try:
            text = path.read_text() if path.exists() else ""
        except storage_errors():
            return None
        evaluation = evaluation_records.parse(text)
        value = evaluation.value(name) if evaluation else None
        return value if value is not None and math.isfinite(value) else None


def _yield_to_training() -> None:
    """Leaves the processor to the train step and the input pipeline where they want it.

    TensorStore's threads write for all who use it: they inherit this from the thread that first
    uses it, which is another one where a checkpoint has been restored.
    """
    if sys.platform != "linux":  # Elsewhere it would be the whole process.
        return
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    for task in pathlib.Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # It has ended.
            if (task / "comm").read_text().startswith("ts_"):
                os.setpriority(os.PRIO_PROCESS, int(task.name), _NICENESS)


def _attempt(action: Callable[[], Any]) -> str:
    """Does something; '' or why it failed. Nothing that goes wrong in a save may pass for one."""
    try:
        action()
    except Exception as error:
        return cause(error)
    return ""


def cause(error: BaseException) -> str:
    """Why something could not be written, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    text = str(error).splitlines()[0] if str(error) else ""
    if code := re.search(r"os_error_code='(\d+)'", text):  # TensorStore's own errors
        return os.strerror(int(code.group(1)))
    return f"{type(error).__name__}: {text}".rstrip(".: ")
