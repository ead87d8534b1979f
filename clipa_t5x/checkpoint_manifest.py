"""The manifest of a checkpoint: its files with sizes and checksums, and where it comes from.

`manifest.json` is written last, when everything that it lists is on the disk: a checkpoint counts
from then on. It says in its own checksum whether it is as it was written.
"""

import concurrent.futures
import datetime
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import google_crc32c
import jax
from etils import epath

from clipa_t5x import errors, version

FILE = "manifest.json"

# Reading and summing releases the interpreter; more threads would take cores from the train step.
_THREADS = 4
_CHUNK_BYTES = 1 << 22

_ATTEMPTS, _PAUSE_SECONDS = 4, 0.5
_T = TypeVar("_T")


class DamageError(Exception):
    """A checkpoint is not as it was written; the message names the file and the check it failed."""


class UnreadableError(Exception):
    """The storage does not give a file, which may be whole: no reason to pass a checkpoint over."""


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in an object store, where a folder cannot be renamed at once."""
    return "://" in os.fspath(path)


def write(
    folder: epath.Path, step: int, metrics: Mapping[str, float], mesh: Mapping[str, int]
) -> None:
    """Makes a checkpoint count: sums its files up and writes its manifest.

    Args:
      folder: of the checkpoint, whole but for the manifest.
      step: updates done.
      metrics: of this step's evaluation by flat name; what is no finite number is left out.
      mesh: axis sizes of the mesh that it was written on.

    Raises:
      OSError: something cannot be read or written.
    """
    names = _names(folder)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(_sum, [folder / name for name in names])
    body = {
        "step": step,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "metrics": {k: float(v) for k, v in metrics.items() if math.isfinite(v)},
        "mesh": dict(mesh),
        "process_count": jax.process_count(),
        "versions": _versions(),
        "files": {n: {"size": s, "crc32c": c} for n, (s, c) in zip(names, sums, strict=True)},
    }
    if not is_remote(folder):
        for path in sorted({folder.parent, *_with_parents(folder, names)}):
            _sync(path)
    # Not a byte of it is there before all are: also where a kill can leave half a file.
    temporary = folder / f"{FILE}.tmp"
    temporary.write_text(_text(body))
    if not is_remote(folder):
        _sync(temporary)
    temporary.replace(folder / FILE)
    if not is_remote(folder):
        _sync(folder)


def read(folder: epath.Path) -> dict[str, Any]:
    """A checkpoint's manifest: 'step', 'created', 'metrics', 'mesh', 'versions', 'files', ...

    Raises:
      DamageError: it is missing, or not as it was written.
      UnreadableError: the storage does not give it.
    """
    path = folder / FILE
    if not path.exists():
        raise DamageError(f"{FILE} is missing")
    data = _persistently(FILE, path.read_bytes)
    try:
        text = data.decode()
        body = json.loads(text)
        del body["crc32c"]
        intact = text == _text(body)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamageError(f"{FILE} is unreadable ({str(error).splitlines()[0]})") from error
    if not intact:
        raise DamageError(f"{FILE} has another checksum than it says")
    if not _is_manifest(body):
        raise DamageError(f"{FILE} does not say what a manifest says")
    return body


def _is_manifest(body: Any) -> bool:
    """Whether what is read is there, and of its kind."""
    files = body.get("files")
    return (
        isinstance(body.get("step"), int)
        and isinstance(body.get("metrics"), dict)
        and isinstance(files, dict)
        and all(
            isinstance(facts, dict)
            and isinstance(facts.get("size"), int)
            and isinstance(facts.get("crc32c"), str)
            for facts in files.values()
        )
    )


def _persistently(name: str, read: Callable[[], _T]) -> _T:
    """Reads, again where the storage has a hiccup.

    Raises:
      UnreadableError: it has more than that.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return read()
        except IsADirectoryError as error:
            raise DamageError(f"{name} is a folder") from error
        except errors.storage_errors() as error:
            if attempt + 1 == _ATTEMPTS:
                reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
                raise UnreadableError(f"{name} cannot be read ({reason})") from error
            time.sleep(_PAUSE_SECONDS * 2**attempt)
    raise AssertionError


def check(folder: epath.Path, step: int, part: int = 0, parts: int = 1) -> None:
    """Reads a part of a checkpoint's files and compares them with its manifest.

    Args:
      folder: of the checkpoint.
      step: that it should be of.
      part: which of `parts` about equal ones to read; each process reads its own.
      parts: how many.

    Raises:
      DamageError: what is wrong with the first file that is not as it was written.
      UnreadableError: the storage does not give a file.
    """
    manifest = read(folder)
    if manifest["step"] != step:
        raise DamageError(f"{FILE} is of step {manifest['step']}, not {step}")
    files = manifest["files"]
    if others := set(files) ^ set(_persistently("the folder", lambda: _names(folder))):
        name = min(others)
        raise DamageError(f"{name} is {'missing' if name in files else f'not in {FILE}'}")
    by_size = sorted(files, key=lambda name: (files[name]["size"], name))
    names = by_size[part::parts]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        damages = pool.map(lambda name: _damage(folder, name, files[name]), names)
    for damage in sorted(filter(None, damages)):
        raise DamageError(damage)


def _damage(folder: epath.Path, name: str, expected: Mapping[str, Any]) -> str | None:
    if not is_remote(folder) and not os.path.isfile(
        folder / name
    ):  # Pipes would be waited for, and devices never end.
        return f"{name} is no plain file"
    size, checksum = _persistently(name, lambda: _sum(folder / name))
    if size != expected["size"]:
        return f"{name} has {size} bytes instead of {expected['size']}"
    if checksum != expected["crc32c"]:
        return f"{name} has crc32c {checksum} instead of {expected['crc32c']}"
    return None


def _sum(path: epath.Path) -> tuple[int, str]:
    """(bytes, crc32c in hexadecimal) of a file."""
    size = checksum = 0
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK_BYTES):
            checksum = google_crc32c.extend(checksum, chunk)
            size += len(chunk)
    return size, f"{checksum:08x}"


def _names(folder: epath.Path) -> list[str]:
    """Files of a checkpoint, relative to it; those at the top are marks, not contents."""
    found, folders = [], [path for path in folder.iterdir() if path.is_dir()]
    while folders:
        for path in folders.pop().iterdir():
            (folders if path.is_dir() else found).append(path)
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _text(body: Mapping[str, Any]) -> str:
    """The manifest's file: `body` and the checksum of `body`."""
    checksum = google_crc32c.value(json.dumps(body, sort_keys=True).encode())
    return json.dumps({**body, "crc32c": f"{checksum:08x}"}, indent=1) + "\n"


def _with_parents(folder: epath.Path, names: Sequence[str]) -> set[epath.Path]:
    paths = [folder / name for name in names]
    return {*paths, folder, *(p for path in paths for p in path.parents if folder in p.parents)}


def _sync(path: epath.Path) -> None:
    """Waits until a file or a folder of this machine would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def _versions() -> dict[str, str | None]:
    return {
        "clipa_t5x": version.__version__,
        "git_commit": _git_commit(),
        "jax": jax.__version__,
        "orbax": importlib.metadata.version("orbax-checkpoint"),
    }


def _git_commit() -> str | None:
    """The checkout that the package runs from; None where it is installed."""
    root = pathlib.Path(version.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
