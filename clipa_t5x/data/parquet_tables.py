"""Parquet files whose rows hold images or name them, read in place, a row group at a time.

A column of images holds their bytes, or the struct {'bytes', 'path'} that Hugging Face's `datasets`
writes, or paths as in `image_tables`. Lists of texts are several captions. Numbers that are not
whole, and columns of other types, are left out.
"""

import collections
import dataclasses
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import numpy as np

from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.data.image_tables import IMAGE_COLUMNS, find_column, read_image, with_image
from clipa_t5x.data.shard_formats import Fields, Scan
from clipa_t5x.data.shard_reader import BlockCache, ShardReader
from clipa_t5x.data.tfrecords import scan_cache
from clipa_t5x.errors import UserError

_SIGNATURE = b"PAR1"
# Of rows that are all the same, which no captions are, a byte can hold more.
_MOST_ROWS_PER_BYTE = 8


class _RowGroups:
    """The most recently used row groups, decoded; each is decoded once, whoever asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: collections.OrderedDict[tuple, futures.Future[Any]]
        self._groups = collections.OrderedDict()

    def get(self, key: tuple, load: Callable[[], Any], max_bytes: int) -> Any:
        """A row group as a pyarrow.Table; at most `max_bytes` of them, or one, are kept."""
        with self._lock:
            group = self._groups.get(key)
            if group is not None:
                self._groups.move_to_end(key)
            else:
                mine = self._groups[key] = futures.Future()
        if group is not None:
            return group.result()
        try:
            mine.set_result(load())
        except BaseException as error:
            with self._lock:
                self._groups.pop(key, None)  # Whoever asks next tries again.
            mine.set_exception(error)
            raise
        self._drop(max_bytes)
        return mine.result()

    def _drop(self, max_bytes: int) -> None:
        with self._lock:
            sizes = {k: g.result().nbytes for k, g in self._groups.items() if _is_loaded(g)}
            total = sum(sizes.values())
            for key in list(sizes)[:-1]:
                if total <= max_bytes:
                    return
                total -= sizes[key]
                del self._groups[key]

    @property
    def num_bytes(self) -> int:
        """Of all that is kept."""
        with self._lock:
            return sum(g.result().nbytes for g in self._groups.values() if _is_loaded(g))


def _is_loaded(group: "futures.Future[Any]") -> bool:
    return group.done() and group.exception() is None


class _File(io.RawIOBase):
    """A shard as the file object that pyarrow asks for."""

    def __init__(self, reader: ShardReader):
        super().__init__()
        self._reader, self._at = reader, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._reader.size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._reader.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@dataclasses.dataclass(frozen=True)
class Parquet:
    """Parquet files; rows of the index are (row group, number of the row in it).

    A row costs the decoding of its row group, unless it is among those that are kept: row groups of
    more than some 100 MB, or a `cache_bytes` below the shuffle window, make reading slow.

    Attributes:
      image_column: name of the images' column; of several by ';' the first that the table has.
      read_columns: which columns are read; all of them if empty.
      cache_bytes: decoded row groups that are kept in memory, in bytes; one is always.
    """

    image_column: str = IMAGE_COLUMNS
    read_columns: Sequence[str] = ()
    cache_bytes: int = 2**31
    name: str = "parquet"
    version: int = 1
    columns: int = 2
    row_groups: _RowGroups = dataclasses.field(
        default_factory=_RowGroups, init=False, repr=False, compare=False
    )

    @property
    def patterns(self) -> Mapping[str, str]:
        """As Hugging Face names the files of a split."""
        return {split: f"*/{split}-*.parquet" for split in ("train", "validation")}

    def scan(self, path: str) -> Scan:
        """Reads the row counts at the file's end.

        Raises:
          UserError: it is no parquet file, or has no column of images.
        """
        with ShardReader(path, scan_cache(path)) as reader:
            if reader.read(0, len(_SIGNATURE)) != _SIGNATURE:
                raise UserError(
                    f"{path} is not a parquet file, or is damaged at byte 0. Remove the file or "
                    "write it again."
                )
            try:
                file = _parquet_file(reader)
            except _damages() as error:
                problem = f"was cut off or is damaged at its end ({_one_line(error)})"
                return Scan(np.zeros((0, self.columns), np.int64), problem)
            self.image_of(file.schema_arrow.names, path)
            counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            if min(counts, default=0) < 0 or sum(counts) > _MOST_ROWS_PER_BYTE * reader.size:
                problem = f"states {sum(counts)} rows, more than {reader.size} bytes can hold"
                return Scan(np.zeros((0, self.columns), np.int64), problem)
        groups = np.repeat(np.arange(len(counts)), counts)
        first = np.repeat(np.cumsum([0, *counts])[:-1], counts)
        return Scan(np.stack([groups, np.arange(len(groups)) - first], 1).astype(np.int64))

    def image_of(self, names: Sequence[str], path: str) -> str:
        """The column of images among a file's."""
        return find_column(names, self.image_column, path, "Parquet.image_column")

    @contextmanager
    def open(self, path: str, cache: BlockCache | None = None) -> Iterator["_OpenParquet"]:
        """Opens a file to read rows of it."""
        with ShardReader(path, cache) as reader:
            yield _OpenParquet(self, reader)


def _parquet_file(reader: ShardReader) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(_File(reader))


@dataclasses.dataclass(frozen=True)
class _OpenParquet:
    """A parquet file that is being read."""

    table: Parquet
    reader: ShardReader

    def read(self, row: np.ndarray) -> Fields:
        group, number = int(row[0]), int(row[1])
        key = (self.reader.path, group)
        try:
            rows = self.table.row_groups.get(
                key, lambda: self._decode(group), self.table.cache_bytes
            )
            cells = {name: rows.column(name)[number].as_py() for name in rows.column_names}
        except _damages() as error:
            raise BadRecord("damaged shard", f"row group {group}: {_one_line(error)}") from error
        image = self.table.image_of(rows.column_names, self.reader.path)
        data, path = _image(cells.pop(image), self.reader.path)
        fields = {name: values for name, cell in cells.items() if (values := _values(cell))}
        return with_image(fields, image, data, path)

    def _decode(self, group: int) -> Any:
        columns = list(self.table.read_columns) or None
        return _parquet_file(self.reader).read_row_group(group, columns, use_threads=False)


def _image(cell: Any, table: str) -> tuple[bytes, str]:
    """(bytes, path or '') of an image's cell."""
    path = ""
    if isinstance(cell, Mapping):
        cell, path = cell.get("bytes") or cell.get("path"), cell.get("path") or ""
    if isinstance(cell, bytes):
        return cell, path
    if isinstance(cell, str):
        return read_image(table, cell), cell
    raise BadRecord("missing image", "the cell is empty")


def _values(cell: Any) -> list[bytes | int]:
    """A cell's values as those of a record's field; none of what is no text and no whole number."""
    found: list[bytes | int] = []
    for value in cell if isinstance(cell, list) else [cell]:
        if isinstance(value, str):
            found.append(value.encode())
        elif isinstance(value, bytes):
            found.append(value)
        elif isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            found.append(int(value))
    return found


def _damages() -> tuple[type[Exception], ...]:
    """What pyarrow raises of damaged files; texts that are no UTF-8 are told of as values."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, ValueError, LookupError, OverflowError)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
