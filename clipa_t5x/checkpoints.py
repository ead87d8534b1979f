"""Checkpoints: the whole state of a run by orbax, and parameters handed from stage to stage.

A checkpoint is `MODEL_DIR/checkpoint_<step>/` with three items: `state` (step, params, opt_state,
rng), `data` (the position in the data) and `config` (the gin text that made it). It is written in
the background under a temporary name and appears under its own only when complete.
"""

import dataclasses
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from clipa_t5x import train_state
from clipa_t5x.errors import UserError

PREFIX = "checkpoint"
ITEMS = ("state", "data", "config")


@dataclasses.dataclass(frozen=True)
class SaveCheckpointConfig:
    """When to save.

    Attributes:
      period: steps between checkpoints; None saves at the end only. The last step is always saved.
      keep: how many to keep; None keeps all.
    """

    period: int | None = None
    keep: int | None = 3


@dataclasses.dataclass(frozen=True)
class RestoreCheckpointConfig:
    """Where a fresh run takes its parameters from. A resumed run never looks here.

    Attributes:
      path: MODEL_DIR of an earlier stage (its newest checkpoint is taken) or one checkpoint's
        folder; None starts from scratch. Parameters go over by name; step, optimizer state and its
        counts start anew.
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


def _manager(
    model_dir: str, keep: int | None = None, read_only: bool = False
) -> ocp.CheckpointManager:
    policy = ocp.checkpoint_managers.preservation_policy
    handlers: dict[str, Any] = {
        "state": ocp.PyTreeCheckpointHandler() if read_only else ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(
        epath.Path(model_dir).absolute(),
        options=ocp.CheckpointManagerOptions(
            step_prefix=PREFIX,
            preservation_policy=policy.LatestN(keep) if keep else policy.PreserveAll(),
            create=not read_only,
            read_only=read_only,
        ),
        item_handlers=handlers,
    )


class Checkpointer:
    """Saves and resumes one run's state in its MODEL_DIR."""

    def __init__(self, model_dir: str, cfg: SaveCheckpointConfig):
        """Opens (and creates) `model_dir`, and clears it of what a killed run left half-written."""
        _clear_incomplete(model_dir)
        self._cfg = cfg
        self._model_dir = model_dir
        self._manager = _manager(model_dir, cfg.keep)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None where there is none."""
        return self._manager.latest_step()

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether the state after `step` updates is to be saved."""
        return step == last_step or (self._cfg.period is not None and step % self._cfg.period == 0)

    def save(
        self,
        step: int,
        state: train_state.TrainState,
        data_state: Mapping[str, Any],
    ) -> None:
        """Begins to save in the background; a step that is already there is left alone.

        The run's `config.gin`, where it has one, goes along.

        Raises:
          Exception: the previous save failed. Nothing that fails here is passed over.
        """
        if step in self._manager.all_steps():
            return
        config = epath.Path(self._model_dir) / "config.gin"
        text = config.read_text() if jax.process_index() == 0 and config.exists() else ""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
                data=ocp.args.JsonSave(dict(data_state)),  # pyright: ignore[reportCallIssue]
                config=ocp.args.JsonSave({"gin": text}),  # pyright: ignore[reportCallIssue]
            ),
            force=True,
        )

    def restore(
        self, abstract_state: train_state.TrainState
    ) -> tuple[train_state.TrainState, dict[str, Any]]:
        """The newest checkpoint's state, laid out as `abstract_state`, and its data position.

        Raises:
          UserError: the checkpoint is of another model.
        """
        step = self.latest_step()
        where = f"{self._model_dir}/{PREFIX}_{step}"
        saved = saved_params(self._model_dir, step)
        check_same_parameters(
            saved, flatten(abstract_state.params), where,
            "Use another MODEL_DIR, or the configuration that wrote it (its config.gin).",
        )  # fmt: skip
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state),  # pyright: ignore[reportCallIssue]
                    data=ocp.args.JsonRestore(),
                ),
            )
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{where} holds another optimizer's state ({str(error).splitlines()[0]}). Use "
                "another MODEL_DIR with INITIAL_CHECKPOINT_PATH, or the OPTIMIZER that wrote it."
            ) from error
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Waits for the last save; raises if it failed."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._manager.close()


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
    """(MODEL_DIR, step) of a checkpoint folder, or of the newest complete one in a MODEL_DIR.

    Raises:
      UserError: there is no complete checkpoint.
    """
    path = path.rstrip("/")
    if match := re.fullmatch(rf"{PREFIX}_(\d+)", os.path.basename(path)):
        parent, step = os.path.dirname(path) or ".", int(match.group(1))
        known = all_steps(parent)
        if step in known:
            return parent, step
    else:
        parent, known = path, all_steps(path)
        if known:
            return parent, known[-1]
    raise UserError(
        f"there is no complete checkpoint at {path} (complete ones there: "
        f"{[f'{PREFIX}_{s}' for s in known] or 'none'}): give a MODEL_DIR that holds one, or one "
        f"{PREFIX}_<step> folder (INITIAL_CHECKPOINT_PATH, --checkpoint)."
    )


