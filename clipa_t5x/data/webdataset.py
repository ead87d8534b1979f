"""WebDataset's tar shards as the DataComp and LAION tools write them, read in place.

A sample is the run of files of one key (the name up to the first dot of its last part); a field is
what follows that dot: 'jpg', 'txt', 'json'. 'json:caption' is a member of that file. Files without
a dot, folders and links belong to no sample. Nothing is unpacked: no path of an archive touches the
disk.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.data.shard_formats import Fields, Scan
from clipa_t5x.data.shard_reader import BlockCache, ShardReader
from clipa_t5x.data.tfrecords import scan_cache
from clipa_t5x.errors import UserError

BLOCK = 512
_FILES = (b"0", b"\0", b"7")
# Links, devices and folders have no data, whatever size their headers state.
_NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
# Longer names follow in a member of their own, GNU's or POSIX's.
_LONG_NAME, _PAX = b"L", b"x"


class Member(NamedTuple):
    """One header of an archive.

    Attributes:
      name: as the header has it; longer names come by the member before.
      kind: the header's type flag.
      size: bytes of data.
      padded: bytes of header, data and padding.
    """

    name: str
    kind: bytes
    size: int
    padded: int


def parse_header(header: bytes) -> Member | None:
    """Reads 512 bytes; None where they are no header, or its checksum is wrong."""
    if len(header) < BLOCK or header.count(0) == BLOCK:
        return None
    try:
        expected = int(header[148:156].strip(b" \0") or b"-1", 8)
        size = _number(header[124:136])
    except ValueError:
        return None
    if sum(header) - sum(header[148:156]) + 8 * 32 != expected:
        return None
    name = header[:100].partition(b"\0")[0]
    if header[257:262] == b"ustar" and header[262:263] == b"\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    kind = header[156:157]
    size = 0 if kind in _NO_DATA else size
    padded = BLOCK + -(-size // BLOCK) * BLOCK
    return Member(name.decode("utf-8", "replace"), kind, size, padded)


def _number(field: bytes) -> int:
    """An octal number, or GNU's base 256 of those that are too great."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit():  # Signs and underscores, which `int` takes, are no tar's.
        raise ValueError(f"size {digits!r}")
    return int(digits, 8)


def _pax_path(data: bytes) -> str | None:
    """The path among POSIX's extended header records, 'length key=value' a line."""
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            return None
        record = rest[: int(length) - len(length) - 1].rstrip(b"\n")
        key, _, value = record.partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "replace")
        data = data[int(length) :]
    return None


def split_name(name: str) -> tuple[str, str]:
    """(key, field) of a file: 'a/0001.seg.png' is ('a/0001', 'seg.png'), in lower case.

    Either is '' where the file is none of a sample's.
    """
    folder, slash, base = name.rpartition("/")
    key, _, field = base.partition(".")
    return (folder + slash + key, field.lower()) if key else ("", "")


class _Open:
    def __init__(self, reader: ShardReader):
        self._reader = reader

    def read(self, row: np.ndarray) -> Fields:
        start, size = int(row[0]), int(row[1])
        raw = self._reader.read(start, size)
        if len(raw) < size:
            raise BadRecord("truncated shard", f"{self._reader.path} ends within a sample")
        return _JsonFields(_members(raw))


class _JsonFields(dict[str, list[bytes | int]]):
    """Fields, and 'json:name' for what is within the field 'json', parsed when asked for."""

    def __missing__(self, name: str) -> list[bytes | int]:
        file, colon, member = name.partition(":")
        if not colon or not (content := dict.get(self, file)):
            raise KeyError(name)
        members = self._json(file, content[0])
        if member not in members:
            raise KeyError(name)
        value = members[member]
        values = value if isinstance(value, list) else [] if value is None else [value]
        # Half of a pair of surrogates is no UTF-8, which is mended where captions are chosen.
        return [
            v if isinstance(v, int) else str(v).encode("utf-8", "surrogatepass") for v in values
        ]

    def _json(self, file: str, content: bytes | int) -> dict[str, Any]:
        try:
            return dict(json.loads(content))  # pyright: ignore[reportArgumentType]
        except (ValueError, TypeError, RecursionError) as error:
            raise BadRecord("unreadable metadata", f"field {file}: {error}") from error

    def all_names(self) -> list[str]:
        """Names of all fields, 'json:name' included; none of metadata that cannot be read."""
        members: Iterable[str] = ()
        with contextlib.suppress(BadRecord):
            members = self._json("json", self["json"][0]) if "json" in self else ()
        return [*self, *(f"json:{member}" for member in members)]

    def get(self, name: str, default=None):  # pyright: ignore
        """As a mapping's: also of 'json:name'."""
        try:
            return self[name]
        except KeyError:
            return default


