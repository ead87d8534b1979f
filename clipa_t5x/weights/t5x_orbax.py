"""The parameters of a checkpoint that T5X writes today, by orbax: a folder, read only.

`checkpoint_<step>/state` is a tree of arrays, of which 'target' are the parameters. Those of
`gin/t5x` have this package's names.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from clipa_t5x.errors import UserError, storage_errors
from clipa_t5x.weights.stored_arrays import DTYPES, StoredArray, StoredArrays, refusal

_STATE, _TARGET = "state", "target"
_TREE = "_METADATA"
_MAX_TREE_BYTES = 2**28


def find(path: str) -> str | None:
    """The folder of a T5X checkpoint: `path` itself, or the newest one in it; None of another.

    One of this package's own is none.
    """
    folder = epath.Path(path)
    if not folder.is_dir():
        return None
    if _is_checkpoint(folder):
        return os.fspath(folder)
    names = (re.fullmatch(r"checkpoint_(\d+)", child.name) for child in folder.iterdir())
    steps = sorted((int(name[1]), name[0]) for name in names if name)
    newest = folder / steps[-1][1] if steps else None
    return os.fspath(newest) if newest is not None and _is_checkpoint(newest) else None


def step(path: str) -> int:
    """Of the checkpoint that `find` finds, as its folder's name says; 0 where it does not."""
    name = re.search(r"checkpoint_(\d+)/*$", find(path) or "")
    return int(name[1]) if name else 0


def _is_checkpoint(folder: epath.Path) -> bool:
    with contextlib.suppress(UserError):
        return any(names[:1] == (_TARGET,) for names in _names(folder))
    return False


def _names(folder: epath.Path) -> list[tuple[str, ...]]:
    """Of all arrays of the tree, as its file says.

    Raises:
      UserError: there is none, or it is damaged.
    """
    file = folder / _STATE / _TREE
    try:
        if file.stat().length > _MAX_TREE_BYTES:
            raise ValueError(f"more than {_MAX_TREE_BYTES} bytes")
        entries = json.loads(file.read_bytes())["tree_metadata"].values()
        return [tuple(str(key["key"]) for key in entry["key_metadata"]) for entry in entries]
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        *storage_errors(),
    ) as e:
        raise refusal(os.fspath(file), f"it is no tree of arrays ({type(e).__name__}: {e})") from e


@contextlib.contextmanager
def open_checkpoint(path: str) -> Iterator[StoredArrays]:
    """Opens what `find` found; of its optimizer nothing is looked at.

    Args:
      path: of the folder, or of one that holds it.

    Yields:
      Arrays by name, such as 'image_tower/head/kernel'.

    Raises:
      UserError: it is damaged, or an array is of a dtype that weights do not have.
    """
    folder = find(path)
    if folder is None:
        raise UserError(f"there is no T5X checkpoint at {path}: give a checkpoint_<step> folder.")
    state = epath.Path(folder).absolute() / _STATE
    try:
        tree = ocp.PyTreeCheckpointHandler(use_ocdbt=True).metadata(state).tree[_TARGET]
    except Exception as error:  # Orbax's and TensorStore's own, of bytes that anybody wrote.
        raise refusal(folder, f"its tree of arrays is damaged ({error})") from error
    flat = traverse_util.flatten_dict(tree, sep="/")
    yield {name: _array(state, name, entry) for name, entry in flat.items()}


def _array(state: epath.Path, name: str, entry: Any) -> StoredArray:
    shape, dtype = getattr(entry, "shape", None), getattr(entry, "dtype", None)
    if shape is None or dtype is None or np.dtype(dtype) not in DTYPES:
        raise refusal(os.fspath(state), f"{name} is of dtype {dtype}, which weights do not have")
    return StoredArray(tuple(shape), np.dtype(dtype), lambda: _read(state, name, entry))


def _read(state: epath.Path, name: str, entry: Any) -> np.ndarray:
    request: Mapping[str, Any] = {
        _TARGET: traverse_util.unflatten_dict({name: entry}, sep="/")
    }  # fmt: skip
    arguments = traverse_util.unflatten_dict(
        {f"{_TARGET}/{name}": ocp.RestoreArgs(restore_type=np.ndarray)}, sep="/"
    )
    try:
        restored = ocp.PyTreeCheckpointHandler(use_ocdbt=True).restore(
            state,
            args=ocp.args.PyTreeRestore(
                item=request,  # pyright: ignore[reportCallIssue]
                restore_args=arguments,  # pyright: ignore[reportCallIssue]
                partial_restore=True,  # pyright: ignore[reportCallIssue]
            ),
        )
    except Exception as error:  # As above.
        raise refusal(os.fspath(state), f"{name} is damaged ({error})") from error
    array: Any = next(iter(traverse_util.flatten_dict(restored).values()))
    if (array.shape, array.dtype) != (tuple(entry.shape), np.dtype(entry.dtype)):
        raise refusal(os.fspath(state), f"{name} is {array.dtype} {array.shape}, not as stated")
    return np.asarray(array)
