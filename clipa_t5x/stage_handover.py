"""Parameters handed from stage to stage: by name, position tables resized."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util

from clipa_t5x import checkpoint_folders, checkpoint_writer, checkpoints
from clipa_t5x.errors import UserError
from clipa_t5x.weights import array_sources, parameter_files, t5x_orbax


class Loaded(NamedTuple):
    """Parameters, and where they come from.

    Attributes:
      params: laid out as was asked for.
      notes: one line for each that was resized.
      model_dir: that holds the checkpoint; None where they come from a file, or of T5X.
      step: of the checkpoint, T5X's included; 0 of a file.
      file: what they were read from, closed; None for a checkpoint of this package.
    """

    params: Any
    notes: list[str]
    model_dir: str | None
    step: int
    file: parameter_files.ParameterFile | None = None


class Source(Protocol):
    """What parameters are read from."""

    @property
    def path(self) -> str:
        """Where it is, for people."""
        ...

    @property
    def saved(self) -> Mapping[str, Any]:
        """By parameter name, what has its shape; no array is read."""
        ...

    def restore(self, request: Any) -> Any:
        """Reads a tree of `jax.ShapeDtypeStruct` with shardings, of `saved`'s names and shapes."""
        ...


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A `Source`: the parameters of a checkpoint's folder."""

    path: str
    saved: Mapping[str, jax.ShapeDtypeStruct]

    def restore(self, request: Any) -> Any:
        """See `Source`."""
        return self._restore(request, ocp.checkpoint_utils.construct_restore_args)

    def read(self, name: str) -> np.ndarray:
        """One parameter, whole, in this process's memory."""
        request = traverse_util.unflatten_dict({name: self.saved[name]}, sep="/")
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        restored = self._restore(request, lambda tree: jax.tree.map(lambda _: as_numpy, tree))
        (array,) = jax.tree.leaves(restored)
        return array

    def _restore(self, request: Any, restore_args: Callable[[Any], Any]) -> Any:
        request = {"params": request}
        return checkpoint_writer.state_handler().restore(
            epath.Path(self.path) / "state",
            args=ocp.args.PyTreeRestore(
                item=request,  # pyright: ignore[reportCallIssue]
                restore_args=restore_args(request),  # pyright: ignore[reportCallIssue]
                partial_restore=True,  # pyright: ignore[reportCallIssue]
            ),
        )["params"]


def open_checkpoint(model_dir: str, step: int) -> Checkpoint:
    """The parameters of a checkpoint that is known to be there; reads no array."""
    folder = os.fspath(checkpoint_folders.folder_of(model_dir, step))
    return Checkpoint(folder, checkpoints.saved_params(model_dir, step))


def load_params(
    path: str, abstract_params: Any, resized: Sequence[str] = (), model: Any = None
) -> Loaded:
    """Parameters by name, laid out as `abstract_params`.

    Args:
      path: a checkpoint, see `checkpoints.locate`, or weights in this package's, CLIPA's or
        OpenCLIP's layout, see `weights.parameter_files`.
      abstract_params: tree of `jax.ShapeDtypeStruct` with shardings.
      resized: names whose first dimension is interpolated where it differs.
      model: a `models.ClipModel`, to compare with an `open_clip_config.json` beside weights; None
        compares nothing.

    Raises:
      UserError: there is no checkpoint, it is damaged, or names or shapes differ beyond `resized`.
    """
    if array_sources.is_source(path):
        wanted = checkpoints.flatten(abstract_params)
        with parameter_files.open_parameters(path, wanted, model) as file:
            params, notes = _load(file, abstract_params, resized)
        for warning in file.warnings:
            logging.warning("%s", warning)
        return Loaded(params, notes, None, t5x_orbax.step(path), file)
    return load_checkpoint(*checkpoints.locate(path), abstract_params, resized)


def load_checkpoint(
    model_dir: str, step: int, abstract_params: Any, resized: Sequence[str] = ()
) -> Loaded:
    """Parameters of a checkpoint that is known to be whole; else as `load_params`.

    Raises:
      UserError: names or shapes differ beyond `resized`.
    """
    source = open_checkpoint(model_dir, step)
    return Loaded(*_load(source, abstract_params, resized), model_dir, step)


def _load(source: Source, abstract_params: Any, resized: Sequence[str]) -> tuple[Any, list[str]]:
    """(parameters, notes) of `Loaded`."""
    saved, wanted = source.saved, checkpoints.flatten(abstract_params)
    changed = {
        name
        for name in resized
        if name in saved and name in wanted
        and saved[name].shape[1:] == wanted[name].shape[1:]
        and saved[name].shape != wanted[name].shape
    }  # fmt: skip
    checkpoints.check_same_parameters(
        {k: v for k, v in saved.items() if k not in changed},
        {k: v for k, v in wanted.items() if k not in changed},
        source.path,
        "Give a checkpoint of this model (INITIAL_CHECKPOINT_PATH, --checkpoint).",
    )

    def as_saved(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape, sharding = leaf.shape, leaf.sharding
        if name in changed:  # small; its dimensions need not divide by the mesh
            shape = saved[name].shape
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    restored = source.restore(jax.tree_util.tree_map_with_path(as_saved, abstract_params))
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
