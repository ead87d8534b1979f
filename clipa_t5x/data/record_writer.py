"""Writes image-caption records the way img2dataset does: sharded files of tf.train.Examples.

TensorFlow is not needed: the many processes that write would spend seconds on importing it.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import pathlib
import struct
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from clipa_t5x.data.tfrecords import masked_crc32c

Value = bytes | int | str
Features = Mapping[str, Value | Sequence[Value]]
# Numbers of the fields of tf.train.Feature.
_BYTES_LIST, _INT64_LIST = 1, 3


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
      features: bytes and text (as UTF-8) become bytes features, integers int64 features; several
        values of a kind come as a list.

    Returns:
      The serialised Example.
    """
    entries = []
    # The features are a protobuf map, whose order is otherwise unspecified.
    for name in sorted(features, key=str.encode):
        value = features[name]
        values = [value] if isinstance(value, bytes | int | str) else value
        if values and isinstance(values[0], int):
            numbers = b"".join(_varint(int(number)) for number in values)
            feature = _field(_INT64_LIST, _field(1, numbers))
        else:
            texts = [v.encode() if isinstance(v, str) else v for v in values]
            feature = _field(_BYTES_LIST, b"".join(_field(1, text) for text in texts))  # pyright: ignore
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def _varint(number: int) -> bytes:
    """Protobuf's integers: seven bits a byte, the lowest first; negative ones are of 64 bits."""
    number &= 2**64 - 1
    result = bytearray()
    while number > 127:
        result.append(number & 127 | 128)
        number >>= 7
    result.append(number)
    return bytes(result)


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes, text or another message."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


class TFRecordFile:
    """A TFRecord file that is being written. Raises OSError where the disk refuses."""

    def __init__(self, path: str):
        self._file = open(path, "wb")  # noqa: SIM115  `close` closes it

    def write(self, record: bytes) -> None:
        """Appends a record."""
        length = struct.pack("<Q", len(record))
        checksums = (struct.pack("<I", masked_crc32c(data)) for data in (length, record))
        self._file.write(b"".join((length, next(checksums), record, next(checksums))))

    def close(self) -> None:
        """Has the file on the disk when it returns; once more does nothing."""
        if not self._file.closed:
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())


class ArrayRecordFile:
    """An ArrayRecord file that is being written. Raises OSError where the disk refuses.

    Every record can be reached by itself, and is stored as it is: images are compressed already.
    """

    def __init__(self, path: str):
        from array_record.python import array_record_module  # pyright: ignore

        self._path = path
        # One thread: the file's bytes are the same with several, and so is the speed.
        options = "group_size:1,uncompressed,max_parallelism:1"
        try:
            self._writer = array_record_module.ArrayRecordWriter(path, options)
            # What could not be opened is told by the first write otherwise.
            if not self._writer.ok():
                self._writer.close()
        except RuntimeError as error:
            raise OSError(str(error)) from error

    def write(self, record: bytes) -> None:
        """Appends a record."""
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        """Has the file on the disk when it returns; once more does nothing."""
        if not self._writer.is_open():
            return
        try:
            self._writer.close()
        except RuntimeError as error:
            raise OSError(str(error)) from error
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())


# By the name of the format, which is the suffix of its files.
FILES = {"array_record": ArrayRecordFile, "tfrecord": TFRecordFile}


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
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths, writers, counts = [], [], []
    with contextlib.ExitStack() as stack:
        for record, shard in zip(records, itertools.cycle(range(num_shards)), strict=False):
            if shard == len(writers):
                paths.append(directory / f"{shard:05d}.tfrecord")
                writers.append(
                    stack.enter_context(contextlib.closing(TFRecordFile(str(paths[-1]))))
                )
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
