"""Which format shards have, by their names, where the user does not say."""

import os
import re
from collections.abc import Mapping, Sequence

from clipa_t5x.data import (
    array_records,
    image_folders,
    image_tables,
    parquet_tables,
    tfrecords,
    webdataset,
)
from clipa_t5x.data.shard_formats import ShardFormat
from clipa_t5x.data.shard_reader import is_local
from clipa_t5x.errors import UserError

# Names as TFDS writes them, too: 'set-train.tfrecord-00000-of-00008'.
_RECORDS = {
    "TFRecord": re.compile(r"\.tfrecords?\b[^/]*$"),
    "WebDataset": re.compile(r"\.tar$"),
    "ArrayRecord": re.compile(r"\.array_record\b[^/]*$"),
}
_TABLES = {
    "CSV": re.compile(r"\.csv$"),
    "TSV": re.compile(r"\.tsv$"),
    "Parquet": re.compile(r"\.parquet$"),
}
_MAKE = {
    "TFRecord": tfrecords.TFRecord,
    "WebDataset": webdataset.WebDataset,
    "ArrayRecord": array_records.ArrayRecord,
    "CSV": image_tables.CSV,
    "TSV": lambda: image_tables.CSV(delimiter="\t"),
    "Parquet": parquet_tables.Parquet,
}
_NO_FOLDERS = (".txt", ".json")


def by_path(path: str) -> ShardFormat:
    """The format of a shard by its name, or of a folder that holds images.

    Raises:
      UserError: the name is of none.
    """
    _, shard_format = resolve([path.rstrip("/")], None)
    if shard_format is None:
        endings = ".tfrecord, .tar, .array_record, .csv, .tsv, .parquet, or a folder of images"
        raise UserError(
            f"{path} is of no known format ({endings}): rename it, or set shard_format, such as "
            "@tfrecords.TFRecord()."
        )
    return shard_format


def patterns(shard_format: ShardFormat | None) -> Mapping[str, str]:
    """Glob patterns of the usual splits: a format's, or those of any."""
    if shard_format is not None:
        return shard_format.patterns
    return {"train": "train/*", "validation": "validation/*"}


def resolve(
    paths: Sequence[str], shard_format: ShardFormat | None
) -> tuple[list[str], ShardFormat | None]:
    """Which of the files that a pattern matches are shards, and of which format.

    Tools write tables of what is in their shards, and tables lie among the images they name. So
    records go before tables, and tables before images; files of no known kind are passed over.

    Args:
      paths: files and folders.
      shard_format: what they are; None to go by their names.

    Returns:
      (shards, format); ([], None) where there are none.

    Raises:
      UserError: they are of two formats, and neither goes before the other.
    """
    if isinstance(shard_format, image_folders.ImageFolder):
        return [folder for path in paths for folder in image_folders.folders(path)], shard_format
    if shard_format is not None:
        return list(paths), shard_format
    for kinds in (_RECORDS, _TABLES):
        found = {name: [p for p in paths if sign.search(p)] for name, sign in kinds.items()}
        found = {name: shards for name, shards in found.items() if shards}
        if len(found) > 1:
            examples = " and ".join(f"{shards[0]} ({name})" for name, shards in found.items())
            raise UserError(
                f"shards of several formats match one pattern: {examples}. Set DATA_SPLITS to "
                "patterns that match those of one, or shard_format."
            )
        for name, shards in found.items():
            return shards, _MAKE[name]()
    folders = _image_folders(paths)
    return (folders, image_folders.ImageFolder()) if folders else ([], None)


def _image_folders(paths: Sequence[str]) -> list[str]:
    """Folders of the images among paths, and those below the folders among them; sorted."""
    found = {os.path.dirname(path) for path in paths if image_folders.is_image(path)}
    for path in paths:
        if not path.endswith((*image_folders.SUFFIXES, *_NO_FOLDERS)) and _is_folder(path):
            found.update(image_folders.folders(path))
    return sorted(found)


def _is_folder(path: str) -> bool:
    if is_local(path):
        return os.path.isdir(path)
    import tensorflow as tf

    return tf.io.gfile.isdir(path)
