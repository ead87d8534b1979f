"""NumPy's `.npz`, a zip archive of `.npy` files, from strangers.

Nothing is unpickled, nothing is extracted to a path, and what an array states of itself is compared
with the bytes that the archive has for it before memory is asked for.
"""

import contextlib
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np
from numpy.lib import format as npy_format

from clipa_t5x.errors import UserError
from clipa_t5x.weights.stored_arrays import BFLOAT16, DTYPES, StoredArray, StoredArrays, refusal

SUFFIX = ".npy"
# Deflate's code for the longest repetition, 258 bytes, takes two bits.
_MOST_INFLATION = 1032
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 1
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Of weights; what a header of fields' names would need.
_MAX_HEADER_BYTES = 4096
_CHUNK_BYTES = 2**22
# What the two libraries raise of damaged files.
_DAMAGES = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, SyntaxError, TypeError),
    *(tokenize.TokenError, NotImplementedError, RuntimeError, OverflowError, MemoryError, KeyError),
)


@contextlib.contextmanager
def open_npz(path: str) -> Iterator[StoredArrays]:
    """Opens a local archive; arrays can be read until it is closed.

    Args:
      path: a file.

    Yields:
      Arrays by name, the archive's names without '.npy'.

    Raises:
      UserError: the archive or the header of an array is damaged, an array is of objects, which
        would be unpickled, or of another dtype that weights do not have.
    """
    with contextlib.ExitStack() as stack:
        with _refused(path, "the archive"):
            archive = stack.enter_context(zipfile.ZipFile(path))
        _check_layout(path, archive)
        yield {
            member.filename.removesuffix(SUFFIX): _stored_array(path, archive, member)
            for member in archive.infolist()
        }


@contextlib.contextmanager
def _refused(path: str, what: str) -> Iterator[None]:
    """Tells of damage in one line."""
    try:
        yield
    except UserError:
        raise
    except _DAMAGES as error:
        raise refusal(path, f"{what} is damaged ({type(error).__name__}: {error})") from error


def _check_layout(path: str, archive: zipfile.ZipFile) -> None:
    """Refuses members that overlap, as in bombs, or occur twice, or are no plain arrays."""
    seen: set[str] = set()
    end = 0
    for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
        what = f"member {member.filename!r}"
        if not member.filename.endswith(SUFFIX):
            raise refusal(path, f"{what} is no {SUFFIX} file, so the archive is no .npz")
        if member.filename in seen:
            raise refusal(path, f"{what} is there twice")
        if member.compress_type not in _METHODS or member.flag_bits & _ENCRYPTED:
            raise refusal(path, f"{what} is encrypted, or compressed other than by deflate")
        if member.header_offset < end:
            raise refusal(path, f"{what} overlaps with another")
        end = member.header_offset + _LOCAL_HEADER_BYTES + member.compress_size
        most = member.compress_size
        most *= _MOST_INFLATION if member.compress_type == zipfile.ZIP_DEFLATED else 1
        if member.file_size > most:
            raise refusal(
                path,
                f"{what} states {member.file_size} bytes, which cannot come from the "
                f"{member.compress_size} that are there",
            )
        seen.add(member.filename)
    if end > archive.start_dir:
        raise refusal(path, "its members reach into the archive's directory")


def _stored_array(path: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> StoredArray:
    """Reads the header of an array and compares it with the bytes that follow."""
    what = f"array {member.filename.removesuffix(SUFFIX)!r}"
    with _refused(path, what):
        with archive.open(member) as file:
            shape, in_columns, stored = _read_header(file)
            start = file.tell()
        dtype = _native(path, what, stored)
        num_bytes = math.prod(shape) * stored.itemsize
        if start + num_bytes != member.file_size:
            raise refusal(
                path,
                f"{what} is stated as {dtype.name} {shape}, {num_bytes} bytes, and has "
                f"{member.file_size - start}",
            )

    def read() -> np.ndarray:
        with _refused(path, what), archive.open(member) as file:
            file.read(start)
            data = _read_all(file, num_bytes)
        array = data.view(BFLOAT16 if dtype == BFLOAT16 else stored)
        return array.reshape(shape, order="F" if in_columns else "C").astype(dtype, copy=False)

    return StoredArray(shape, dtype, read)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether it is in Fortran's order, dtype) of a .npy file.

    Raises:
      ValueError: it is damaged, or of a version that only fields with names in Unicode need.
    """
    version = npy_format.read_magic(file)
    readers = {
        (1, 0): npy_format.read_array_header_1_0,
        (2, 0): npy_format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format")
    shape, in_columns, dtype = readers[version](file, max_header_size=_MAX_HEADER_BYTES)
    if any(isinstance(size, bool) or size < 0 for size in shape):
        raise ValueError(f"shape {shape}")
    return shape, in_columns, dtype


def _native(path: str, what: str, stored: np.dtype) -> np.dtype:
    """The dtype in this machine's order of bytes; bfloat16 for what NumPy writes in its place."""
    if stored.hasobject:
        raise UserError(
            f"{what} of {path} is of Python objects, that is, a pickle, and reading one would run "
            "whatever code it holds: save plain arrays of numbers instead."
        )
    # NumPy knows no bfloat16, and writes two bytes without a meaning.
    if stored.kind == "V" and stored.names is None and stored.subdtype is None:
        stored = BFLOAT16 if stored.itemsize == BFLOAT16.itemsize else stored
    native = stored.newbyteorder("=")
    if native not in DTYPES:
        raise refusal(path, f"{what} is of dtype {stored.str!r}, which weights do not have")
    return BFLOAT16 if native == BFLOAT16 else native


def _read_all(file: IO[bytes], num_bytes: int) -> np.ndarray:
    """The rest of a member, uint8 [num_bytes]; its checksum is compared at the end of it.

    Raises:
      EOFError: it is shorter.
    """
    data = np.empty(num_bytes, np.uint8)
    at = 0
    while at < num_bytes:
        chunk = file.read(min(_CHUNK_BYTES, num_bytes - at))
        if not chunk:
            raise EOFError(f"{at} bytes of {num_bytes}")
        data[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
        at += len(chunk)
    if file.read(1):
        raise EOFError("there are more bytes than stated")
    return data
