"""Tables whose rows name images or hold them: CSV, TSV and parquet, read row by row in place.

Paths of images are relative to the table's folder; absolute ones and gs:// or s3:// URLs do as
well: the table is the user's own, so it may point anywhere. A row's fields are its columns. The
image's bytes stand in the field of its column and, unless there is a column of that name, in 'jpg';
its path is '__key__'. Columns of the same name are several captions.
"""

import array
import csv
import dataclasses
import errno
import functools
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.data.shard_formats import Fields, Scan
from clipa_t5x.data.shard_reader import BlockCache, ShardReader, is_local
from clipa_t5x.data.tfrecords import scan_cache
from clipa_t5x.errors import UserError

# Columns of images, as OpenCLIP, Hugging Face and img2dataset call them; the first there is.
IMAGE_COLUMNS = "image;jpg;filepath;file_name;image_path;path"
_CHUNK_BYTES = 2**22
# A header is looked for in less: it is read whenever the table is opened.
_HEADER_CHUNK_BYTES = 2**16
# A quote that nothing closes would make one row of the rest of the table.
MAX_ROW_BYTES = 2**24
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WEB = ("http://", "https://")
MAX_IMAGE_BYTES = 2**28
# What is the path's fault and not the disk's.
_NO_FILE = (errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO)


def read_image(table: str, path: str) -> bytes:
    """The bytes of a file that a table or a folder names.

    Args:
      table: path of the table, or of the folder and a slash.
      path: relative to it, or absolute, or a URL that tf.io.gfile reads.

    Raises:
      BadRecord: there is no such file.
      UserError: it is on the web.
    """
    if path.startswith(_WEB):
        raise UserError(
            f"{table} names images by web addresses ({path}), which training does not download: "
            "fetch them by img2dataset, and set DATA_DIR to what it writes."
        )
    full = os.path.join(os.path.dirname(table), path) if is_local(path) else path
    if not path or "\0" in path:
        raise BadRecord("missing image file", f"path {path!r}")
    if not is_local(full):
        return _read_remote(full)
    try:
        # A pipe would be waited for, and a device such as /dev/zero never ends.
        with open(full, "rb", opener=_open_at_once) as f:
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_IMAGE_BYTES:
                what = f"{full} is no file of at most {MAX_IMAGE_BYTES} bytes"
                raise BadRecord("unreadable image file", what)
            return f.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadRecord("missing image file", full) from error
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise BadRecord("unreadable image file", str(error)) from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _read_remote(url: str) -> bytes:
    """As `read_image`; what else goes wrong is the network's, and no record's fault."""
    import tensorflow as tf

    try:
        with tf.io.gfile.GFile(url, "rb") as f:
            return f.read()
    except tf.errors.NotFoundError as error:
        raise BadRecord("missing image file", url) from error
    except tf.errors.FailedPreconditionError as error:
        raise BadRecord("unreadable image file", f"{url} is a folder") from error


def find_column(names: Sequence[str], wanted: str, table: str, option: str) -> str:
    """The first of `wanted`, which ';' separates, that is among a table's columns.

    Raises:
      UserError: none is.
    """
    for name in wanted.split(";"):
        if name in names:
            return name
    raise UserError(
        f"{table} has no column {wanted.replace(';', ' or ')} of images; its columns are "
        f"{', '.join(names)}: set {option} to one of them."
    )


class _Quotes:
    """Where quoted fields begin and end: newlines within them end no row."""

    def __init__(self, delimiter: str, quotechar: str):
        quote, sign = re.escape(quotechar.encode() or b'"'), re.escape(delimiter.encode())
        # Possessive: text of quotes alone would otherwise be tried in a great many ways.
        text = rb"(?:[^%b]++|%b%b)*+(%b|\Z)" % ((quote,) * 4)
        self._quote = quotechar.encode()
        self._field = re.compile(rb"(?:^|%b)%b%b" % (sign, quote, text))
        self._rest = re.compile(text)

    def end_inside(self, line: bytes, inside: bool) -> bool:
        """Whether a line ends within a quoted field, where it begins `inside` of one or not."""
        if not self._quote or self._quote not in line:
            return inside
        at = 0
        if inside:
            rest = self._rest.match(line)
            if rest is None or not rest[1]:
                return True
            at = rest.end()
        return any(not field[1] for field in self._field.finditer(line, at))


class _UnclosedRow(Exception):  # noqa: N818  told to whoever scans
    """A row that ends nowhere; its first byte."""


