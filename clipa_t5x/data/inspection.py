"""Looks into a shard, a split or a data set: fields, sizes, bad records, pictures with captions."""

import collections
import os
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from PIL import UnidentifiedImageError

from clipa_t5x.data import (
    conversion,
    image_files,
    manifests,
    picture_grid,
    record_index,
    record_statistics,
    shard_conversion,
    shard_formats,
    shard_reader,
)
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.errors import UserError

_RECORDS_TO_LOOK_AT = 2000
_FIRST_RECORDS = 32
_RECORDS_PER_READ = 64
_TEXT_SHOWN = 60
# Usual names, where none is given.
_IMAGE_KEYS = "jpg;jpeg;png;webp;image;image/encoded;jpg_bytes"
_CAPTION_KEYS = ("txt", "caption", "text", "json:caption")
_COLUMNS = ("min", "p5", "p50", "p95", "max", "mean")


def inspect(
    path: str,
    *,
    image_key: str | None = None,
    caption_keys: Sequence[str] | None = None,
    num_pictures: int = 36,
    output: str | None = None,
    everything: bool = False,
) -> Iterator[str]:
    """Describes what is at a path, piece by piece.

    Args:
      path: a shard, a folder of shards, or a folder of such folders; local or remote.
      image_key: name of the encoded image's field, alternatives by ';'; None tries usual ones.
      caption_keys: names of caption fields; None tries usual ones.
      num_pictures: of the grid, spread evenly over the first split.
      output: where the grid goes, a PNG file; None draws none.
      everything: look at all records and checksums, not at 2,000 records spread evenly.

    Yields:
      Text, of one or more lines.

    Raises:
      UserError: there are no shards, or they are not what their manifest says; the latter after
        everything else was told.
    """
    wrong: UserError | None = None
    for number, (name, shards) in enumerate(_splits(path).items()):
        index, data_dir = _index(name, shards)
        if not len(index):
            yield f"{name}: {len(shards)} shards without a record"
            continue
        options = _options(index, image_key, caption_keys)
        yield _head(name, index)
        yield _first_record(index)
        yield _statistics(index, options, len(index) if everything else _RECORDS_TO_LOOK_AT)
        try:
            yield _compare(data_dir, index, everything)
        except UserError as error:
            wrong = wrong or error
            yield f"  manifest: {error}"
        if output and not number:
            yield _draw(index, options, num_pictures, output)
    if wrong:
        raise wrong


def _splits(path: str) -> dict[str, list[str]]:
    """Shards by the path of their folder, or of the only one."""
    if not tf.io.gfile.isdir(path) or conversion.shards_in(path)[0]:
        return {path: conversion.find_shards(path, None, "")[0]}
    folders = (os.path.join(path, name.rstrip("/")) for name in sorted(tf.io.gfile.listdir(path)))
    found = {folder: conversion.shards_in(folder)[0] for folder in folders}
    found = {folder: shards for folder, shards in found.items() if shards}
    return found or {path: conversion.find_shards(path, None, "train")[0]}


def _index(name: str, shards: Sequence[str]) -> tuple[record_index.RecordIndex, str]:
    """The record index and the data set's folder; nothing is left beside the data."""
    _, shard_format = conversion.find_shards(name, None, "")
    folder = os.path.dirname(shards[0])
    data_dir, split = os.path.split(folder)
    kept = os.path.join(data_dir, ".record_index", split)
    if name == folder and tf.io.gfile.exists(f"{kept}.json"):
        return record_index.load(shards, kept, shard_format), data_dir
    with tempfile.TemporaryDirectory() as temporary:
        index = record_index.load(shards, os.path.join(temporary, "index"), shard_format)
    return index, data_dir


def _present(index: record_index.RecordIndex) -> list[shard_formats.Fields]:
    first = index.read(np.arange(min(len(index), _FIRST_RECORDS)))
    return [record for record in first if not isinstance(record, BadRecord)]


def _options(
    index: record_index.RecordIndex, image_key: str | None, caption_keys: Sequence[str] | None
) -> shard_conversion.Options:
    if caption_keys is None:
        present = _present(index)
        found = (name for name in _CAPTION_KEYS if any(shard_formats.has(r, name) for r in present))
        caption_keys = tuple(found)[:1]
    return shard_conversion.Options(
        image_key=image_key or _IMAGE_KEYS, caption_keys=tuple(caption_keys)
    )


