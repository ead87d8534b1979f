"""Checkpoints: the whole state of a run, saved beside training and verified before it is used.

A checkpoint is `MODEL_DIR/checkpoint_<step>/` with three items, as orbax lays them out: `state`
(step, params, opt_state, rng), `data` (the position in the data) and `config` (the gin text that
made it), and the manifest of all their files. It counts when its manifest is there.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from clipa_t5x import (
    agreement,
    bad_numbers,
    checkpoint_folders,
    checkpoint_manifest,
    checkpoint_retention,
    checkpoint_writer,
    train_state,
)
from clipa_t5x.checkpoint_folders import PREFIX, folder_of
from clipa_t5x.errors import UnsavableError, UserError, check_number
from clipa_t5x.weights import differences

_OPTIMIZER = (
    "Use another MODEL_DIR with INITIAL_CHECKPOINT_PATH, or the OPTIMIZER that wrote it "
    "(MAX_LOGIT_SCALE, too, is a part of it, or none)."
)


@dataclasses.dataclass(frozen=True)
class SaveCheckpointConfig:
    """When to save, and what to keep.

    Attributes:
      period: steps between checkpoints; None saves at the end only. The last step is always saved.
      keep: how many of the newest to keep; None keeps all.
      keep_period: also keep those whose step is a multiple of it; None for none.
      keep_best: also keep so many of the best by `best_metric`, of those that are evaluated in the
        step that they are saved in, or by then by `eval --watch`.
      best_metric: such as 'inference_eval/imagenet/accuracy'.
      best_mode: 'max' where larger is better, or 'min'.
      max_failed_saves: how many saves of a start may fail, each logged as an error, before the run
        does. The last one of a run must not.
      max_unsaved_steps: most steps that a kill may cost: training waits for the save under way
        before it does more. Not less than `period`, which makes it wait for each save at once;
        None never waits but for the save before.
    """

    period: int | None = None
    keep: int | None = 3
    keep_period: int | None = None
    keep_best: int = 0
    best_metric: str | None = None
    best_mode: str = "max"
    max_failed_saves: int = 0
    max_unsaved_steps: int | None = None

    def check(self) -> None:
        """Refuses what cannot be saved by.

        Raises:
          UserError: a number that is none or too small, or half of what keeping the best needs.
        """
        for name, value in (
            ("CHECKPOINT_PERIOD", self.period),
            ("KEEP_CHECKPOINTS", self.keep),
            ("KEEP_CHECKPOINT_PERIOD", self.keep_period),
            ("MAX_UNSAVED_STEPS", self.max_unsaved_steps),
        ):
            if value is not None:
                check_number(name, value, minimum=1, whole=True)
        check_number("KEEP_BEST_CHECKPOINTS", self.keep_best, minimum=0, whole=True)
        check_number("MAX_FAILED_SAVES", self.max_failed_saves, minimum=0, whole=True)
        if self.best_mode not in ("max", "min"):
            raise UserError(f"BEST_MODE is {self.best_mode!r}; it must be 'max' or 'min'.")
        if self.keep_best and not self.best_metric:
            raise UserError(
                f"KEEP_BEST_CHECKPOINTS is {self.keep_best} and BEST_METRIC is not set: name a "
                "metric, such as 'inference_eval/imagenet/accuracy'."
            )
        unsaved = self.max_unsaved_steps
        if unsaved is not None and (self.period is None or unsaved < self.period):
            raise UserError(
                f"MAX_UNSAVED_STEPS is {unsaved}, less than the steps between two checkpoints, "
                f"CHECKPOINT_PERIOD = {self.period}: lower that one, or allow for more."
            )

    @property
    def retention(self) -> checkpoint_retention.Retention:
        """What is kept, as arithmetic."""
        return checkpoint_retention.Retention(
            self.keep, self.keep_period, self.keep_best, self.best_mode
        )


@dataclasses.dataclass(frozen=True)
class RestoreCheckpointConfig:
    """Where a fresh run takes its parameters from. A resumed run never looks here.

    Attributes:
      path: MODEL_DIR of an earlier stage (its newest checkpoint is taken), one checkpoint's
        folder, or CLIPA's or OpenCLIP's weights; None starts from scratch. Parameters go over by
        name; step, optimizer state and its counts start anew.
      resized: names of the parameters whose first dimension, positions, may differ and is then
        interpolated. Every other difference of shape is refused.
    """

    path: str | None = None
    resized: Sequence[str] = (
        "text_tower/position_embedding",
        "image_tower/position_embedding",
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Saving and restoring, T5X's pair."""

    save: SaveCheckpointConfig = SaveCheckpointConfig()
    restore: RestoreCheckpointConfig = RestoreCheckpointConfig()


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
      state: laid out as was asked for.
      data_state: the position in the data.
      step: of the checkpoint.
    """

    state: train_state.TrainState
    data_state: dict[str, Any]
    step: int


class Checkpointer:
    """Saves and resumes one run's state in its MODEL_DIR.

    All methods are called by every process, in the same order. Writing, checksums, manifest and
    retention are a thread's work beside training.
    """

    def __init__(self, model_dir: str, cfg: SaveCheckpointConfig):
        """Opens (and creates) `model_dir`, and clears it of what a killed run left half-written.

        Raises:
          UserError: it cannot be written.
        """
        self._cfg, self._model_dir = cfg, model_dir
        self._writer = checkpoint_writer.CheckpointWriter(model_dir, cfg.retention, cfg.best_metric)
        self._failed_saves = 0
        self._warned_of_metric = False
        failure = agreement.same_for_all("checkpoints_opened", self._clear)
        if failure:
            raise UserError(f"MODEL_DIR {model_dir} cannot be written: {failure}. Use another one.")
        self._find_steps()

    def _clear(self) -> str:
        try:
            epath.Path(self._model_dir).mkdir(parents=True, exist_ok=True)
            checkpoint_folders.clear_leftovers(self._model_dir)
        except OSError as error:
            return checkpoint_writer.cause(error)
        return ""

    def _find_steps(self) -> None:
        steps = agreement.same_for_all("checkpoints_listed", lambda: json.dumps(self._there()))
        self._steps: list[int] = json.loads(steps)

    def _there(self) -> list[int]:
        return checkpoint_folders.steps_there(self._model_dir)

    def _folder(self, step: int) -> epath.Path:
        return folder_of(self._model_dir, step)

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether the state after `step` updates is to be saved."""
        return step == last_step or (self._cfg.period is not None and step % self._cfg.period == 0)

    def check_space(
        self, abstract_state: train_state.TrainState, first_step: int, last_step: int
    ) -> None:
        """Refuses a run whose checkpoints would not fit on its disk; nothing is said of buckets.

        Args:
          abstract_state: what will be saved.
          first_step: updates done so far.
          last_step: updates that will be done.

        Raises:
          UserError: how much they would take, and how much there is.
        """
        period = self._cfg.period or last_step
        due = [s for s in range(first_step + 1, last_step) if s % period == 0] + [last_step]
        peak = self._cfg.retention.peak(self._steps, due)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_state))
        needed = (peak - len(self._steps)) * size

        def shortage() -> str:
            if checkpoint_manifest.is_remote(self._model_dir):
                return ""
            free = shutil.disk_usage(self._model_dir).free
            return "" if needed <= free else f"{free / 1e9:.3g}"

        if free := agreement.same_for_all("checkpoint_space", shortage):
            raise UserError(
                f"checkpoints of this run take up to {needed / 1e9:.3g} GB more ({size / 1e9:.3g} "
                f"GB each, {peak} at once, {len(self._steps)} are there), and the disk of "
                f"MODEL_DIR {self._model_dir} has {free} GB left: lower KEEP_CHECKPOINTS, raise "
                "CHECKPOINT_PERIOD, free space or use another MODEL_DIR."
            )

    def save(
        self,
        step: int,
        state: train_state.TrainState,
        data_state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begins to save in the background; a step that is already there is left alone.

        Waits for the save before it. The run's `config.gin`, where it has one, goes along. The
        state may be donated as soon as this returns.

        Args:
          step: updates done.
          state: after them.
          data_state: the position in the data, of JSON's types.
          metrics: of this step's evaluation by flat name ('inference_eval/digit/accuracy').

        Raises:
          UserError: an earlier save failed, and no more may: where and why.
        """
        self.wait()
        if step in self._steps:
            return
        metrics = metrics or {}
        self._check_metric(metrics)
        self._writer.start(step, state, data_state, metrics)

    def _check_metric(self, metrics: Mapping[str, float]) -> None:
        name = self._cfg.best_metric
        if self._cfg.keep_best and metrics and name not in metrics and not self._warned_of_metric:
            self._warned_of_metric = True
            logging.warning(
                "No evaluation gives BEST_METRIC %s: no checkpoint is kept for it. Known: %s.",
                name,
                ", ".join(sorted(metrics)),
            )

    def limit_unsaved(self, step: int) -> None:
        """Waits for the save under way where a kill within the next step would cost too much.

        Args:
          step: updates done.

        Raises:
          UserError: the save failed, and no more may.
        """
        most = self._cfg.max_unsaved_steps
        if most is not None and step + 1 - max(self._steps, default=0) > most:
            self.wait()

    def wait(self, last: bool = False) -> None:
        """Waits for the save that is under way, and counts it if it failed.

        Raises:
          UserError: more have failed than may, or the last one has.
        """
        outcome = self._writer.wait()
        if outcome is None:
            return
        self._steps = outcome.steps
        if not outcome.failure:
            return
        self._failed_saves += 1
        failure = f"saving {self._folder(outcome.step)} failed: {outcome.failure}"
        allowed = self._cfg.max_failed_saves
        if last or self._failed_saves > allowed:
            raise UnsavableError(
                f"{failure}. Mend that and start again: the run goes on from its newest whole "
                "checkpoint (MAX_FAILED_SAVES allows for failures of all but the last save)."
            )
        logging.error(
            "%s. Training goes on (%d of %d, MAX_FAILED_SAVES).",
            failure, self._failed_saves, allowed,
        )  # fmt: skip

    def restore(self, abstract_state: train_state.TrainState) -> Restored | None:
        """The newest checkpoint that is as it was written; waits for a save that is under way.

        Newer ones, which are damaged, are set aside: their steps will be saved anew.

        Args:
          abstract_state: shapes, dtypes and shardings to restore to.

        Returns:
          None where there is no checkpoint, whole or not.

        Raises:
          UserError: the checkpoint is of another model or optimizer, all are damaged, or an earlier
            save failed.
        """
        self.wait()
        self._find_steps()
        step, damages = checkpoint_folders.newest_whole(self._model_dir, self._steps)
        if step is None:
            self._refuse_to_start_over(damages)
            return None
        restored = self._load(step, abstract_state)
        self._set_aside(step, damages)
        return restored

    def _refuse_to_start_over(self, damages: Mapping[int, str]) -> None:
        if damages:
            step = max(damages)
            raise UserError(
                f"no checkpoint in {self._model_dir} is as it was written, of {len(damages)}; in "
                f"{PREFIX}_{step}, {damages[step]}. Put a whole one there, or use another "
                "MODEL_DIR, or remove them to start from scratch."
            )

    def _set_aside(self, step: int, damages: Mapping[int, str]) -> None:
        """Makes what is newer than `step` count no more."""

        def move() -> str:
            for newer in [s for s in self._there() if s > step]:
                became = checkpoint_folders.set_aside(self._folder(newer))
                logging.warning(
                    "%s is passed over, and %s is used instead: %s; %s.",
                    self._folder(newer), f"{PREFIX}_{step}",
                    damages[newer], became,
                )  # fmt: skip
            return ""

        agreement.same_for_all("checkpoints_set_aside", move)
        self._find_steps()

    def _load(self, step: int, abstract_state: train_state.TrainState) -> Restored:
        folder = self._folder(step)
        saved = _saved_tree(folder)
        check_same_parameters(
            flatten(saved["params"]), flatten(abstract_state.params), str(folder),
            "Use another MODEL_DIR, or the configuration that wrote it (its config.gin).",
        )  # fmt: skip
        fields = bad_numbers.as_saved(abstract_state, list(flatten(saved))).as_tree()
        _check_same_optimizer(flatten(saved), flatten(fields), folder)
        arguments = ocp.args.PyTreeRestore(
            item=fields,  # pyright: ignore[reportCallIssue]
            restore_args=ocp.checkpoint_utils.construct_restore_args(fields),  # pyright: ignore[reportCallIssue]
        )
        try:
            restored = checkpoint_writer.state_handler().restore(folder / "state", args=arguments)
        except ValueError as error:
            # Parts of an optimizer that hold no arrays: the clamp of logit_scale, frozen names.
            if "tree structures do not match" not in str(error):
                raise
            raise UserError(
                f"{folder} holds another optimizer's state (its parts are others). {_OPTIMIZER}"
            ) from error
        state = bad_numbers.as_wanted(train_state.TrainState(**restored), abstract_state)
        return Restored(state, json.loads((folder / "data" / "metadata").read_text()), step)

    def close(self) -> None:
        """Waits for the last save.

        Raises:
          UserError: it failed, whatever may fail.
        """
        try:
            self.wait(last=True)
        finally:
            self._writer.close()
        agreement.same_for_all("checkpoints_closed", self._clear)


def wait_for_all_processes(name: str, timeout_secs: int = 3600) -> None:
    """Returns when every process of the run is here; `name` is used once in a run.

    Collectives on CPUs give up after half a minute: processes that compile at different speeds
    must meet before their first one.
    """
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * timeout_secs)


def flatten(tree: Any) -> dict[str, Any]:
    """A nested tree's leaves under names such as 'image_tower/head/kernel'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves
    }  # fmt: skip


