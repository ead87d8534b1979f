"""Writes image-caption records the way img2dataset does: sharded TFRecord files of tf.Examples.

TensorFlow is imported by the functions that need it: the processes that only render and encode
images would otherwise spend seconds on an import that they never use.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

Features = Mapping[str, bytes | int | str]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One finished file of records.

    Attributes:
      file: the file's name within its directory.
      records: how many records it holds.
      bytes: the file's size.
      sha256: hexadecimal digest of the whole file.
    """

    file: str
    records: int
    bytes: int
    sha256: str


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encodes an image as JPEG of quality 95.

    Args:
      image: uint8 [height, width, 3], RGB.

    Returns:
      The JPEG file's bytes.
    """
    buffer = io.BytesIO()
    # Halving the chroma planes, the default, smears the colours of images this small.
    Image.fromarray(image).save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def image_features(
    key: str, image: np.ndarray, caption: str, labels: Mapping[str, int] | None = None
) -> dict[str, bytes | int | str]:
    """Lays an image, its caption and its labels out under img2dataset's feature names.

    Args:
      key: the record's name, unique within its split.
      image: uint8 [height, width, 3], RGB.
      caption: the caption.
      labels: further integer features, by name.

    Returns:
      `key`, `jpg`, `txt`, `width`, `height` (pixels) and the labels, ready for `serialize`.
    """
    height, width, _ = image.shape
    return {
        "key": key,
        "jpg": encode_jpeg(image),
        "txt": caption,
        "width": width,
        "height": height,
        **(labels or {}),
    }


def serialize(features: Features) -> bytes:
    """Serialises features as a tf.train.Example: equal features give equal bytes.

    Args:
      features: bytes and text (as UTF-8) become bytes features, integers int64 features, each
        of one value.

    Returns:
      The serialised Example.
    """
    import tensorflow as tf

    example = tf.train.Example()
    for name, value in features.items():
        feature = example.features.feature[name]
        if isinstance(value, int):
            feature.int64_list.value.append(value)
        else:
            data = value.encode("utf-8") if isinstance(value, str) else value
            feature.bytes_list.value.append(data)
    # The features are a protobuf map, whose order is otherwise unspecified.
    return example.SerializeToString(deterministic=True)


def write_shards(
    directory: str | os.PathLike[str], records: Iterable[bytes], num_shards: int
) -> list[Shard]:
    """Deals records out over TFRecord files `00000.tfrecord`, `00001.tfrecord`, ... in turn.

    Dealing in turn needs no count beforehand and leaves the shards of equal length to within one
    record. A shard that would stay empty is not written.

    Args:
      directory: where the files go; created if missing.
      records: serialised records.
      num_shards: the number of files, at least 1.

    Returns:
      The shards written, in the order of their names.
    """
    import tensorflow as tf

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths, writers, counts = [], [], []
    with contextlib.ExitStack() as stack:
        for record, shard in zip(records, itertools.cycle(range(num_shards)), strict=False):
            if shard == len(writers):
                paths.append(directory / f"{shard:05d}.tfrecord")
                writers.append(stack.enter_context(tf.io.TFRecordWriter(str(paths[-1]))))
                counts.append(0)
            writers[shard].write(record)
            counts[shard] += 1
    return [
        Shard(file=path.name, records=count, bytes=path.stat().st_size, sha256=sha256(path))
        for path, count in zip(paths, counts, strict=True)
    ]


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
