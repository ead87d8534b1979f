"""Writes `.npz` and `.safetensors` files array by array, in any order, holding one at a time."""

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath
from numpy.lib import format as npy_format

from clipa_t5x.weights.npz_files import SUFFIX
from clipa_t5x.weights.stored_arrays import BFLOAT16

_SAFETENSORS_DTYPES = {
    BFLOAT16: "BF16",
    **{np.dtype(f"f{n}"): f"F{8 * n}" for n in (2, 4, 8)},
    **{np.dtype(f"i{n}"): f"I{8 * n}" for n in (1, 2, 4, 8)},
}
_LENGTH_BYTES = _ALIGNMENT = 8
_CHUNK_BYTES = 2**24


class ArrayWriter(Protocol):
    """An open file of arrays."""

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one of the arrays that were stated, of the shape and dtype that were."""
        ...


@contextlib.contextmanager
def open_writer(path: str, arrays: Mapping[str, Any]) -> Iterator[ArrayWriter]:
    """Opens a file for writing; it is there under its name when every array has been written.

    A remote file is written on this machine first, since formats go back and forth in their files.

    Args:
      path: ends with '.npz' or '.safetensors'; local, or a URL that `etils.epath` writes.
      arrays: what has a shape and a dtype, by name, such as `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: an array is not as stated, or was not written.
    """
    kind = _Npz if path.endswith(".npz") else _Safetensors
    with contextlib.ExitStack() as stack:
        temporary = f"{path}.incomplete"
        if "://" in path:
            temporary = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "arrays")
        stated = {name: (tuple(a.shape), np.dtype(a.dtype)) for name, a in arrays.items()}
        try:
            with open(temporary, "wb") as file:
                with contextlib.closing(kind(file, stated)) as writer:
                    checked = _Checked(stated, writer)
                    yield checked
                    checked.refuse_missing()
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            os.remove(temporary)
            raise
        if "://" in path:
            with open(temporary, "rb") as source, epath.Path(path).open("wb") as target:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
        else:
            os.replace(temporary, path)


class _Checked:
    """Holds what is written to what was stated."""

    def __init__(self, stated: Mapping[str, tuple], writer: Any):
        self._left, self._writer = dict(stated), writer

    def write(self, name: str, array: np.ndarray) -> None:
        stated = self._left.pop(name)
        if (array.shape, array.dtype) != stated:
            raise ValueError(f"{name} is {array.shape} {array.dtype}, and was stated as {stated}")
        self._writer.write(name, array)

    def refuse_missing(self) -> None:
        if self._left:
            raise ValueError(f"not written: {', '.join(list(self._left)[:8])}")


class _Safetensors:
    def __init__(self, file: Any, stated: Mapping[str, tuple]):
        entries: dict[str, Any] = {}
        end = 0
        for name, (shape, dtype) in stated.items():
            begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            entries[name] = {
                "dtype": _SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [begin, end],
            }  # fmt: skip
        # PyTorch's loaders ask whose arrays these are.
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        file.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
        start = file.tell()
        file.truncate(start + end)
        self._file = file
        self._starts = {name: start + entry["data_offsets"][0] for name, entry in entries.items()}

    def write(self, name: str, array: np.ndarray) -> None:
        self._file.seek(self._starts[name])
        _write_bytes(self._file, array)

    def close(self) -> None:
        pass


class _Npz:
    def __init__(self, file: Any, stated: Mapping[str, tuple]):
        del stated
        self._archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)

    def write(self, name: str, array: np.ndarray) -> None:
        # NumPy has no bfloat16 and writes two bytes without a meaning, as does CLIPA.
        plain = array.view("V2") if array.dtype == BFLOAT16 else array
        with self._archive.open(zipfile.ZipInfo(name + SUFFIX), "w", force_zip64=True) as member:
            header = npy_format.header_data_from_array_1_0(np.empty((), plain.dtype))
            npy_format.write_array_header_1_0(member, {**header, "shape": array.shape})
            _write_bytes(member, array)

    def close(self) -> None:
        self._archive.close()


def _write_bytes(file: Any, array: np.ndarray) -> None:
    """In C's order, without a second copy of it all."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _CHUNK_BYTES):
        file.write(flat[start : start + _CHUNK_BYTES].data)