def locate(path: str) -> tuple[str, int]:
    """(MODEL_DIR, step) of a checkpoint folder, or of the newest whole one in a MODEL_DIR.

    Every file of it is read and compared with its manifest. Called by every process.

    Raises:
      UserError: there is no complete checkpoint, or the one that is named is damaged.
    """
    path = path.rstrip("/")
    match = re.fullmatch(rf"{PREFIX}_(0|[1-9]\d*)", os.path.basename(path))
    parent = (os.path.dirname(path) or ".") if match else path
    known = json.loads(
        agreement.same_for_all(
            "checkpoints_located", lambda: json.dumps(checkpoint_folders.steps_there(parent))
        )
    )
    candidates = [step for step in known if match is None or step == int(match.group(1))]
    step, damages = checkpoint_folders.newest_whole(parent, candidates)
    instead = f"and {PREFIX}_{step} is used instead" if step is not None else "and none is whole"
    if step is None and match and damages:
        raise UserError(
            f"checkpoint {path} is damaged: {damages[int(match.group(1))]}. Name another one "
            f"(there: {[f'{PREFIX}_{s}' for s in known]}), or the MODEL_DIR for its newest whole "
            "one (INITIAL_CHECKPOINT_PATH, --checkpoint)."
        )
    for damaged, damage in damages.items():
        logging.warning("%s is passed over, %s: %s.", folder_of(parent, damaged), instead, damage)
    if step is None:
        raise UserError(
            f"there is no complete checkpoint at {path} (complete ones there: "
            f"{[f'{PREFIX}_{s}' for s in known if s not in damages] or 'none'}): give a "
            f"MODEL_DIR that holds one, or one {PREFIX}_<step> folder (INITIAL_CHECKPOINT_PATH, "
            "--checkpoint)."
        )
    return parent, step