def _members(raw: bytes) -> dict[str, list[bytes | int]]:
    """The files of one sample, by field, and its key as '__key__'."""
    fields: dict[str, list[bytes | int]] = {}
    offset, long_name = 0, None
    while offset < len(raw):
        member = parse_header(raw[offset : offset + BLOCK])
        if member is None:
            raise BadRecord("damaged shard", "a header within the sample is damaged")
        data = raw[offset + BLOCK : offset + BLOCK + member.size]
        offset += member.padded
        if member.kind == _LONG_NAME:
            long_name = data.rstrip(b"\0").decode("utf-8", "replace")
        elif member.kind == _PAX:
            long_name = _pax_path(data) or long_name
        else:
            if member.kind in _FILES:
                key, field = split_name(long_name or member.name)
                if key and field:
                    fields[field] = [data]
                    fields["__key__"] = [key.encode()]
            long_name = None
    return fields


@dataclasses.dataclass(frozen=True)
class WebDataset:
    """Tar files; rows of the index are (offset of a sample's first header, bytes of its files)."""

    name: str = "webdataset"
    version: int = 1
    columns: int = 2

    @property
    def patterns(self) -> Mapping[str, str]:
        """A folder a split."""
        return {"train": "train/*.tar", "validation": "validation/*.tar"}

    def scan(self, path: str) -> Scan:
        """Reads the shard header by header.

        Raises:
          UserError: it is no tar file.
        """
        rows: list[tuple[int, int]] = []
        key, problem = None, ""
        with ShardReader(path, scan_cache(path)) as reader:
            for start, end, name in _walk(reader):
                if name is None and not start and reader.size >= BLOCK:
                    raise UserError(
                        f"{path} is not a tar file: no header begins at byte 0. Remove the file "
                        "or write it again."
                    )
                if not end:
                    what = "is damaged" if name is None else "was cut off"
                    problem = f"{what} at byte {start} of {reader.size}"
                    if rows and (name is None or name == key):
                        rows.pop()  # What was lost was, or may have been, one of this sample's.
                    key = None
                elif name == key:
                    rows[-1] = (rows[-1][0], end - rows[-1][0])
                else:
                    rows.append((start, end - start))
                    key = name
        return Scan(np.asarray(rows, np.int64).reshape(-1, 2), problem)

    @contextmanager
    def open(self, path: str, cache: BlockCache | None = None) -> Iterator[_Open]:
        """Opens a shard to read samples of it."""
        with ShardReader(path, cache) as reader:
            yield _Open(reader)


def _walk(reader: ShardReader) -> Iterator[tuple[int, int, str | None]]:
    """Yields (first byte, byte after it, key) of every sample's file, headers of its name included.

    Where the archive breaks off, the end is 0; the key is '' if it does so in a header, and None if
    there is something else where a header should be, after which the next header is looked for.
    """
    offset, start, long_name, ended = 0, 0, None, False
    while offset < reader.size:
        header = reader.read(offset, BLOCK)
        member = parse_header(header)
        if member is None:
            if header.count(0) == len(header) and offset:
                # Zeros end an archive, but another may follow: they can be chained.
                offset = start = offset + BLOCK
                ended = True
                continue
            yield start, 0, "" if len(header) < BLOCK else None
            if not offset or len(header) < BLOCK:
                return
            # Whatever was there is lost; members begin at whole blocks, and the next may be whole.
            while offset < reader.size and parse_header(reader.read(offset, BLOCK)) is None:
                offset += BLOCK
            start, long_name = offset, None
            continue
        ended = False
        name = split_name(long_name or member.name)
        if offset + BLOCK + member.size > reader.size:
            yield start, 0, name[0]
            return
        if member.kind in (_LONG_NAME, _PAX):
            data = reader.read(offset + BLOCK, member.size)
            found = data.rstrip(b"\0").decode("utf-8", "replace")
            long_name = found if member.kind == _LONG_NAME else _pax_path(data) or long_name
            offset += member.padded
            continue
        offset += member.padded
        if member.kind in _FILES and all(name):
            yield start, offset, name[0]
        start, long_name = offset, None
    if not ended:
        yield start, 0, ""
