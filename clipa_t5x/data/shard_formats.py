"""What the formats of shards have in common, and which one a file is by its name."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.data.shard_reader import BlockCache

# A record's fields: name to values, of which captions may be several.
Fields = Mapping[str, Sequence[bytes | int]]


@dataclasses.dataclass(frozen=True)
class Scan:
    """What was found in a shard.

    Attributes:
      rows: int64 [records, columns], where each record is, in the format's own terms.
      problem: why records at the shard's end are lost; '' where none are.
    """

    rows: np.ndarray
    problem: str = ""


class OpenShard(Protocol):
    """A shard that is being read."""

    def read(self, row: np.ndarray) -> Fields:
        """The fields of the record that a row of the index points to.

        Raises:
          BadRecord: it is damaged.
        """
        ...


class ShardFormat(Protocol):
    """A way to keep records in files. Objects are small; files are named by path."""

    @property
    def name(self) -> str:
        """Of the format, in an index and in messages."""
        ...

    @property
    def version(self) -> int:
        """Of what `scan` returns; another one makes kept indices void."""
        ...

    @property
    def columns(self) -> int:
        """Of what `scan` returns."""
        ...

    @property
    def patterns(self) -> Mapping[str, str]:
        """Glob patterns of the usual splits, under a data set's folder."""
        ...

    def scan(self, path: str) -> Scan:
        """Where the records of a shard are.

        Raises:
          UserError: the file is of another kind.
        """
        ...

    def open(
        self, path: str, cache: BlockCache | None = None
    ) -> contextlib.AbstractContextManager[OpenShard]:
        """Opens a shard to read records of it."""
        ...


def first_present(fields: Fields, names: str) -> bytes:
    """The first value of the first field, of those separated by ';', that a record has.

    Raises:
      BadRecord: it has none of them, or an empty one.
    """
    for name in names.split(";"):
        if values := fields.get(name):
            value = values[0]
            if not isinstance(value, bytes):
                raise BadRecord("field of another type", f"{name} holds numbers")
            if not value:
                raise BadRecord("empty image", f"{name} has no bytes")
            return value
    raise BadRecord("missing image", f"no field {names!r}")


def has(record: Fields, name: str) -> bool:
    """Whether a record has a field; of metadata that cannot be read it has no member."""
    try:
        return record.get(name) is not None
    except BadRecord:
        return False


def field_names(fields: Sequence[Fields]) -> list[str]:
    """Names of all fields that some records have, sorted."""
    names: set[str] = set()
    for record in fields:
        names.update(record.all_names() if hasattr(record, "all_names") else record)  # pyright: ignore
    return sorted(names)


def iterate(shard: OpenShard, rows: np.ndarray) -> Iterator[Fields | BadRecord]:
    """Reads rows; what is damaged comes as the error."""
    for row in rows:
        try:
            yield shard.read(row)
        except BadRecord as error:
            yield error
