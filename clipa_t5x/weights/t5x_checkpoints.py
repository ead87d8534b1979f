"""The parameters of a T5X checkpoint, as CLIPA's partitioned trainer writes: a folder, read only.

Its file `checkpoint`, msgpack, says which arrays there are; those that are partitioned lie beside
it as zarr arrays. What that file says of places is not followed: an array is looked for in the
folder itself, under its name with dots. Pieces are unpacked here rather than by TensorStore, which
bounds neither what a header states nor what a compressed piece grows to.
"""

import contextlib
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
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
_HEADER, _MAX_HEADER_BYTES = ".zarray", 2**20
# How pieces may be compressed, and the zlib library's number for it. T5X writes gzip.
_COMPRESSORS = {None: None, "gzip": 31, "zlib": 15}
# Deflate's code for the longest repetition, 258 bytes, takes two bits.
_MOST_INFLATION = 1032
# What the libraries raise of damaged files.
_DAMAGES = (ValueError, KeyError, TypeError, RecursionError, SyntaxError, MemoryError, zlib.error)
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
      path: of the folder, local or a URL that `etils.epath` reads.

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
    if not (folder / _HEADER).is_file():
        raise refusal(path, f"its index names {name}, and there is no array {folder.name}")
    with _refused(folder, "its header is damaged"):
        header = _read_header(folder)
    dtype = header.stored.newbyteorder("=")
    if dtype not in DTYPES:
        raise refusal(
            os.fspath(folder), f"it is of dtype {header.stored.str!r}, which weights do not have"
        )
    _check_pieces(folder, header)
    return StoredArray(header.shape, dtype, lambda: _read(folder, header).astype(dtype, copy=False))


class _Header(NamedTuple):
    """What an array's own file says.

    Attributes:
      shape: of the array.
      chunks: of a piece; those at the edges are as large, and hold more than is there.
      stored: dtype, in the order of bytes of the file.
      order: of a piece's numbers, 'C' or 'F'.
      wbits: of the zlib library, how pieces are compressed; None where they are not.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    stored: np.dtype
    order: Literal["C", "F"]
    wbits: int | None

    @property
    def piece_bytes(self) -> int:
        """Of a piece, unpacked."""
        return math.prod(self.chunks) * self.stored.itemsize

    def pieces(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name of the file, place among the pieces) of each."""
        counts = [-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True)]
        for place in itertools.product(*map(range, counts)):
            yield ".".join(map(str, place or (0,))), place


@contextlib.contextmanager
def _refused(folder: epath.Path, what: str) -> Iterator[None]:
    """Tells of damage in one line."""
    try:
        yield
    except UserError:
        raise
    except (*_DAMAGES, *storage_errors()) as error:
        raise refusal(os.fspath(folder), f"{what} ({type(error).__name__}: {error})") from error


def _read_header(folder: epath.Path) -> _Header:
    file = folder / _HEADER
    if file.stat().length > _MAX_HEADER_BYTES:
        raise ValueError(f"it has more than {_MAX_HEADER_BYTES} bytes")
    header = json.loads(file.read_bytes())
    shape, chunks = tuple(header["shape"]), tuple(header["chunks"])
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *chunks)) or 0 in chunks:
        raise ValueError(f"shape {shape} in pieces of {chunks}")
    stated, packer = header["dtype"], header.get("compressor")
    if not isinstance(stated, str):
        raise ValueError(f"dtype {stated!r}")
    compressor = packer["id"] if packer else None
    order, separator = header.get("order", "C"), header.get("dimension_separator", ".")
    for what, value, values in (
        ("compressor", compressor, _COMPRESSORS), ("order", order, ("C", "F")),
        ("dimension_separator", separator, (".",)), ("filters", header.get("filters"), (None, [])),
    ):  # fmt: skip
        if value not in values:
            raise ValueError(f"{what} is {value!r}, which T5X does not write")
    dtype = BFLOAT16 if stated == "bfloat16" else np.dtype(stated)
    return _Header(shape, chunks, dtype, order, _COMPRESSORS[compressor])


def _check_pieces(folder: epath.Path, header: _Header) -> None:
    """Refuses an array whose pieces are not all there, or cannot hold what it states."""
    where = os.fspath(folder)
    if len(header.chunks) != len(header.shape) or header.piece_bytes > _MAX_CHUNK_BYTES:
        raise refusal(where, f"its pieces are of shape {header.chunks}")
    there = {each.name for each in folder.iterdir()}
    counts = [-(-size // chunk) for size, chunk in zip(header.shape, header.chunks, strict=True)]
    if math.prod(counts) > len(there):
        raise refusal(where, f"{math.prod(counts)} pieces are stated, {len(there)} files there")
    most = 1 if header.wbits is None else _MOST_INFLATION
    for name, place in header.pieces():
        if name not in there:
            raise refusal(where, f"its piece {place} is missing")
        if (size := (folder / name).stat().length) * most < header.piece_bytes:
            raise refusal(
                where,
                f"its piece {place} should be of {header.piece_bytes} bytes, which cannot come "
                f"from the {size} that are there: it is damaged",
            )


def _read(folder: epath.Path, header: _Header) -> np.ndarray:
    array = np.empty(header.shape, header.stored)
    for name, place in header.pieces():
        with _refused(folder, f"its piece {place} is damaged"):
            content = _unpacked((folder / name).read_bytes(), header)
        piece = content.view(header.stored).reshape(header.chunks, order=header.order)
        start = (
            slice(i * size, (i + 1) * size) for i, size in zip(place, header.chunks, strict=True)
        )
        part = array[(*start, ...)]
        part[...] = piece[tuple(map(slice, part.shape))]
    return array


def _unpacked(data: bytes, header: _Header) -> np.ndarray:
    """The bytes of a piece, uint8 [piece_bytes]; of a bomb no more than these are unpacked.

    Raises:
      ValueError: there are more or fewer.
      zlib.error: they are damaged, by their checksum, too.
    """
    if header.wbits is not None:
        unpacker = zlib.decompressobj(header.wbits)
        data = unpacker.decompress(data, header.piece_bytes + 1)
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError("it ends early, or not where it should")
    if len(data) != header.piece_bytes:
        raise ValueError(f"{len(data)} bytes instead of {header.piece_bytes}")
    return np.frombuffer(data, np.uint8)
