"""The checkpoint folders of a MODEL_DIR: which there are, which are whole, which go.

`checkpoint_<step>` is written in place. It counts when its manifest is there, the last file to be
written and the first to be removed; until then a mark says that nobody misses it. This needs no
renaming, so that it holds in object stores as on disks.
"""

import errno
import json
import re
import time
from collections.abc import Mapping, Sequence

import jax
from absl import logging
from etils import epath

from clipa_t5x import agreement, checkpoint_manifest
from clipa_t5x.errors import UserError, storage_errors

PREFIX = "checkpoint"
ITEMS = ("state", "data", "config")

_UNFINISHED = "UNFINISHED"
_UNREADABLE = "unreadable: "  # How a process's word on a checkpoint begins that it cannot judge.
_ORBAX_COMMIT = "_CHECKPOINT_METADATA"  # What versions without manifests wrote last.


def folder_of(model_dir: str, step: int) -> epath.Path:
    """Where the checkpoint of a step is, or would be; absolute, as TensorStore wants it."""
    return epath.Path(model_dir).absolute() / f"{PREFIX}_{step}"


def steps_there(model_dir: str) -> list[int]:
    """Steps of all checkpoints in a MODEL_DIR, whole or not, ascending; leftovers are none."""
    root = epath.Path(model_dir)
    if not root.is_dir():
        return []
    matches = [
        (re.fullmatch(rf"{PREFIX}_(0|[1-9]\d*)", path.name), path) for path in root.iterdir()
    ]
    return sorted(
        int(match.group(1))
        for match, path in matches
        if match and path.is_dir() and not _is_leftover(path)
    )


def complete_steps(model_dir: str) -> list[int]:
    """Steps of the complete checkpoints in a MODEL_DIR, ascending; reads none of their files."""
    return [s for s in steps_there(model_dir) if is_complete(folder_of(model_dir, s))]


def is_complete(folder: epath.Path) -> bool:
    """Whether a checkpoint's last file is there; reads none of the others."""
    return (folder / checkpoint_manifest.FILE).exists() or is_unverifiable(folder)


def is_unverifiable(folder: epath.Path) -> bool:
    """Whether it is a checkpoint that a version without manifests wrote, and committed."""
    commit = folder / _ORBAX_COMMIT
    if (folder / checkpoint_manifest.FILE).exists() or (folder / _UNFINISHED).exists():
        return False
    if not commit.exists() or not all((folder / item).is_dir() for item in ITEMS):
        return False
    try:
        return json.loads(commit.read_text())["commit_timestamp_nsecs"] is not None
    except (ValueError, KeyError, TypeError):
        return False


def begin(folder: epath.Path) -> None:
    """Makes an empty folder for a checkpoint that does not count yet.

    Raises:
      OSError: it cannot be made, or is a checkpoint that counts.
    """
    if is_complete(folder):
        raise FileExistsError(errno.EEXIST, "there is a checkpoint already", str(folder))
    if folder.is_dir():
        remove(folder)
    folder.mkdir(parents=True)
    (folder / _UNFINISHED).touch()
    for item in ITEMS:
        (folder / item).mkdir()


def finish(folder: epath.Path) -> None:
    """Takes the mark off a checkpoint that has its manifest."""
    (folder / _UNFINISHED).unlink(missing_ok=True)


def remove(folder: epath.Path) -> None:
    """Removes a checkpoint; from the first moment on it counts no more.

    Raises:
      OSError: something of it cannot be removed.
    """
    empty(folder)
    folder.rmtree()


def empty(folder: epath.Path) -> None:
    """As `remove`, but leaves the marked folder, for what may still be written into it."""
    (folder / _UNFINISHED).touch()
    (folder / checkpoint_manifest.FILE).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if path.is_dir():
            path.rmtree()
        elif path.name != _UNFINISHED:
            path.unlink()


def clear_leftovers(model_dir: str) -> None:
    """Removes what killed saves and killed removals left; for process 0.

    What cannot be removed does not count, and is told of in the log.
    """
    root = epath.Path(model_dir)
    for path in list(root.iterdir()) if root.is_dir() else []:
        match = re.fullmatch(rf"{PREFIX}_\d+(\.orbax-checkpoint-tmp.*)?", path.name)
        if match and path.is_dir() and (match.group(1) or _is_leftover(path)):
            logging.warning("Removing %s, which was left half-written.", path)
            try:
                path.rmtree() if match.group(1) else remove(path)
            except storage_errors() as error:
                logging.error("%s cannot be removed: %s", path, error)


def _is_leftover(folder: epath.Path) -> bool:
    if (folder / checkpoint_manifest.FILE).exists():
        return False
    return (folder / _UNFINISHED).exists() or not any(folder.iterdir())


def set_aside(folder: epath.Path) -> str:
    """Makes a damaged checkpoint count no more, without losing it if possible; for process 0.

    Returns:
      What became of it, as part of a sentence.
    """
    if checkpoint_manifest.is_remote(folder):  # Renaming would copy all of it.
        (folder / _UNFINISHED).touch()
        (folder / checkpoint_manifest.FILE).unlink(missing_ok=True)
        return "it will be removed"
    aside = folder.with_name(f"{folder.name}.damaged-{time.time_ns()}")
    folder.rename(aside)
    return f"it is now {aside.name}"


def newest_whole(model_dir: str, steps: Sequence[int]) -> tuple[int | None, Mapping[int, str]]:
    """The newest of some checkpoints that is as it was written, on every process the same.

    Every file of it is read, each process reading its part. What a version without manifests wrote
    cannot be verified and is taken as it is, with a warning.

    Args:
      model_dir: that holds them.
      steps: of the checkpoints, the same on every process.

    Returns:
      (its step or None, what is wrong with each newer one by step: the file and the check).

    Raises:
      UserError: the storage does not give one's files, which may be whole.
    """
    damages: dict[int, str] = {}
    for step in sorted(steps, reverse=True):
        damage = agreement.agree(
            "checkpoint_verified", _damage(model_dir, step), agreement.first_word
        )
        if not damage:
            return step, damages
        if damage.startswith(_UNREADABLE):
            raise UserError(
                f"{folder_of(model_dir, step)}: {damage.removeprefix(_UNREADABLE)}. Mend the "
                "storage and start again, or remove that folder to go back to the one before."
            )
        damages[step] = damage
    return None, damages


def _damage(model_dir: str, step: int) -> str:
    folder = folder_of(model_dir, step)
    if is_unverifiable(folder):
        logging.warning("%s has no manifest: its files cannot be verified.", folder)
        return ""
    try:
        checkpoint_manifest.check(folder, step, jax.process_index(), jax.process_count())
    except checkpoint_manifest.DamageError as error:
        return str(error)
    except checkpoint_manifest.UnreadableError as error:
        return f"{_UNREADABLE}{error}"
    return ""
