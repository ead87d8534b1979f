"""The same few samples in every format that records come in."""

import csv
import io
import json
import pathlib
import tarfile

import numpy as np
import tensorflow as tf
import tiny_records
from array_record.python import array_record_module

from clipa_t5x.data import record_writer, sources

COUNT = 13
FORMATS = ("tfrecord", "tar", "array_record", "csv", "tsv", "parquet", "paths.parquet", "folder")


def image(i: int) -> bytes:
    """The JPEG of sample i."""
    return record_writer.image_features(f"{i:05d}", tiny_records.picture(i), "", {})["jpg"]


def caption(i: int) -> str:
    """A caption that strains formats: quotes, delimiters, a newline, letters beyond ASCII."""
    return (
        tiny_records.caption(i),
        f'a "{i}", quoted; with\ttab',
        f"one line\nand another, {i}",
        f"Größe {i} — 東京",
    )[i % 4]


def label(i: int) -> int:
    """Labels that class folders have, too: in order."""
    return i // 5


def write(root: pathlib.Path, kind: str, count: int = COUNT) -> str:
    """Writes the samples as the split 'train' of one shard under `root`; returns `root`."""
    folder = root / "train"
    folder.mkdir(parents=True, exist_ok=True)
    _WRITERS[kind](folder, range(count))
    return str(root)


def examples(numbers) -> list[bytes]:
    """Serialised tf.train.Examples."""
    return [
        record_writer.serialize({"key": f"{i:05d}", "jpg": image(i), "txt": caption(i),
                                 "label": label(i)})
        for i in numbers
    ]  # fmt: skip


def _tfrecord(folder, numbers):
    with tf.io.TFRecordWriter(str(folder / "00000.tfrecord")) as writer:
        for example in examples(numbers):
            writer.write(example)


def _array_record(folder, numbers):
    writer = array_record_module.ArrayRecordWriter(
        str(folder / "00000.array_record"), "group_size:1"
    )
    for example in examples(numbers):
        writer.write(example)
    writer.close()


def add_member(tar: tarfile.TarFile, name: str, data: bytes, **attributes) -> None:
    """A file of an archive."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def _tar(folder, numbers):
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in numbers:
            add_member(tar, f"{i:05d}.jpg", image(i))
            add_member(tar, f"{i:05d}.txt", caption(i).encode())
            add_member(tar, f"{i:05d}.cls", str(label(i)).encode())
            facts = {"caption": caption(i), "label": label(i)}
            add_member(tar, f"{i:05d}.json", json.dumps(facts).encode())


def _images(folder, numbers):
    """Files of images beside a table; their paths relative to it."""
    (folder / "images").mkdir()
    paths = [f"images/{i:05d}.jpg" for i in numbers]
    for i, path in zip(numbers, paths, strict=True):
        (folder / path).write_bytes(image(i))
    return paths


def _csv(folder, numbers, name="table.csv", delimiter=","):
    with open(folder / name, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, delimiter=delimiter)
        writer.writerow(["image", "txt", "label"])
        for i, path in zip(numbers, _images(folder, numbers), strict=True):
            writer.writerow([path, caption(i), label(i)])


def _tsv(folder, numbers):
    _csv(folder, numbers, "table.tsv", "\t")


def write_parquet(path, columns, row_group_size=4) -> None:
    """A parquet file of columns by name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def _texts(numbers):
    return {"txt": [caption(i) for i in numbers], "label": [label(i) for i in numbers]}


def _parquet(folder, numbers):
    cells = [{"bytes": image(i), "path": f"{i:05d}.jpg"} for i in numbers]
    write_parquet(folder / "0.parquet", {"image": cells, **_texts(numbers)})


def _paths_parquet(folder, numbers):
    write_parquet(folder / "0.parquet", {"filepath": _images(folder, numbers), **_texts(numbers)})


def _folder(folder, numbers):
    for i in numbers:
        place = folder / f"class_{label(i)}"
        place.mkdir(exist_ok=True)
        (place / f"{i:05d}.jpg").write_bytes(image(i))
        (place / f"{i:05d}.txt").write_text(caption(i), encoding="utf-8")


_WRITERS = {
    "tfrecord": _tfrecord,
    "tar": _tar,
    "array_record": _array_record,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
    "paths.parquet": _paths_parquet,
    "folder": _folder,
}


def source(data_dir, kind: str, shard_format=None, **kwargs) -> sources.ImageTextSource:
    """A source of images, captions and labels over what `write` wrote."""
    label_key = "cls" if kind == "tar" else "label"
    fields = sources.RecordFields("jpg", {"txt": 1.0}, label_key)
    return sources.ImageTextSource(str(data_dir), shard_format, fields, **kwargs)


def read(source: sources.ImageTextSource, indices=range(COUNT), **kwargs) -> dict:
    """Examples of the split 'train', unshuffled unless told."""
    kwargs = {"shuffle": False, "seed": 0, **kwargs}
    return source.examples_at("train", np.asarray(indices, np.int64), **kwargs)


def records(shard_format, path) -> list:
    """All records of one shard, and errors where they are damaged."""
    from clipa_t5x.data import shard_formats

    with shard_format.open(str(path)) as shard:
        return list(shard_formats.iterate(shard, shard_format.scan(str(path)).rows))
