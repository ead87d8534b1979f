"""Folders of image files, with captions beside them or classes for sub-folders' names.

    train/0001.jpg, train/0001.txt     a caption in the file of the same stem
    train/<class>/0001.jpg             the label is the place of the class among the sorted folders

Every folder that holds images is a shard. Its index holds the names themselves, 256 bytes each, so
that nothing has to be listed again, and memory does not grow with their number. A file that comes
or goes changes its folder's time, and the index is made anew.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.data.image_tables import read_image
from clipa_t5x.data.shard_formats import Fields, Scan
from clipa_t5x.data.shard_reader import BlockCache, is_local

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".avif", ".jp2"),
)
_CAPTION_SUFFIX = ".txt"
# File systems allow 255.
_NAME_BYTES = 256
_NAME_COLUMNS = _NAME_BYTES // 8


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(SUFFIXES) and not os.path.basename(name).startswith(".")


def _gfile() -> Any:
    import tensorflow as tf

    return tf.io.gfile


def folders(root: str) -> list[str]:
    """Folders that hold images: `root` and all below it but hidden ones, sorted."""
    found = []
    for path, names, files in os.walk(root) if is_local(root) else _gfile().walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        if any(map(is_image, files)):
            found.append(path.rstrip("/"))
    return sorted(found)


def class_names(parent: str) -> list[str]:
    """Names of the folders in a folder, sorted: a class's place is its images' label."""
    # By its time as well, so that thousands of classes are listed once, and a new one is seen.
    return _folders_in(parent, os.stat(parent).st_mtime_ns if is_local(parent) else 0)


@functools.lru_cache(maxsize=8)
def _folders_in(parent: str, time: int) -> list[str]:
    del time
    if is_local(parent):
        with os.scandir(parent) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    else:
        names = [name.rstrip("/") for name in _gfile().listdir(parent)
                 if _gfile().isdir(os.path.join(parent, name))]  # fmt: skip
    return sorted(name for name in names if not name.startswith("."))


def num_classes(paths: Sequence[str]) -> int | None:
    """How many classes the labels of these folders' images tell apart.

    Folders without images count, too; None where the folders lie in several, each of which has
    labels of its own.
    """
    parents = {_parent_and_name(path)[0] for path in paths}
    return len(class_names(parents.pop())) if len(parents) == 1 else None


def _parent_and_name(path: str) -> tuple[str, str]:
    return os.path.split(os.path.abspath(path) if is_local(path) else path.rstrip("/"))


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Folders of images; rows of the index are (32 columns of the name's bytes, label).

    Fields are 'jpg', whatever the image's type; 'txt', where there is such a file; 'label' and
    'class', number and name of the folder among its neighbours; '__key__', the image's name.
    """

    name: str = "image_folder"
    version: int = 1
    columns: int = _NAME_COLUMNS + 1

    @property
    def patterns(self) -> Mapping[str, str]:
        """A folder a split."""
        return {"train": "train", "validation": "validation"}

    def scan(self, path: str) -> Scan:
        """Lists the images of one folder, sorted by name."""
        names = os.listdir(path) if is_local(path) else _gfile().listdir(path)
        encoded = sorted(os.fsencode(name) for name in names if is_image(name))
        short = [name for name in encoded if len(name) < _NAME_BYTES]
        problem = ""
        if len(short) < len(encoded):
            problem = f"holds {len(encoded) - len(short)} names of {_NAME_BYTES} bytes or more"
        rows = np.zeros((len(short), self.columns), np.int64)
        packed = np.asarray(short, f"S{_NAME_BYTES}")
        rows[:, :_NAME_COLUMNS] = packed.view(np.int64).reshape(-1, _NAME_COLUMNS)
        parent, own = _parent_and_name(path)
        neighbours = class_names(parent)
        # A root of images without classes may be hidden, and so no neighbour of its own.
        rows[:, -1] = neighbours.index(own) if own in neighbours else 0
        return Scan(rows, problem)

    @contextmanager
    def open(self, path: str, cache: BlockCache | None = None) -> Iterator["_OpenFolder"]:
        """Opens nothing: images are files of their own."""
        del cache
        yield _OpenFolder(path.rstrip("/"))


@dataclasses.dataclass(frozen=True)
class _OpenFolder:
    """A folder, by its path."""

    path: str

    def read(self, row: np.ndarray) -> Fields:
        encoded = np.ascontiguousarray(row[:_NAME_COLUMNS]).tobytes().rstrip(b"\0")
        name = os.fsdecode(encoded)
        fields: dict[str, list[bytes | int]] = {
            "jpg": [read_image(f"{self.path}/", name)],
            "label": [int(row[-1])],
            "class": [os.path.basename(self.path).encode()],
            "__key__": [encoded],
        }
        try:
            caption = read_image(f"{self.path}/", os.path.splitext(name)[0] + _CAPTION_SUFFIX)
            fields["txt"] = [caption.strip()]
        except BadRecord:
            pass  # A picture without a text: whether that is bad is for the task to say.
        return fields
