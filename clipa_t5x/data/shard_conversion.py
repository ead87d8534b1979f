"""Converts a run of records into one shard: what the processes of `conversion` do.

TensorFlow is not imported here: every process would spend seconds on it. (Reading tf.train.Examples
takes it, other formats do not.)
"""

import collections
import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from clipa_t5x.data import (
    captions,
    image_files,
    record_statistics,
    record_writer,
    shard_formats,
    tfrecords,
)
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.errors import UserError

# Of each reason so many bad records are named, by shard and by split.
NAMED_PER_REASON = 10
_RECORDS_PER_REPORT = 32


@dataclasses.dataclass(frozen=True)
class Options:
    """What becomes of a record.

    Attributes:
      image_key: name of the encoded image's field; of several by ';' the first that a record has.
      caption_keys: names of the caption fields; the first is written as 'txt'.
      label_key: name of the label's field, or None.
      short_side: pixels to which larger images are shrunk; None leaves them.
      quality: of the JPEGs that are encoded anew.
      output_format: one of `record_writer.FILES`.
    """

    image_key: str = "jpg;jpeg;png;webp"
    caption_keys: Sequence[str] = ("txt",)
    label_key: str | None = None
    short_side: int | None = None
    quality: int = 95
    output_format: str = "array_record"

    def __post_init__(self):
        written = ["key", "jpg", "width", "height", "label", *self.caption_fields().values()]
        for name in written:
            if written.count(name) > 1 or len(set(self.caption_keys)) < len(self.caption_keys):
                raise UserError(
                    f"--caption_key {' '.join(self.caption_keys)} would write the field {name!r} "
                    "twice: give every caption field once, the one to be named txt first"
                )

    def caption_fields(self) -> dict[str, str]:
        """Names of the written fields by the names of those that are read."""
        rest = {name: name.rpartition(":")[2] for name in self.caption_keys[1:]}
        return {**dict.fromkeys(self.caption_keys[:1], "txt"), **rest}


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Neighbouring records of an input shard.

    Attributes:
      path: of the shard.
      first: number of the first record within it.
      rows: int64 [records, columns], where they are, in the format's terms.
    """

    path: str
    first: int
    rows: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class ShardTask:
    """A shard that is to be written.

    Attributes:
      output_path: of the shard.
      first: number of its first record within the whole input.
      parts: its records.
      shard_format: of the input.
      options: what becomes of them.
    """

    output_path: str
    first: int
    parts: Sequence[Part]
    shard_format: shard_formats.ShardFormat
    options: Options


class Stopped(Exception):  # noqa: N818  no error
    """The work was called off."""


def write_shard(task: ShardTask, report: Callable[[int], None]) -> dict[str, Any]:
    """Writes a shard; it has its name when it is complete, and other names before.

    Args:
      task: what to write.
      report: called with how many more records are done; may raise `Stopped`.

    Returns:
      For JSON: 'file' (None where no record was fit to be written), 'records', 'bytes', 'sha256',
      'bad' and 'mended' (counts by reason), 'examples' (some bad records: reason, where),
      'statistics' (see `record_statistics`).

    Raises:
      UserError: the disk refuses.
    """
    bad, mended = collections.Counter[str](), collections.Counter[str]()
    examples: list[list[str]] = []
    statistics = record_statistics.RecordStatistics()
    with _Output(task.output_path, task.options.output_format) as output:
        for number, where, fields in _reported(_records(task), report):
            try:
                features, changes = convert(fields, number, task.options)
            except BadRecord as error:
                bad[error.reason] += 1
                if bad[error.reason] <= NAMED_PER_REASON:
                    examples.append([error.reason, f"{where}: {error}"])
                continue
            mended.update(changes)
            statistics.add_record(features, task.options.caption_fields().values())
            output.write(record_writer.serialize(features))
        facts = output.finish()
    return {
        **facts,
        "bad": dict(sorted(bad.items())),
        "mended": dict(sorted(mended.items())),
        "examples": examples,
        "statistics": statistics.to_json(),
    }


class _Output:
    """A shard under a temporary name until it is finished; without a record there will be none."""

    def __init__(self, path: str, output_format: str):
        self._path, self._temporary = path, f"{path}.tmp-{os.getpid()}"
        self._records = 0
        with self._told():
            self._file = record_writer.FILES[output_format](self._temporary)

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *_) -> None:
        # After `finish` nothing is left to be done; a broken file may refuse to be closed.
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            os.remove(self._temporary)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self._path} ({error.strerror or error}): make room for it, or "
                "choose another --output_dir. The same command goes on after the finished shards."
            ) from error

    def write(self, record: bytes) -> None:
        with self._told():
            self._file.write(record)
        self._records += 1

    def finish(self) -> dict[str, Any]:
        """Gives the file its name; returns the facts of it."""
        with self._told():
            self._file.close()
            if not self._records:
                return {"file": None, "records": 0, "bytes": 0, "sha256": ""}
            facts = {
                "file": os.path.basename(self._path),
                "records": self._records,
                "bytes": os.path.getsize(self._temporary),
                "sha256": record_writer.sha256(self._temporary),
            }
            os.replace(self._temporary, self._path)
        return facts


def _records(task: ShardTask) -> Iterator[tuple[int, str, shard_formats.Fields | BadRecord]]:
    """Yields (number in the input, where it is for people, fields or what is wrong)."""
    number = task.first
    for part in task.parts:
        with task.shard_format.open(part.path, tfrecords.scan_cache(part.path)) as shard:
            for i, fields in enumerate(shard_formats.iterate(shard, part.rows)):
                yield number, f"record {part.first + i} of {part.path}", fields
                number += 1


def _reported(records: Iterator[Any], report: Callable[[int], None]) -> Iterator[Any]:
    """Passes on, and reports now and then: every report takes a lock."""
    done = 0
    for record in records:
        yield record
        done += 1
        if done == _RECORDS_PER_REPORT:
            report(done)
            done = 0
    report(done)


def convert(
    fields: shard_formats.Fields | BadRecord, number: int, options: Options
) -> tuple[dict[str, Any], list[str]]:
    """A record under img2dataset's names.

    Args:
      fields: the record, or what is wrong with it.
      number: of the record within the input; names it where it has no key.
      options: what becomes of it.

    Returns:
      (features for `record_writer.serialize`, what was mended).

    Raises:
      BadRecord: it is not fit to be trained on.
    """
    if isinstance(fields, BadRecord):
        raise fields
    data = shard_formats.first_present(fields, options.image_key)
    image = image_files.check(data)
    changes = [image.mended] if image.mended else []
    image = shrink(image, options.short_side, options.quality)
    texts, mended = _captions(fields, options)
    key = fields.get("__key__") or fields.get("key") or [b"%09d" % number]
    features = {
        "key": key[0] if isinstance(key[0], bytes) else str(key[0]),
        "jpg": image.data,
        "width": image.width,
        "height": image.height,
        **texts,
    }
    if options.label_key is not None:
        features["label"] = _label(fields, options.label_key)
    return features, changes + mended


def _captions(
    fields: shard_formats.Fields, options: Options
) -> tuple[dict[str, list[bytes]], list[str]]:
    """(all captions that a record has, by the names they are written under; what was mended)."""
    texts: dict[str, list[bytes]] = {}
    mended = []
    for name, written in options.caption_fields().items():
        cleaned = [captions.clean(text) for text in captions.texts_of(fields.get(name))]
        if cleaned:
            texts[written] = [text for text, _ in cleaned]
            mended += [change for _, change in cleaned if change]
    if options.caption_keys and not texts:
        missing = not any(fields.get(name) for name in options.caption_keys)
        reason = "missing caption" if missing else "empty caption"
        raise BadRecord(reason, " and ".join(map(repr, options.caption_keys)))
    return texts, mended


def _label(fields: shard_formats.Fields, name: str) -> int:
    values = fields.get(name)
    if not values:
        raise BadRecord("missing label", f"no field {name!r}")
    try:
        return int(values[0])
    except ValueError as error:
        raise BadRecord("label is no number", f"{name} {values[0]!r}") from error


def shrink(
    image: image_files.ImageFile, short_side: int | None, quality: int
) -> image_files.ImageFile:
    """An image whose short side is at most `short_side` pixels; smaller ones stay as they are.

    What `image_files.check` had to mend becomes a JPEG in any case: it would be a large PNG.

    Args:
      image: of any size.
      short_side: pixels; None for no limit.
      quality: of the JPEG.

    Raises:
      BadRecord: it cannot be decoded.
    """
    short = min(image.height, image.width)
    scale = min(1.0, (short_side or short) / short)
    if scale == 1.0 and not image.mended:
        return image
    width, height = round(image.width * scale), round(image.height * scale)
    try:
        with image_files.open_plain(image.data) as opened:
            box = None
            if scale < 1.0:
                # A JPEG is decoded at a fraction of its size, but at no less than twice of what is
                # to become of it: the sharp filter then has enough to work on.
                drafted = opened.draft(None, (2 * width, 2 * height))  # pyright: ignore
                box = drafted[1] if drafted else None
            pixels = opened if opened.mode in ("RGB", "L") else opened.convert("RGB")
            if scale < 1.0:
                pixels = pixels.resize(
                    (width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0
                )
            buffer = io.BytesIO()
            pixels.save(buffer, "JPEG", quality=quality)
    except Exception as error:  # Pillow's decoders raise whatever they stumble over.
        reason = "truncated image" if "truncated" in str(error) else "unreadable image"
        raise BadRecord(reason, f"{type(error).__name__}: {error}") from error
    return image_files.ImageFile(buffer.getvalue(), height, width, image.mended)


def bounded(examples: Iterator[Sequence[str]]) -> list[str]:
    """The first few examples of each reason."""
    counts = collections.Counter[str]()
    kept = []
    for reason, text in examples:
        counts[reason] += 1
        if counts[reason] <= NAMED_PER_REASON:
            kept.append(text)
    return kept
