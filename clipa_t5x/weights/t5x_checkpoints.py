"""The parameters of a T5X checkpoint, as CLIPA's partitioned trainer writes: a folder, read only.

Its file `checkpoint`, msgpack, says which arrays there are; those that are partitioned lie beside
it as zarr arrays. What that file says of places is not followed: an array is looked for in the
folder itself, under its name with dots.
"""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore
from etils import epath
from flax import serialization

from clipa_t5x.errors import UserError, storage_errors
from clipa_t5x.weights.stored_arrays import BFLOAT16, DTYPES, StoredArray, StoredArrays, refusal

INDEX = "checkpoint"
# Of the index: everything that is partitioned lies elsewhere.
_MAX_INDEX_BYTES = 2**28
# Of a piece of an array, unpacked. T5X's are of 64 MiB.
_MAX_CHUNK_BYTES = 2**30
_TARGET = "target"
# What is in an array's place in the index.
_SPEC = {"driver", "kvstore"}
_PLACEHOLDER = "PLACEHOLDER"


def is_checkpoint(path: str) -> bool:
    """Whether a folder, local or remote, is a T5X checkpoint; a half-written one counts."""
    folder = epath.Path(path)
    if not folder.is_dir():
        return False
    if (folder / INDEX).is_file():
        return True
    return any(each.name.startswith(f"{_TARGET}.") for each in folder.iterdir())


@contextlib.contextmanager
def open_checkpoint(path: str) -> Iterator[StoredArrays]:
    """Opens a checkpoint's folder; of its optimizer nothing is looked at.

    Args:
      path: of the folder, local or a URL that TensorStore reads.

    Yields:
      Arrays by name, such as 'img/head/kernel'.

    Raises:
      UserError: there is no index, as where writing was cut off, it is damaged, or an array is
        missing, incomplete or of a dtype that weights do not have.
    """
    leaves = dict(_leaves(_read_index(path)))
    if not leaves:
        raise refusal(path, f"its index {INDEX!r} names no parameters (optimizer/target)")
    yield {name: _array(path, name, leaf) for name, leaf in leaves.items()}


def _read_index(path: str) -> Mapping[str, Any]:
    """The tree of parameters in the index."""
    file = epath.Path(path) / INDEX
    if not file.is_file():
        raise UserError(
            f"{path} has no index {INDEX!r}, which T5X writes last: the checkpoint is incomplete. "
            "Give an older one."
        )
    if file.stat().length > _MAX_INDEX_BYTES:
        raise refusal(path, f"its index has more than {_MAX_INDEX_BYTES} bytes")
    try:
        # Knows numbers, text and arrays of numbers; nothing in it can be run.
        tree = serialization.msgpack_restore(file.read_bytes())
        target = tree["optimizer"][_TARGET]
    except Exception as error:  # msgpack's, NumPy's and lookups': of bytes that anybody wrote.
        raise refusal(
            path, f"its index is no T5X checkpoint's ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(target, Mapping):
        raise refusal(path, "its index holds no tree of parameters")
    return target


def _leaves(tree: Mapping[Any, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(name, array or what stands for one)."""
    for key, value in tree.items():
        names = (*above, str(key))
        if isinstance(value, Mapping) and not value.keys() >= _SPEC:
            yield from _leaves(value, names)
        else:
            yield "/".join(names), value


def _array(path: str, name: str, leaf: Any) -> StoredArray:
    if isinstance(leaf, np.ndarray | np.generic):
        array = np.asarray(leaf)
        if array.dtype not in DTYPES:
            raise refusal(path, f"{name} is of dtype {array.dtype}, which weights do not have")
        return StoredArray(array.shape, array.dtype, lambda: array)
    if isinstance(leaf, Mapping) or (isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER)):
        return _zarr_array(path, name)
    raise refusal(path, f"its index has {type(leaf).__name__} in the place of the array {name}")


def _zarr_array(path: str, name: str) -> StoredArray:
    # The index may name anything; this folder's own arrays are all that is read.
    folder = epath.Path(path) / f"{_TARGET}.{name.replace('/', '.')}"
    if os.sep in name.replace("/", ".") or not (folder / ".zarray").is_file():
        raise refusal(path, f"its index names {name}, and there is no array {folder.name}")
    shape, chunks, dtype = _header(folder)
    kvstore: Any = {"driver": "file", "path": os.path.abspath(folder)}
    if "://" in path:
        kvstore = f"{os.fspath(folder)}/"

    def read() -> np.ndarray:
        try:
            # A piece that is missing would be zeros.
            spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
            opened = tensorstore.open(spec, open=True, read=True).result()
            if tuple(opened.shape) != shape:
                raise ValueError(f"shape {opened.shape}")
            array = np.asarray(opened.read().result())
        except (ValueError, *storage_errors()) as error:
            raise refusal(os.fspath(folder), f"it is damaged or incomplete: {error}") from error
        return array.astype(dtype, copy=False)

    _check_chunks(folder, shape, chunks, dtype)
    return StoredArray(shape, dtype, read)


def _header(folder: epath.Path) -> tuple[tuple[int, ...], tuple[int, ...], np.dtype]:
    """(shape, shape of a piece, dtype), as the array's own file says."""
    try:
        header = json.loads((folder / ".zarray").read_bytes())
        shape, chunks = tuple(header["shape"]), tuple(header["chunks"])
        if not all(type(n) is int and n >= 0 for n in (*shape, *chunks)) or 0 in chunks:
            raise ValueError(f"shape {shape} in pieces of {chunks}")
        stated = str(header["dtype"])
        dtype = BFLOAT16 if stated == "bfloat16" else np.dtype(stated).newbyteorder("=")
    except (ValueError, KeyError, TypeError, RecursionError, *storage_errors()) as error:
        raise refusal(os.fspath(folder), f"its header is damaged ({error})") from error
    if dtype not in DTYPES:
        raise refusal(os.fspath(folder), f"it is of dtype {stated!r}, which weights do not have")
    return shape, chunks, dtype


def _check_chunks(
    folder: epath.Path, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype
) -> None:
    """Refuses an array whose pieces are not all there, or larger than memory is given for."""
    if len(chunks) != len(shape) or math.prod(chunks) * dtype.itemsize > _MAX_CHUNK_BYTES:
        raise refusal(os.fspath(folder), f"its pieces are of shape {chunks}")
    there = {each.name for each in folder.iterdir()}
    counts = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
    if math.prod(counts) > len(there):
        raise refusal(
            os.fspath(folder), f"{math.prod(counts)} pieces are stated, {len(there)} files there"
        )
    for index in itertools.product(*map(range, counts)):
        if ".".join(map(str, index or (0,))) not in there:
            raise refusal(os.fspath(folder), f"its piece {index} is missing")