def all_steps(model_dir: str) -> list[int]:
    """Steps of the complete checkpoints in a MODEL_DIR, ascending; whether whole, is not read."""
    return checkpoint_folders.complete_steps(model_dir)


def saved_params(model_dir: str, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of the parameters in a checkpoint; reads no array."""
    params = _saved_tree(folder_of(model_dir, step))["params"]
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in flatten(params).items()}


def _saved_tree(folder: epath.Path) -> Any:
    """A checkpoint's train state as a nested dictionary of what describes its arrays."""
    return checkpoint_writer.state_handler().metadata(folder / "state").tree


def check_same_parameters(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], where: str, remedy: str
) -> None:
    """Refuses a checkpoint whose parameters have other names or shapes.

    Raises:
      UserError: names the options that differ, lists up to eight of the differences with the
        nearest names on the other side, and says how many there are.
    """
    if found := differences.of_models(_shapes(saved), _acceptable(wanted)):
        raise UserError(f"checkpoint {where} {found}. {remedy}")


def _check_same_optimizer(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: epath.Path
) -> None:
    if found := differences.of_arrays(_shapes(saved), _acceptable(wanted), "arrays"):
        raise UserError(f"{folder} holds another optimizer's state: {found}. {_OPTIMIZER}")


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items()}


def _acceptable(arrays: Mapping[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    return {name: [shape] for name, shape in _shapes(arrays).items()}
