"""Arrays by name from a file of weights, whoever wrote it: it can be refused, never executed.

What a file is, its first bytes tell, whatever its name.
"""

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Iterator

from etils import epath

from clipa_t5x.errors import UserError, storage_errors
from clipa_t5x.weights import npz_files, safetensors_files
from clipa_t5x.weights.stored_arrays import StoredArrays, refusal

# As many arrays as a model of any size has; a header of each is read when the file is opened.
MAX_ARRAYS = 2**16
_MAX_NAME_LENGTH = 1024
# Names of what `torch.save` and `pickle.dump` write.
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_PICKLE_STARTS = tuple(bytes([0x80, version]) for version in range(2, 6))
# Of a safetensors file: what the library allows.
_LENGTH_BYTES, _MAX_HEADER_BYTES = 8, 10**8
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")
_OPENERS = {"npz": npz_files.open_npz, "safetensors": safetensors_files.open_safetensors}


@contextlib.contextmanager
def open_arrays(path: str) -> Iterator[StoredArrays]:
    """Opens a `.npz` or `.safetensors` file; reads no array yet.

    A remote file is copied to this machine for as long as it is open.

    Args:
      path: local, or a URL that `etils.epath` reads.

    Yields:
      Arrays by name: shapes and dtypes are known, `read()` reads one.

    Raises:
      UserError: there is no such file, it is damaged, or it is a pickle, as `torch.save` writes.
    """
    with _local(path) as local, _OPENERS[_kind(local)](local) as arrays:
        _check_names(local, arrays)
        yield arrays


def is_file(path: str) -> bool:
    """Whether a path, local or remote, is a file rather than a folder, as checkpoints are.

    Raises:
      UserError: it is a URL that nothing here reads.
    """
    try:
        return epath.Path(path).is_file()
    except (KeyError, *storage_errors()) as error:  # The first is what etils has for unknown URLs.
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} is a URL that cannot be read ({reason}): copy the file here and give its path."
        ) from error


@contextlib.contextmanager
def _local(path: str) -> Iterator[str]:
    if not is_file(path):
        raise UserError(f"there is no file {path}: give a .npz or .safetensors file of weights.")
    if "://" not in path:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        copy = os.path.join(folder, os.path.basename(path))
        epath.Path(path).copy(copy)
        try:
            yield copy
        except UserError as error:
            raise UserError(str(error).replace(copy, path)) from error


def _kind(path: str) -> str:
    """'npz' or 'safetensors'.

    Raises:
      UserError: it is neither.
    """
    with open(path, "rb") as file:
        start = file.read(_LENGTH_BYTES + 1)
    # A safetensors file begins with the length of its header, which may look like a pickle's start.
    plausible = int.from_bytes(start[:_LENGTH_BYTES], "little") <= _MAX_HEADER_BYTES
    is_pickle = start.startswith(_PICKLE_STARTS) or path.lower().endswith(_PICKLE_SUFFIXES)
    if start[_LENGTH_BYTES:] == b"{" and (plausible or not is_pickle):
        return "safetensors"
    if start.startswith(_ZIP_STARTS):
        if _holds_pickle(path):
            raise _would_execute(path)
        return "npz"
    if is_pickle:
        raise _would_execute(path)
    raise refusal(path, f"it begins with {start!r}, as neither .npz nor .safetensors files do")


def _holds_pickle(path: str) -> bool:
    """Whether an archive is one of PyTorch's; False where it is none at all."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(_PICKLE_SUFFIXES) for name in archive.namelist())
    except Exception:  # Damage is told of by whoever reads the archive.
        return False


def _would_execute(path: str) -> UserError:
    return UserError(
        f"{path} is a pickle, as torch.save writes, and loading one runs whatever code it holds: "
        "convert it to .safetensors where it comes from, or on a machine that you can spare."
    )


def _check_names(path: str, arrays: StoredArrays) -> None:
    if len(arrays) > MAX_ARRAYS:
        raise refusal(path, f"it states {len(arrays)} arrays, more than {MAX_ARRAYS}")
    for name in arrays:
        parts = name.split("/")
        if not name.isprintable() or len(name) > _MAX_NAME_LENGTH or {"", ".."} & set(parts):
            raise refusal(path, f"{name[:80]!r} is no name of an array")