def _head(name: str, index: record_index.RecordIndex) -> str:
    sizes = index.shard_bytes
    counts = np.diff(index.ends, prepend=0)
    each = f", {counts.min()} to {counts.max()} records each" if len(counts) > 1 else ""
    lines = [
        f"{name}: {len(index)} records, {index.shard_format.name}, {len(sizes)} "
        f"{'shard' if len(sizes) == 1 else 'shards'}{each}, {int(sizes.sum()) / 1e6:.1f} MB"
    ]
    for path, problem in list(index.problems.items())[:10]:
        lines.append(f"  damaged: {path} {problem}")
    return "\n".join(lines)


def _first_record(index: record_index.RecordIndex) -> str:
    (record,) = index.read(np.asarray([0]))
    if isinstance(record, BadRecord):
        return f"  the first record is damaged: {record}"
    lines = ["  fields of the first record:"]
    width = max(map(len, record), default=0)
    for name in sorted(record):
        lines.append(f"    {name:<{width}}  {_spell(record[name])}")
    return "\n".join(lines)


def _spell(values: Sequence[bytes | int]) -> str:
    """What a field holds, in a line."""
    several = f", the first of {len(values)}" if len(values) > 1 else ""
    if not values:
        return "empty"
    value = values[0]
    if not isinstance(value, bytes):
        return f"integer {value}{several}"
    try:
        image = image_files.check(value)
        kind = image.mended or ("JPEG" if value.startswith(image_files.JPEG_START) else "PNG")
        return f"{len(value):,} bytes, image ({kind}) of {image.width} x {image.height}{several}"
    except (BadRecord, UnidentifiedImageError):
        pass
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return f"{len(value):,} bytes, neither an image nor text{several}"
    shown = text if len(text) <= _TEXT_SHOWN else f"{text[:_TEXT_SHOWN]}..."
    return f"{len(value):,} bytes, text {shown!r}{several}"


def _spread(index: record_index.RecordIndex, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, len(index) - 1, min(most, len(index))).astype(np.int64))


def _converted(
    index: record_index.RecordIndex, options: shard_conversion.Options, most: int
) -> Iterator[dict | BadRecord]:
    """Records, spread evenly, as `shard_conversion.convert` has them."""
    numbers = _spread(index, most)
    for start in range(0, len(numbers), _RECORDS_PER_READ):
        batch = numbers[start : start + _RECORDS_PER_READ]
        for number, fields in zip(batch, index.read(batch), strict=True):
            try:
                yield shard_conversion.convert(fields, int(number), options)[0]
            except BadRecord as error:
                yield error


def _statistics(
    index: record_index.RecordIndex, options: shard_conversion.Options, most: int
) -> str:
    statistics, bad = record_statistics.RecordStatistics(), collections.Counter[str]()
    seen = 0
    for record in _converted(index, options, most):
        seen += 1
        if isinstance(record, BadRecord):
            bad[record.reason] += 1
        else:
            statistics.add_record(record, options.caption_fields().values())
    names = ", ".join(options.caption_keys) or "none found"
    lines = [f"  of {seen} records{'' if seen == len(index) else ', spread evenly'}:"]
    lines.append(f"    {'':<14}" + "".join(f"{name:>9}" for name in _COLUMNS))
    for name, values in statistics.summary().items():
        lines.append(f"    {name:<14}" + "".join(f"{values[c]:>9.7g}" for c in _COLUMNS))
    lines.append(f"    captions: {names}")
    reasons = ", ".join(f"{reason} {n} ({n / seen:.1%})" for reason, n in bad.most_common())
    lines.append(f"    bad records: {sum(bad.values())}{f', {reasons}' if reasons else ''}")
    return "\n".join(lines)


def _compare(data_dir: str, index: record_index.RecordIndex, everything: bool) -> str:
    compared = manifests.check(data_dir, index)
    if compared and everything and shard_reader.is_local(data_dir):
        compared += f"; {manifests.check_sums(index.shards)}"
    return f"  manifest: {compared or 'none'}"


def _draw(
    index: record_index.RecordIndex, options: shard_conversion.Options, num: int, output: str
) -> str:
    pictures = []
    for record in _converted(index, options, num):
        if isinstance(record, BadRecord):
            pictures.append((None, f"({record})"))
            continue
        texts = (
            record.get(name, [b"(no caption)"])[0] for name in options.caption_fields().values()
        )
        pictures.append((record["jpg"], " / ".join(text.decode() for text in texts)))
    try:
        picture_grid.draw(pictures).save(output, "PNG")
    except OSError as error:
        raise UserError(
            f"cannot write --output={output} ({error.strerror or error}): choose another file"
        ) from error
    return f"  {len(pictures)} pictures with captions are in {output}"
