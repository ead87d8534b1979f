"""Where each record of a set of shards is: what makes any record reachable at once.

Shards are scanned once; what was found is kept beside the data, or in a folder that the user names,
and read back memory-mapped.
"""

import dataclasses
import functools
import hashlib
import json
import os
import sys
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from clipa_t5x.data import progress, shard_formats
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.data.shard_reader import BlockCache, is_local
from clipa_t5x.errors import UserError

INDEX_VERSION = 2
_SCANS = 32


@dataclasses.dataclass(frozen=True, eq=False)
class RecordIndex:
    """Every record of a split, numbered through its shards in the order of their names.

    Attributes:
      shards: paths.
      shard_bytes: int64 [shards], their sizes.
      ends: int64 [shards], number of records up to and including each shard.
      rows: int64 [records, columns], where each record is, in the format's terms.
      problems: what is wrong with a shard, by its path.
      shard_format: of all shards.
    """

    shards: Sequence[str]
    shard_bytes: np.ndarray
    ends: np.ndarray
    rows: np.ndarray
    problems: Mapping[str, str]
    shard_format: shard_formats.ShardFormat

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mean_bytes(self) -> float:
        """Bytes of a record, on average over all shards."""
        return float(self.shard_bytes.sum()) / max(len(self), 1)

    @functools.cached_property
    def digest(self) -> str:
        """Of the shards' names, sizes and counts: the same wherever the data set lies."""
        names = [os.path.basename(path) for path in self.shards]
        facts: list[Any] = [names, self.shard_bytes.tolist(), self.ends.tolist()]
        if not self.shard_bytes.all():
            # Of folders: what they hold is in the rows alone.
            facts.append(hashlib.sha256(self.rows.tobytes()).hexdigest())
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def shard_of(self, records: np.ndarray) -> np.ndarray:
        """Numbers of the shards that hold records (int64 [n])."""
        return np.searchsorted(self.ends, records, side="right")

    def read(
        self, records: np.ndarray, cache: BlockCache | None = None
    ) -> list[shard_formats.Fields | BadRecord]:
        """Records of given numbers (int64 [n], each within [0, len)), in that order.

        What is damaged comes as the error.
        """
        shard_ids = self.shard_of(records)
        found: list[shard_formats.Fields | BadRecord] = [{}] * len(records)
        for shard_id in np.unique(shard_ids):
            where = np.flatnonzero(shard_ids == shard_id)
            # In the order of the shard, so that reads of it go one way.
            where = where[np.argsort(records[where], kind="stable")]
            with self.shard_format.open(self.shards[int(shard_id)], cache) as shard:
                rows = self.rows[records[where]]
                for i, record in zip(where, shard_formats.iterate(shard, rows), strict=True):
                    found[i] = record
        return found


def _fingerprint(shards: Iterable[str]) -> list[list]:
    with futures.ThreadPoolExecutor(_SCANS) as pool:
        stats = list(pool.map(tf.io.gfile.stat, shards))
    # A folder's own size is its file system's matter.
    return [
        [os.path.basename(path), 0 if stat.is_directory else stat.length, stat.mtime_nsec]
        for path, stat in zip(shards, stats, strict=True)
    ]


# What JSON and .npy files raise that are damaged.
_DAMAGES = (
    *(tf.errors.OpError, OSError, ValueError, TypeError, KeyError, SyntaxError, EOFError),
    *(tokenize.TokenError, RecursionError, OverflowError, MemoryError),
)


def _cached(
    index_path: str, description: Mapping, columns: int
) -> tuple[np.ndarray, Mapping] | None:
    """(rows, what else is kept), where a whole index of these very shards is kept."""
    try:
        with tf.io.gfile.GFile(index_path + ".json") as f:
            kept = json.load(f)
        if not _is_description(kept, description):
            return None
        if is_local(index_path):
            rows = np.load(index_path + ".npy", mmap_mode="r", allow_pickle=False)
        else:
            with tf.io.gfile.GFile(index_path + ".npy", "rb") as f:
                rows = np.load(f, allow_pickle=False)
    except _DAMAGES:
        return None
    whole = rows.dtype == np.int64 and rows.shape == (kept["ends"][-1], columns)
    return (rows, kept) if whole else None


