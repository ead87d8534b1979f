"""What is kept of a conversion that is under way, and how it ends in the manifest.

    <output_dir>/.convert-<split>/arguments.json    other ones are refused
    <output_dir>/.convert-<split>/input.*           where each record of the input is
    <output_dir>/.convert-<split>/<number>.json     facts of a finished shard

A shard gets its name when it is complete, then its entry here: a process that is killed between the
two writes it once more. Nothing of it is left when the manifest has the split.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from clipa_t5x.data import manifests
from clipa_t5x.errors import UserError

# Raised whenever the same arguments give other bytes than before.
CONVERSION_VERSION = 1
NAME = "converted"
_OUTPUT = re.compile(r"\d{5,}\.(array_record|tfrecord)(\.tmp-\d+)?")


class SplitFolder:
    """Where a split goes: its folder, the journal, the manifest.

    Attributes:
      split: its name.
      output_dir: of the data set.
      folder: of the split's shards.
      journal: folder of what is kept until the split is complete.
    """

    def __init__(self, output_dir: str, split: str):
        if "://" in output_dir:
            raise UserError(
                f"--output_dir={output_dir} is not a local directory: convert into one, then copy "
                "the result where it is to go"
            )
        if not re.fullmatch(r"[\w-]+", split):
            raise UserError(f"--split={split!r} names a folder: give letters, digits, - and _ only")
        self.split = split
        self.output_dir = pathlib.Path(output_dir)
        self.folder = self.output_dir / split
        self.journal = self.output_dir / f".convert-{split}"

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Keeps other processes off; turns what the disk refuses into a message."""
        try:
            self.journal.mkdir(parents=True, exist_ok=True)
            with _locked(self.journal, wait=False) as free:
                if not free:
                    raise UserError(
                        f"split {self.split!r} of --output_dir={self.output_dir} is being written "
                        "by another process: wait for it, or stop it first"
                    )
                try:
                    yield
                finally:
                    self._tidy()
        except OSError as error:
            raise UserError(
                f"{error.filename or self.output_dir}: {error.strerror or error}. Check that "
                f"--output_dir={self.output_dir} can be written to and has room, and that --source "
                "can be read; finished shards are kept."
            ) from error

    def _tidy(self) -> None:
        """Leaves nothing behind where nothing was finished, as after a mistake."""
        if self.journal.exists() and self._begun() is None:
            shutil.rmtree(self.journal)
        for folder in (self.folder, self.output_dir):
            with contextlib.suppress(OSError):  # It holds something.
                folder.rmdir()

    def prepare(self, arguments: Mapping[str, Any], overwrite: bool) -> bool:
        """Makes ready for writing; returns whether the split is there already.

        Raises:
          UserError: something else is there.
        """
        manifest = manifests.read(self.output_dir) or {"name": NAME, "splits": {}}
        if manifest["name"] != NAME:
            raise UserError(
                f"--output_dir={self.output_dir} holds the data set {manifest['name']!r}: choose "
                "another directory"
            )
        for stale in self.folder.glob("*.tmp-*"):
            if _OUTPUT.fullmatch(stale.name):
                stale.unlink()
        facts, begun = manifest["splits"].get(self.split), self._begun()
        before = facts["arguments"] if facts else begun
        if before is None and self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder} holds files that this command has not written: choose another "
                "--output_dir or --split, or remove them"
            )
        same = before == arguments and not (overwrite and facts and self._lost(facts))
        if before is not None and overwrite and not same:
            self._clear(manifest)
        elif before is not None and not same:
            raise UserError(
                f"{self.folder} was {'converted' if facts else 'begun'} with other arguments "
                f"({manifests.difference(before, arguments)}): give the same, choose another "
                "--output_dir, or pass --overwrite to begin anew"
            )
        elif facts is not None and (lost := self._lost(facts)):
            raise UserError(
                f"shard {lost} is missing or has another size than {manifests.FILE} says: pass "
                "--overwrite to convert the split again"
            )
        elif facts is not None:
            shutil.rmtree(self.journal)
            return True
        self.folder.mkdir(exist_ok=True)
        manifests.write_json(str(self.journal / "arguments.json"), arguments)
        return False

    def _begun(self) -> dict[str, Any] | None:
        """Arguments of a conversion that has finished a shard; None where none has."""
        if not any(self.folder.glob("*")) and not any(self.journal.glob("[0-9]*.json")):
            return None
        try:
            return json.loads((self.journal / "arguments.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def _lost(self, facts: Mapping[str, Any]) -> str:
        """The first shard that is not as the manifest says; '' where all are."""
        for shard in facts["shards"]:
            path = self.folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                return str(path)
        return ""

    def _clear(self, manifest: dict[str, Any]) -> None:
        """Removes what this command wrote of the split, its entry in the manifest first."""
        if manifest["splits"].pop(self.split, None):
            with _locked(self.output_dir):
                manifests.write(self.output_dir, manifest)
        for path in self.journal.glob("*.json"):
            path.unlink()
        for path in self.folder.glob("*"):
            if _OUTPUT.fullmatch(path.name):
                path.unlink()

    def done(self, task: int) -> dict[str, Any] | None:
        """What the journal says of a finished shard; None where it has yet to be written."""
        try:
            facts = json.loads((self.journal / f"{task}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        path = self.folder / (facts["file"] or "")
        there = facts["file"] is None or (path.is_file() and path.stat().st_size == facts["bytes"])
        return facts if there else None

    def keep(self, task: int, facts: Mapping[str, Any]) -> None:
        """Has the journal vouch for a shard that has its name."""
        manifests.write_json(str(self.journal / f"{task}.json"), facts)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Enters the split in the manifest and drops the journal."""
        with _locked(self.output_dir):
            # Read once more: another process may have finished another split in the meantime.
            manifest = manifests.read(self.output_dir) or {
                "generator": manifests.GENERATOR,
                "generator_version": CONVERSION_VERSION,
                "name": NAME,
                "splits": {},
            }
            manifest["splits"][self.split] = facts
            manifests.write(self.output_dir, manifest)
        shutil.rmtree(self.journal)


@contextlib.contextmanager
def _locked(folder: pathlib.Path, wait: bool = True) -> Iterator[bool]:
    """Keeps a folder from other processes; yields False where one has it and `wait` is False."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        free = True
    except BlockingIOError:
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)