def _lines(reader: ShardReader, chunk_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its newline) of all lines."""
    offset, end, rest = 0, 0, b""
    while chunk := reader.read(end, chunk_bytes):
        end += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield offset, line
            offset += len(line) + 1
        if len(rest) > MAX_ROW_BYTES:
            raise _UnclosedRow(offset)
    if rest:
        yield offset, rest


def _rows(
    reader: ShardReader, quotes: _Quotes, chunk_bytes: int = _CHUNK_BYTES
) -> Iterator[tuple[int, int]]:
    """(offset, length) of all rows, the header among them; empty lines are none.

    Raises:
      _UnclosedRow: where a row is not over after MAX_ROW_BYTES, or at the end.
    """
    inside, start = False, 0
    for offset, line in _lines(reader, chunk_bytes):
        start = start if inside else offset
        inside = quotes.end_inside(line, inside)
        length = offset + len(line) - start
        if inside and length > MAX_ROW_BYTES:
            raise _UnclosedRow(start)
        if not inside and (length > len(line) or line.strip()):
            yield start, length
    if inside:
        raise _UnclosedRow(start)


@dataclasses.dataclass(frozen=True)
class CSV:
    """Comma- or tab-separated values with a header; rows of the index are (offset, length).

    Attributes:
      delimiter: between values.
      quotechar: around values that hold delimiters or newlines; '' where quotes are text.
      image_column: name of the column of paths; of several by ';' the first that the table has.
    """

    delimiter: str = ","
    quotechar: str = '"'
    image_column: str = IMAGE_COLUMNS
    version: int = 1
    columns: int = 2

    @property
    def name(self) -> str:
        """Of the format and of what the places of rows depend on."""
        return f"csv {self.delimiter!r} {self.quotechar!r}"

    @property
    def patterns(self) -> Mapping[str, str]:
        """A file a split."""
        suffix = "tsv" if self.delimiter == "\t" else "csv"
        return {split: f"{split}.{suffix}" for split in ("train", "validation")}

    @functools.cached_property
    def _quotes(self) -> _Quotes:
        return _Quotes(self.delimiter, self.quotechar)

    def scan(self, path: str) -> Scan:
        """Finds the rows; memory beyond theirs is a few MB.

        Raises:
          UserError: the table has no column of images, or no header can be found.
        """
        places, problem = array.array("q"), ""
        with ShardReader(path, scan_cache(path)) as reader:
            names = self.header(reader)
            find_column(names, self.image_column, path, "CSV.image_column")
            try:
                for place in _rows(reader, self._quotes):
                    places.extend(place)
            except _UnclosedRow as error:
                problem = f"has a row at byte {error} that does not end: a quote is not closed"
        rows = np.frombuffer(places, np.int64).reshape(-1, 2)
        return Scan(rows[1:], problem)

    def header(self, reader: ShardReader) -> list[str]:
        """Names of the columns.

        Raises:
          UserError: the file does not begin with a line of text.
        """
        try:
            offset, length = next(_rows(reader, self._quotes, _HEADER_CHUNK_BYTES))
            raw = reader.read(offset, length).removeprefix(_BYTE_ORDER_MARK)
            if b"\0" in raw:
                raise ValueError("a zero byte is no text")
            return [name.strip() for name in self.values(raw.decode())]
        except (StopIteration, _UnclosedRow, ValueError, csv.Error) as error:
            raise UserError(
                f"{reader.path} does not begin with a header line of UTF-8 text, so it is no table "
                "of comma- or tab-separated values: remove the file, or name another format."
            ) from error

    def values(self, line: str) -> list[str]:
        """The values of a row."""
        quoting = csv.QUOTE_MINIMAL if self.quotechar else csv.QUOTE_NONE
        quotechar = self.quotechar or None
        lines = [line.rstrip("\r\n")]
        return next(csv.reader(lines, delimiter=self.delimiter, quotechar=quotechar,
                               quoting=quoting), [])  # fmt: skip

    @contextmanager
    def open(self, path: str, cache: BlockCache | None = None) -> Iterator["_OpenCSV"]:
        """Opens a table to read rows of it."""
        with ShardReader(path, cache) as reader:
            names = self.header(reader)
            image = find_column(names, self.image_column, path, "CSV.image_column")
            yield _OpenCSV(self, reader, names, image)


@dataclasses.dataclass(frozen=True)
class _OpenCSV:
    """A table, its columns' names, and which of them is the image's."""

    table: CSV
    reader: ShardReader
    names: list[str]
    image: str

    def read(self, row: np.ndarray) -> Fields:
        raw = self.reader.read(int(row[0]), int(row[1]))
        try:
            # What is no UTF-8 stays as it is: captions are mended where they are chosen.
            values = self.table.values(raw.decode("utf-8", "surrogateescape"))
        except csv.Error as error:
            raise BadRecord("damaged row", f"at byte {row[0]}: {error}") from error
        if len(raw) < row[1] or len(values) > len(self.names):
            what = f"at byte {row[0]}: {len(values)} values, {len(self.names)} columns"
            raise BadRecord("damaged row", what)
        fields: dict[str, list[bytes | int]] = {}
        for name, value in zip(self.names, values, strict=False):
            fields.setdefault(name, []).append(value.encode("utf-8", "surrogateescape"))
        image = os.fsdecode(_first_bytes(fields.get(self.image)))
        return with_image(fields, self.image, read_image(self.reader.path, image), image)


def _first_bytes(values: Sequence[bytes | int] | None) -> bytes:
    return values[0] if values and isinstance(values[0], bytes) else b""


def with_image(fields: dict[str, list[bytes | int]], column: str, data: bytes, path: str) -> Fields:
    """A row's fields with its image's bytes and path among them."""
    fields[column] = [data]
    fields.setdefault("jpg", [data])
    fields["__key__"] = [os.fsencode(path)]
    return fields
