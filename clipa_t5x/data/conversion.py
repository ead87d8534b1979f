"""Converts image-text records of any format into shards that are quick to read at any position.

    <output_dir>/<split>/00000.array_record    tf.Examples under img2dataset's names
    <output_dir>/.record_index/<split>.*       where each record is, see `record_index`
    <output_dir>/manifest.json                 arguments, counts, sizes, checksums, bad records

Input shards stand in the order of their names, and their records are numbered through; output
shard i is made of the records [i * n, (i + 1) * n), less the bad ones. So every output shard is a
function of the input and the arguments alone, whichever process writes it and whenever: any number
of workers leaves the same bytes, and so does a conversion that was killed and started again. What
is finished is kept in a journal, see `conversion_journal`, until the manifest takes its place.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import numpy as np
import tensorflow as tf

from clipa_t5x.data import (
    conversion_journal,
    conversion_workers,
    formats,
    manifests,
    record_index,
    record_statistics,
    shard_conversion,
    shard_formats,
)
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.data.progress import Progress
from clipa_t5x.errors import UserError

_RECORDS_TO_LOOK_AT = 32


def find_shards(
    source: str, pattern: str | None, split: str
) -> tuple[list[str], shard_formats.ShardFormat]:
    """Paths of the input's shards, sorted, and their format.

    Args:
      source: a folder, or a single file.
      pattern: glob pattern under the folder; None takes the files of a known format in the folder
        itself or else in its folder `split`.
      split: name of the split.

    Raises:
      UserError: there are none, or they are of no or several formats.
    """
    if pattern is None and not tf.io.gfile.isdir(source):
        tried = source
        shards, shard_format = formats.resolve(sorted(tf.io.gfile.glob(tried)), None)
    elif pattern is not None:
        tried = os.path.join(source, pattern)
        shards, shard_format = formats.resolve(sorted(tf.io.gfile.glob(tried)), None)
    else:
        tried = f"{os.path.join(source, '*')} and {os.path.join(source, split, '*')}"
        shards, shard_format = shards_in(source)
        if shard_format is None:
            shards, shard_format = shards_in(os.path.join(source, split))
    if shard_format is None:
        there = sorted(tf.io.gfile.listdir(source)) if tf.io.gfile.isdir(source) else []
        more = " and more" if len(there) > 5 else ""
        holds = f"holds {', '.join(there[:5])}{more}" if there else "does not exist or is empty"
        raise UserError(
            f"no shards match {tried}: {source} {holds}. Set "
            "--source to the folder of the shards and --pattern to a glob pattern under it."
        )
    return shards, shard_format


def shards_in(folder: str) -> tuple[list[str], shard_formats.ShardFormat | None]:
    """The shards among the files of a folder, and their format; ([], None) where there are none.

    Raises:
      UserError: they are of several formats.
    """
    if not tf.io.gfile.isdir(folder):
        return [], None
    names = sorted(tf.io.gfile.listdir(folder))
    # Folders within are no images of this one: a data set's splits, indices.
    paths = [os.path.join(folder, name) for name in names if not name.endswith("/")]
    return formats.resolve([path for path in paths if not tf.io.gfile.isdir(path)], None)


def convert(
    source: str,
    output_dir: str,
    *,
    pattern: str | None = None,
    split: str = "train",
    options: shard_conversion.Options | None = None,
    records_per_shard: int = 10_000,
    num_workers: int = 1,
    overwrite: bool = False,
    progress_stream: TextIO | None = None,
) -> dict[str, Any] | None:
    """Converts a split, or goes on converting it.

    Args:
      source: folder of the shards, or a single file; local or remote.
      output_dir: a local folder, which may hold other converted splits.
      pattern: of the shards under the folder, see `find_shards`.
      split: name of what is written.
      options: what becomes of a record.
      records_per_shard: records of the input that go into a shard.
      num_workers: processes; 0 works in this one.
      overwrite: begin anew where the split was converted otherwise.
      progress_stream: where to report progress; standard error if None.

    Returns:
      The split's part of the manifest; None if it is there already.

    Raises:
      UserError: there is no input, the output's place is taken, or the disk is full.
    """
    options = options or shard_conversion.Options()
    shards, shard_format = find_shards(source, pattern, split)
    arguments = {
        "source": source,
        "pattern": pattern,
        "image_key": options.image_key,
        "caption_key": list(options.caption_keys),
        "label_key": options.label_key,
        "short_side": options.short_side,
        "quality": options.quality,
        "output_format": options.output_format,
        "records_per_shard": records_per_shard,
        "input": _digest(shards),
        "version": conversion_journal.CONVERSION_VERSION,
    }
    place = conversion_journal.SplitFolder(output_dir, split)
    with place.reserved():
        if place.prepare(arguments, overwrite):
            return None
        index = record_index.load(shards, str(place.journal / "input"), shard_format)
        manifests.check(source, index)
        _check_fields(index, options)
        tasks = _tasks(index, place.folder, records_per_shard, options)
        _work(place, tasks, num_workers, progress_stream or sys.stderr)
        facts = _facts(place, arguments, index, len(tasks))
        _index(place, facts)
        place.finish(facts)
    return facts


def _digest(shards: Sequence[str]) -> str:
    """Of the shards' names and sizes: another input does not go on where this one was."""
    stats = [tf.io.gfile.stat(path) for path in shards]
    # A folder's own size says nothing; its time changes with the names within.
    sizes = [
        [os.path.basename(path), stat.mtime_nsec if stat.is_directory else stat.length]
        for path, stat in zip(shards, stats, strict=True)
    ]
    return f"{len(shards)} shards {hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]}"