def _is_description(kept: Any, description: Mapping) -> bool:
    """Whether what is kept is of these shards, and has what `_store` wrote."""
    if not isinstance(kept, dict) or not isinstance(kept.get("problems"), dict):
        return False
    ends, num_shards = kept.get("ends"), len(description["shards"])
    if not isinstance(ends, list) or len(ends) != num_shards or sorted(ends) != ends:
        return False
    return ends[0] >= 0 and all(kept.get(name) == value for name, value in description.items())


def _store(index_path: str, kept: Mapping, rows: np.ndarray) -> None:
    """Keeps an index for the next start; a folder that cannot be written to costs a warning."""
    temporary = f"{index_path}.{os.getpid()}.tmp"
    try:
        tf.io.gfile.makedirs(os.path.dirname(index_path))
        with tf.io.gfile.GFile(temporary, "wb") as f:
            np.save(f, rows, allow_pickle=False)
        tf.io.gfile.rename(temporary, index_path + ".npy", overwrite=True)
        with tf.io.gfile.GFile(temporary, "w") as f:
            json.dump(kept, f)
        # The description comes last: it vouches for the rows.
        tf.io.gfile.rename(temporary, index_path + ".json", overwrite=True)
    except (tf.errors.OpError, OSError) as error:
        logging.warning(
            "The record index cannot be kept at %s (%s); it is scanned again at every start. "
            "Set INDEX_DIR to a folder that can be written to.", index_path, error,
        )  # fmt: skip


def load(
    shards: Sequence[str], index_path: str, shard_format: shard_formats.ShardFormat
) -> RecordIndex:
    """The index of `shards`, scanned where it is not cached at `index_path` (without a suffix).

    Raises:
      UserError: a shard is of another format.
    """
    fingerprint = _fingerprint(shards)
    description = {
        "version": INDEX_VERSION,
        "format": [shard_format.name, shard_format.version],
        "shards": fingerprint,
    }
    sizes = np.asarray([size for _, size, _ in fingerprint], np.int64)
    cached = _cached(index_path, description, shard_format.columns)
    if cached is None:
        scans = _scan_all(shards, shard_format)
        ends = np.cumsum([len(scan.rows) for scan in scans], dtype=np.int64)
        rows = np.concatenate([scan.rows for scan in scans])
        problems = {path: scan.problem for path, scan in zip(shards, scans, strict=True)
                    if scan.problem}  # fmt: skip
        _store(index_path, {**description, "ends": ends.tolist(), "problems": problems}, rows)
    else:
        rows, kept = cached
        ends, problems = np.asarray(kept["ends"], np.int64), kept["problems"]
    return RecordIndex(shards, sizes, ends, rows, problems, shard_format)


def _scan_all(
    shards: Sequence[str], shard_format: shard_formats.ShardFormat
) -> list[shard_formats.Scan]:
    """Scans in threads, and tells how far it is."""
    logging.info("Indexing the records of %d shards ...", len(shards))
    counter = progress.Progress(len(shards), sys.stderr, "shards")

    def scan(path: str) -> shard_formats.Scan:
        stat = tf.io.gfile.stat(path)
        if not stat.length and not stat.is_directory:
            found = shard_formats.Scan(
                np.zeros((0, shard_format.columns), np.int64), "is empty (0 bytes)"
            )
        else:
            try:
                found = shard_format.scan(path)
            except (tf.errors.OpError, OSError) as error:
                raise UserError(
                    f"shard {path} cannot be read ({error}): make it a file that can be, or "
                    "remove it."
                ) from error
        counter.count()
        return found

    with futures.ThreadPoolExecutor(_SCANS) as pool:
        return list(pool.map(scan, shards))
