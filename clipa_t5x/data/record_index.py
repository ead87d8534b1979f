"""Where each record of a set of TFRecord shards begins: what makes any record reachable at once.

A TFRecord is [length: uint64][masked crc32c of length: uint32][data][masked crc32c of data: uint32]
(little endian). Shards are scanned once, header by header; the offsets are kept beside the data, or
in a folder that the user names, and read back memory-mapped.
"""

import dataclasses
import json
import os
import struct
from collections.abc import Iterable, Sequence
from concurrent import futures

import numpy as np
import tensorflow as tf
from absl import logging

from clipa_t5x.errors import UserError

HEADER_BYTES = 12
FOOTER_BYTES = 4
INDEX_VERSION = 1


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc32c_table()


def masked_crc32c(data: bytes) -> int:
    """TFRecord's checksum of `data`: CRC-32C, rotated and offset."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def is_local(path: str) -> bool:
    """Whether a path is a file of this machine rather than a URL such as gs://."""
    return "://" not in path


class ShardReader:
    """Random reads from one shard, local or remote; closed by `with`."""

    def __init__(self, path: str):
        self._path = path
        self._local = is_local(path)

    def __enter__(self) -> "ShardReader":
        self._file = (
            open(self._path, "rb", buffering=0)  # noqa: SIM115
            if self._local
            else tf.io.gfile.GFile(self._path, "rb")
        )
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer at the end of the file."""
        if self._local:
            return os.pread(self._file.fileno(), size, offset)
        self._file.seek(offset)
        return self._file.read(size)

    def record_length(self, offset: int) -> int:
        """The data length of the record at `offset`.

        Raises:
          UserError: no record begins there.
        """
        header = self.read(offset, HEADER_BYTES)
        if len(header) == HEADER_BYTES:
            length, crc = struct.unpack("<QI", header)
            if masked_crc32c(header[:8]) == crc:
                return length
        raise UserError(
            f"{self._path} is not a TFRecord file, or is damaged at byte {offset}: no record "
            "begins there. Remove the file or write it again."
        )

    def record(self, offset: int) -> bytes:
        """The data of the record at `offset`."""
        return self.read(offset + HEADER_BYTES, self.record_length(offset))


def scan_shard(path: str) -> np.ndarray:
    """Offsets of a shard's records: int64 [records].

    Raises:
      UserError: the shard is empty, is not a TFRecord, or ends within a record.
    """
    size = tf.io.gfile.stat(path).length
    if size == 0:
        raise UserError(
            f"{path} is an empty shard (0 bytes): remove it, or write the data set again."
        )
    offsets, offset = [], 0
    with ShardReader(path) as reader:
        while offset < size:
            offsets.append(offset)
            offset += HEADER_BYTES + reader.record_length(offset) + FOOTER_BYTES
    if offset != size:
        raise UserError(
            f"{path} ends within its last record ({size} bytes where {offset} are announced): the "
            "file was cut off. Remove it or write it again."
        )
    return np.asarray(offsets, np.int64)


@dataclasses.dataclass(frozen=True)
class RecordIndex:
    """Every record of a split, numbered through its shards in the order of their names.

    Attributes:
      shards: paths.
      ends: int64 [shards], number of records up to and including each shard.
      offsets: int64 [records], where each begins within its shard.
    """

    shards: Sequence[str]
    ends: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, positions: np.ndarray) -> list[bytes]:
        """Records at `positions` (int64 [n], each within [0, len)), in that order."""
        shard_ids = np.searchsorted(self.ends, positions, side="right")
        records: list[bytes] = [b""] * len(positions)
        for shard_id in np.unique(shard_ids):
            with ShardReader(self.shards[int(shard_id)]) as reader:
                for i in np.flatnonzero(shard_ids == shard_id):
                    records[i] = reader.record(int(self.offsets[positions[i]]))
        return records


def _fingerprint(shards: Iterable[str]) -> list[list]:
    stats = [(path, tf.io.gfile.stat(path)) for path in shards]
    return [[os.path.basename(path), stat.length, stat.mtime_nsec] for path, stat in stats]


def _cached(index_path: str, description: dict) -> np.ndarray | None:
    try:
        with tf.io.gfile.GFile(index_path + ".json") as f:
            if {k: v for k, v in json.load(f).items() if k != "ends"} != description:
                return None
        if is_local(index_path):
            return np.load(index_path + ".npy", mmap_mode="r", allow_pickle=False)
        with tf.io.gfile.GFile(index_path + ".npy", "rb") as f:
            return np.load(f, allow_pickle=False)
    except (tf.errors.OpError, OSError, ValueError):
        return None


def _store(index_path: str, description: dict, ends: np.ndarray, offsets: np.ndarray) -> None:
    """Keeps an index for the next start; a folder that cannot be written to costs a warning."""
    temporary = f"{index_path}.{os.getpid()}.tmp"
    try:
        tf.io.gfile.makedirs(os.path.dirname(index_path))
        with tf.io.gfile.GFile(temporary, "wb") as f:
            np.save(f, offsets, allow_pickle=False)
        tf.io.gfile.rename(temporary, index_path + ".npy", overwrite=True)
        with tf.io.gfile.GFile(temporary, "w") as f:
            json.dump({**description, "ends": ends.tolist()}, f)
        # The description comes last: it vouches for the offsets.
        tf.io.gfile.rename(temporary, index_path + ".json", overwrite=True)
    except (tf.errors.OpError, OSError) as error:
        logging.warning(
            "The record index cannot be kept at %s (%s); it is scanned again at every start. "
            "Set index_dir to a folder that can be written to.", index_path, error,
        )  # fmt: skip


def load(shards: Sequence[str], index_path: str) -> RecordIndex:
    """The index of `shards`, scanned where it is not cached at `index_path` (without a suffix).

    Raises:
      UserError: a shard is empty, cut off, or not a TFRecord.
    """
    description = {"version": INDEX_VERSION, "shards": _fingerprint(shards)}
    offsets = _cached(index_path, description)
    if offsets is not None:
        with tf.io.gfile.GFile(index_path + ".json") as f:
            return RecordIndex(shards, np.asarray(json.load(f)["ends"], np.int64), offsets)
    logging.info("Indexing the records of %d shards ...", len(shards))
    with futures.ThreadPoolExecutor(32) as pool:
        scanned = list(pool.map(scan_shard, shards))
    ends = np.cumsum([len(part) for part in scanned], dtype=np.int64)
    offsets = np.concatenate(scanned)
    _store(index_path, description, ends, offsets)
    return RecordIndex(shards, ends, offsets)