def _check_fields(index: record_index.RecordIndex, options: shard_conversion.Options) -> None:
    """Refuses field names that none of the first records has."""
    if not len(index):
        problem = next(iter(index.problems.items()), (index.shards[0], "has no records"))
        raise UserError(f"the input holds no record ({' '.join(problem)}): check --source")
    first = index.read(np.arange(min(len(index), _RECORDS_TO_LOOK_AT)))
    present = [record for record in first if not isinstance(record, BadRecord)]
    wanted = {"image_key": [options.image_key], "caption_key": options.caption_keys}
    wanted["label_key"] = [options.label_key] if options.label_key else []
    for flag, names in wanted.items():
        for name in names:
            if present and not any(r.get(n) for r in present for n in name.split(";")):
                raise UserError(
                    f"the records of {index.shards[0]} have no field {name!r}; their fields are "
                    f"{', '.join(shard_formats.field_names(present))}: set --{flag} to one of them"
                )


def _tasks(
    index: record_index.RecordIndex,
    folder: pathlib.Path,
    records_per_shard: int,
    options: shard_conversion.Options,
) -> list[shard_conversion.ShardTask]:
    starts = range(0, len(index), records_per_shard)
    digits = max(5, len(str(len(starts) - 1)))
    tasks = []
    for number, start in enumerate(starts):
        name = f"{number:0{digits}d}.{options.output_format}"
        parts = _parts(index, start, min(start + records_per_shard, len(index)))
        tasks.append(
            shard_conversion.ShardTask(
                str(folder / name), start, parts, index.shard_format, options
            )
        )
    return tasks


def _parts(index: record_index.RecordIndex, start: int, end: int) -> list[shard_conversion.Part]:
    """The records [start, end) of the input, by shard."""
    parts = []
    while start < end:
        shard = int(np.searchsorted(index.ends, start, side="right"))
        first = int(index.ends[shard - 1]) if shard else 0
        stop = min(end, int(index.ends[shard]))
        parts.append(
            shard_conversion.Part(index.shards[shard], start - first, index.rows[start:stop])
        )
        start = stop
    return parts


def _work(
    place: conversion_journal.SplitFolder,
    tasks: Sequence[shard_conversion.ShardTask],
    num_workers: int,
    stream: TextIO,
) -> None:
    """Writes all shards that the journal does not have."""
    todo = {number: task for number, task in enumerate(tasks) if place.done(number) is None}
    total = sum(len(part.rows) for task in todo.values() for part in task.parts)
    progress = Progress(total, stream)
    if len(todo) < len(tasks) and todo:
        stream.write(f"going on: {len(tasks) - len(todo)} of {len(tasks)} shards are finished\n")
    with contextlib.closing(conversion_workers.run(todo, num_workers, progress.count)) as results:
        for number, facts in results:
            place.keep(number, facts)


def _index(place: conversion_journal.SplitFolder, facts: Mapping[str, Any]) -> None:
    """Writes the record index where the data source looks for it."""
    shards = [str(place.folder / shard["file"]) for shard in facts["shards"]]
    kept = str(place.output_dir / ".record_index" / place.split)
    record_index.load(shards, kept, formats.by_path(shards[0]))


def _facts(
    place: conversion_journal.SplitFolder,
    arguments: Mapping[str, Any],
    index: record_index.RecordIndex,
    num_tasks: int,
) -> dict[str, Any]:
    """The split's part of the manifest, from the journal."""
    bad: dict[str, int] = {}
    mended: dict[str, int] = {}
    examples: list[Sequence[str]] = []
    statistics, shards = record_statistics.RecordStatistics(), []
    for number in range(num_tasks):
        facts = place.done(number)
        assert facts is not None, f"shard {number} was just written"
        for counts, more in ((bad, facts["bad"]), (mended, facts["mended"])):
            for reason, count in more.items():
                counts[reason] = counts.get(reason, 0) + count
        examples += facts["examples"]
        statistics.add_json(facts["statistics"])
        if facts["file"] is not None:
            shards.append({name: facts[name] for name in ("file", "records", "bytes", "sha256")})
    if not shards:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(bad.items()))
        raise UserError(
            f"all {len(index)} records of the input are bad ({reasons}; the first: "
            f"{examples[0][1]}): check --image_key and --caption_key, or mend the input"
        )
    return {
        "arguments": dict(arguments),
        "records": sum(shard["records"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "input_records": len(index),
        "bad": dict(sorted(bad.items())),
        "mended": dict(sorted(mended.items())),
        "bad_examples": shard_conversion.bounded(iter(examples)),
        "damaged_inputs": dict(sorted(index.problems.items())[:100]),
        **statistics.summary(),
        "shards": shards,
    }


def describe(facts: Mapping[str, Any] | None, output_dir: str, split: str) -> str:
    """What `convert` did, in a line or two."""
    folder = os.path.join(output_dir, split)
    if facts is None:
        return f"{folder} already holds this split: nothing to do"
    left_out = sum(facts["bad"].values())
    lines = [
        f"{folder} is ready: {facts['records']} records in {len(facts['shards'])} shards, "
        f"{facts['bytes'] / 1e6:.1f} MB"
    ]
    if left_out:
        reasons = ", ".join(f"{reason} {count}" for reason, count in facts["bad"].items())
        lines.append(
            f"left out {left_out} of {facts['input_records']} records ({reasons}); "
            f"{manifests.FILE} names some"
        )
    if facts["damaged_inputs"]:
        path, problem = next(iter(facts["damaged_inputs"].items()))
        lines.append(f"{len(facts['damaged_inputs'])} input shards are damaged, {path} {problem}")
    return "\n".join(lines)
