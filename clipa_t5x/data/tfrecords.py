"""TFRecord shards of tf.train.Examples, as img2dataset and TFDS write them, read at any position.

A TFRecord is [length: uint64][masked crc32c of length: uint32][data][masked crc32c of data: uint32]
(little endian).
"""

import dataclasses
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import google_crc32c
import numpy as np
from google.protobuf import message

from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.data.shard_formats import Fields, Scan
from clipa_t5x.data.shard_reader import BlockCache, ShardReader, is_local
from clipa_t5x.errors import UserError

HEADER_BYTES = 12
FOOTER_BYTES = 4
_SCAN_CACHE_BYTES = 2**26


def masked_crc32c(data: bytes) -> int:
    """TFRecord's checksum of `data`: CRC-32C, rotated and offset."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def parse_example(data: bytes) -> Fields:
    """The features of a serialised tf.train.Example: bytes or integers; floats are left out.

    Raises:
      BadRecord: it is none.
    """
    import tensorflow as tf  # here, since readers of other formats do without

    try:
        features = tf.train.Example.FromString(data).features.feature
    except message.DecodeError as error:
        raise BadRecord("no tf.train.Example", str(error)) from error
    return {
        name: feature.bytes_list.value or feature.int64_list.value
        for name, feature in features.items()
    }


def scan_cache(path: str) -> BlockCache | None:
    """Blocks to scan a remote file by: a request for every header would take hours."""
    return None if is_local(path) else BlockCache(_SCAN_CACHE_BYTES)


class _Open:
    def __init__(self, reader: ShardReader):
        self._reader = reader

    def read(self, row: np.ndarray) -> Fields:
        return parse_example(self.data(row))

    def data(self, row: np.ndarray) -> bytes:
        """The bytes of a record, their checksum compared."""
        offset, length = int(row[0]), int(row[1])
        raw = self._reader.read(offset + HEADER_BYTES, length + FOOTER_BYTES)
        data, footer = raw[:length], raw[length:]
        if len(footer) < FOOTER_BYTES:
            raise BadRecord("truncated shard", f"{self._reader.path} ends within a record")
        if struct.unpack("<I", footer)[0] != masked_crc32c(data):
            raise BadRecord("wrong checksum", f"at byte {offset}")
        return data


@dataclasses.dataclass(frozen=True)
class TFRecord:
    """TFRecord files; rows of the index are (offset, length of the data)."""

    name: str = "tfrecord"
    version: int = 2
    columns: int = 2

    @property
    def patterns(self) -> Mapping[str, str]:
        """What img2dataset writes when a split is a folder of its own."""
        return {"train": "train/*.tfrecord*", "validation": "validation/*.tfrecord*"}

    def scan(self, path: str) -> Scan:
        """Reads the shard header by header.

        Raises:
          UserError: it does not begin as a TFRecord.
        """
        rows, offset, problem = [], 0, ""
        with ShardReader(path, scan_cache(path)) as reader:
            while offset < reader.size:
                length = _record_length(reader, offset)
                if length is None and not offset and reader.size >= HEADER_BYTES:
                    raise UserError(_not_a_shard(path, reader.read(0, 2)))
                if length is None or offset + length + 16 > reader.size:
                    what = "is damaged" if length is None else "was cut off"
                    problem = f"{what} at byte {offset} of {reader.size}; what follows is not read"
                    break
                rows.append((offset, length))
                offset += HEADER_BYTES + length + FOOTER_BYTES
        return Scan(np.asarray(rows, np.int64).reshape(-1, 2), problem)

    @contextmanager
    def open(self, path: str, cache: BlockCache | None = None) -> Iterator[_Open]:
        """Opens a shard to read records of it."""
        with ShardReader(path, cache) as reader:
            yield _Open(reader)


def _not_a_shard(path: str, start: bytes) -> str:
    if start == b"\x1f\x8b":
        return f"{path} is compressed by gzip, which has no positions to read at: decompress it."
    return (
        f"{path} is not a TFRecord file, or is damaged at byte 0: no record begins there. Remove "
        "the file or write it again."
    )


def _record_length(reader: ShardReader, offset: int) -> int | None:
    """The data length of the record at `offset`; None where no record begins."""
    header = reader.read(offset, HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    length, crc = struct.unpack("<QI", header)
    return length if masked_crc32c(header[:8]) == crc else None