def all_steps(model_dir: str) -> list[int]:
    """Steps of the complete checkpoints in a MODEL_DIR, ascending."""
    root = epath.Path(model_dir)
    if not root.is_dir():
        return []
    with _manager(model_dir, read_only=True) as manager:
        steps = sorted(manager.all_steps())
    return [step for step in steps if _is_complete(root / f"{PREFIX}_{step}")]


def _is_complete(path: epath.Path) -> bool:
    """Whether a checkpoint's folder holds its items and was committed, the last act of a save."""
    metadata = path / "_CHECKPOINT_METADATA"
    if not metadata.exists() or not all((path / item).is_dir() for item in ITEMS):
        return False
    try:
        return json.loads(metadata.read_text())["commit_timestamp_nsecs"] is not None
    except (ValueError, KeyError):
        return False


def _clear_incomplete(model_dir: str) -> None:
    """Removes half-written checkpoints; one that may be another's broken copy is set aside.

    Orbax's own clean-up would take every folder of MODEL_DIR in a bucket, logs and the checkpoints
    of other stages included, for a half-written checkpoint.
    """
    root = epath.Path(model_dir)
    if jax.process_index() == 0 and root.is_dir():
        for path in root.iterdir():
            match = re.fullmatch(rf"{PREFIX}_\d+(\.orbax-checkpoint-tmp.*)?", path.name)
            if match is None or not path.is_dir():
                continue
            if match.group(1):
                logging.warning("Removing %s, which a killed run left half-written.", path)
                path.rmtree()
            elif not _is_complete(path):
                aside = path.with_name(f"{path.name}.incomplete-{time.time_ns()}")
                logging.warning("%s is not a complete checkpoint: it is now %s.", path, aside)
                path.rename(aside)
    multihost_utils.sync_global_devices("incomplete checkpoints cleared")


