"""ArrayRecord shards of tf.train.Examples, read at any position.

An ArrayRecord ends with an index of its own: only the number of a record within its shard is kept
here. The library reads files that the kernel can open: local disks and mounted buckets (gcsfuse,
mountpoint-s3), no gs:// or s3:// URLs.
"""

import collections
import dataclasses
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore

from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.data.shard_formats import Fields, Scan
from clipa_t5x.data.shard_reader import BlockCache, is_local
from clipa_t5x.data.tfrecords import parse_example
from clipa_t5x.errors import UserError

# What every Riegeli file begins with, ArrayRecords among them.
_SIGNATURE = bytes.fromhex("83af70d10d884a3f")
# One record at a time: reading ahead costs memory, and gains nothing where the order is random.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER_BYTES = 2**15
# Opening reads a shard's whole index, a hundred times what a record costs. An open shard holds its
# buffer and 8 bytes a record.
_OPEN_SHARDS = 128


class _Readers:
    """The most recently used shards, open; safe among threads, as the library's readers are."""

    def __init__(self, most: int):
        self._most = most
        self._lock = threading.Lock()
        self._readers: collections.OrderedDict[tuple, Any] = collections.OrderedDict()

    def get(self, path: str) -> Any:
        """A reader of the file as it is now. One that is still in use outlives its place here."""
        status = os.stat(path)
        key = (path, status.st_ino, status.st_size, status.st_mtime_ns)
        with self._lock:
            if key in self._readers:
                self._readers.move_to_end(key)
                return self._readers[key]
        reader = _open(path)
        with self._lock:
            self._readers[key] = reader
            while len(self._readers) > self._most:
                self._readers.popitem(last=False)
        return reader


_READERS = _Readers(_OPEN_SHARDS)


def _open(path: str) -> Any:
    return array_record_module.ArrayRecordReader(
        path, options=_OPTIONS, file_reader_buffer_size=_BUFFER_BYTES
    )


class _Open:
    def __init__(self, path: str):
        self._path = path
        self._reader = _READERS.get(path)

    def read(self, row: np.ndarray) -> Fields:
        if not self._reader.ok():
            raise BadRecord("damaged shard", f"{self._path} cannot be opened any more")
        number = int(row[0])
        if not 0 <= number < self._reader.num_records():
            raise BadRecord("truncated shard", f"{self._path} has no record {number}")
        try:
            # A range: the library's other call, by a list, takes ten times as long for one record.
            (data,) = self._reader.read(number, number + 1)
        except RuntimeError as error:
            raise BadRecord("damaged shard", f"record {number}: {error}") from error
        return parse_example(data)


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """ArrayRecord files; rows of the index are (number of the record in its shard,)."""

    name: str = "array_record"
    version: int = 1
    columns: int = 1

    @property
    def patterns(self) -> Mapping[str, str]:
        """A folder a split."""
        return {"train": "train/*.array_record*", "validation": "validation/*.array_record*"}

    def scan(self, path: str) -> Scan:
        """Counts the records, by the index at the shard's end: without it, all are lost.

        Raises:
          UserError: the file is no ArrayRecord, or a URL.
        """
        if not is_local(path):
            raise UserError(
                f"{path} is an ArrayRecord behind a URL, and the ArrayRecord library reads files "
                "only: mount the bucket (gcsfuse, mountpoint-s3) and set DATA_DIR to where it is, "
                "or keep the data as TFRecord or WebDataset shards."
            )
        with open(path, "rb") as f:
            if not f.read(len(_SIGNATURE)) == _SIGNATURE:
                raise UserError(
                    f"{path} is not an ArrayRecord file, or is damaged at byte 0. Remove the file "
                    "or write it again."
                )
        reader = _open(path)
        if not reader.ok():
            none = np.zeros((0, self.columns), np.int64)
            return Scan(none, "was cut off or is damaged at its end, where its index should be")
        return Scan(np.arange(reader.num_records(), dtype=np.int64)[:, None])

    @contextmanager
    def open(self, path: str, cache: BlockCache | None = None) -> Iterator[_Open]:
        """Opens a shard to read records of it; a shard that was open before is at hand."""
        del cache
        yield _Open(path)