def saved_params(model_dir: str, step: int | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of the parameters in a checkpoint; reads no array."""
    with _manager(model_dir, read_only=True) as manager:
        tree = manager.item_metadata(step)["state"].tree["params"]  # pyright: ignore
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in flatten(tree).items()}


def check_same_parameters(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], where: str, remedy: str
) -> None:
    """Refuses a checkpoint whose parameters have other names or shapes.

    Raises:
      UserError: lists up to eight of the differences, and says how many there are.
    """
    differences = [f"{k} is missing there" for k in wanted if k not in saved]
    differences += [f"{k} is unknown here" for k in saved if k not in wanted]
    differences += [
        f"{k} is {tuple(saved[k].shape)} there and {tuple(wanted[k].shape)} here"
        for k in wanted
        if k in saved and tuple(saved[k].shape) != tuple(wanted[k].shape)
    ]
    if differences:
        shown = "; ".join(differences[:8]) + ("; ..." if len(differences) > 8 else "")
        raise UserError(
            f"checkpoint {where} is of a different model: {len(differences)} parameters differ: "
            f"{shown}. {remedy}"
        )


def load_params(
    path: str, abstract_params: Any, resized: Sequence[str] = ()
) -> tuple[Any, list[str]]:
    """Parameters of a checkpoint by name, laid out as `abstract_params`.

    Args:
      path: see `locate`.
      abstract_params: tree of `jax.ShapeDtypeStruct` with shardings.
      resized: names whose first dimension is interpolated where it differs.

    Returns:
      (parameters, one line for each that was resized).

    Raises:
      UserError: there is no checkpoint, or names or shapes differ beyond `resized`.
    """
    model_dir, step = locate(path)
    saved, wanted = saved_params(model_dir, step), flatten(abstract_params)
    changed = {
        name
        for name in resized
        if name in saved and name in wanted
        and saved[name].shape[1:] == wanted[name].shape[1:]
        and saved[name].shape != wanted[name].shape
    }  # fmt: skip
    check_same_parameters(
        {k: v for k, v in saved.items() if k not in changed},
        {k: v for k, v in wanted.items() if k not in changed},
        f"{model_dir}/{PREFIX}_{step}",
        "Give a checkpoint of this model (INITIAL_CHECKPOINT_PATH, --checkpoint).",
    )

    def as_saved(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape, sharding = leaf.shape, leaf.sharding
        if name in changed:  # small; its dimensions need not divide by the mesh
            shape = saved[name].shape
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    request = {"params": jax.tree_util.tree_map_with_path(as_saved, abstract_params)}
    with _manager(model_dir, read_only=True) as manager:
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item=request,  # pyright: ignore[reportCallIssue]
                    restore_args=ocp.checkpoint_utils.construct_restore_args(request),  # pyright: ignore[reportCallIssue]
                    partial_restore=True,  # pyright: ignore[reportCallIssue]
                )
            ),
        )["state"]["params"]

    notes = []

    def fit(path: Any, leaf: jax.Array, target: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in changed:
            return leaf
        notes.append(f"{name}: {leaf.shape[0]} -> {target.shape[0]} positions")
        resize = resize_image_positions if name.startswith("image_tower") else resize_positions
        resize_to = jax.jit(resize, static_argnums=1, out_shardings=target.sharding)
        return resize_to(leaf, target.shape[0])

    return jax.tree_util.tree_map_with_path(fit, restored, abstract_params), notes


def resize_positions(table: jax.Array, length: int) -> jax.Array:
    """Linear interpolation of a position table [positions, width] to [length, width].

    Half-pixel centres, edges clamped: what turns CLIPA's 8 text positions into 32.
    """
    return jax.image.resize(table, (length, table.shape[1]), "linear", antialias=False)


def resize_image_positions(table: jax.Array, length: int) -> jax.Array:
    """Bilinear interpolation of a learned table [1 + n^2, width] to [length, width].

    The class token's row, the first, is kept; the others are a square grid.

    Raises:
      UserError: one of the two is not a square grid and a class token.
    """
    old, new = round(np.sqrt(table.shape[0] - 1)), round(np.sqrt(length - 1))
    if old**2 != table.shape[0] - 1 or new**2 != length - 1:
        raise UserError(
            f"image position embeddings of {table.shape[0]} and {length} rows are not a class "
            "token and a square grid: use square images, or position_embedding='sincos2d'."
        )
    width = table.shape[1]
    grid = table[1:].reshape(old, old, width)
    grid = jax.image.resize(grid, (new, new, width), "linear", antialias=False)
    return jnp.concatenate([table[:1], grid.reshape(-1, width)])


def log_notes(path: str, notes: Sequence[str]) -> None:
    """Tells what was taken from where."""
    logging.info("Parameters from %s by name; optimizer, step and data start anew.", path)
    for note in notes:
        logging.info("Resized %s.", note)
