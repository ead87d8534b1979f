"""SeqIO data sources of image-text records that can be read at any position."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import seqio
import tensorflow as tf

from clipa_t5x.data import (
    bad_records,
    captions,
    formats,
    image_files,
    image_folders,
    labels,
    manifests,
    record_index,
    sample_order,
    shard_formats,
    shard_reader,
)
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.errors import UserError

# Enough to tell a misspelt field from one that some records lack, as captions may be lacking.
_RECORDS_TO_LOOK_AT = 32
# Another record is drawn for a bad one, and for that one if it is bad, so many times.
MAX_ATTEMPTS = 20
DEFAULT_WINDOW_BYTES = 2**30

# What an example may be: dtype and shape without the batch dimension.
EXAMPLE_SPEC = {
    "encoded_image": (tf.string, ()),
    "image_size": (tf.int32, (2,)),
    "caption": (tf.string, ()),
    "label": (tf.int32, ()),
    "labels": (tf.int32, (labels.MAX_LABELS,)),
    "valid": (tf.bool, ()),
    "index": (tf.int64, ()),
    "seed": (tf.int64, (2,)),
}


@runtime_checkable
class PositionalSource(Protocol):
    """A data source that can be read at any position: what a run resumes at its step on."""

    records: bad_records.BadRecords

    def feature_names(self) -> Sequence[str]:
        """Those of `EXAMPLE_SPEC` that its examples have."""
        ...

    def num_input_examples(self, split: str) -> int:
        """Number of records in a split."""
        ...

    def num_classes(self, split: str) -> int | None:
        """How many classes a split's labels tell apart, where the data say so."""
        ...

    def examples_at(
        self,
        split: str,
        indices: np.ndarray,
        *,
        shuffle: bool,
        seed: int,
        replace_bad: bool = True,
        attempt: int = 0,
    ) -> dict[str, np.ndarray]:
        """The examples at global indices of the endless sequence of epochs."""
        ...

    def identity(self, split: str) -> dict[str, Any]:
        """What the order depends on beside the seed: names and values for people and JSON."""
        ...

    def where(self, split: str, index: int, *, shuffle: bool, seed: int, attempt: int = 0) -> str:
        """The shard and the number in it of a sample's record, for people."""
        ...


@dataclasses.dataclass(frozen=True)
class RecordFields:
    """Which of a record's fields are what.

    Attributes:
      image: name of the encoded image's field; of several by ';' the first that a record has.
      captions: names of caption fields, with how likely each is taken; empty for no captions.
      label: name of the label's field, an integer, or None.
      labels: name of the field with any number of labels, or None.
      max_captions: None for one caption an image, chosen by the rates; or how many of an image's
        captions are taken at most, the first ones.
      max_pixels: height times width above which an image is refused undecoded.
    """

    image: str = "jpg"
    captions: Mapping[str, float] = dataclasses.field(default_factory=dict)
    label: str | None = None
    labels: str | None = None
    max_captions: int | None = None
    max_pixels: int = image_files.MAX_PIXELS

    def all_names(self) -> list[str]:
        """Every name, alternatives together."""
        return [self.image, *self.captions, *filter(None, (self.label, self.labels))]


class ImageTextSource(seqio.DataSource):
    """Shards of image-text records, one glob pattern a split.

    Nothing is read before the first record or count is asked for. 'seed' (int64 [2]) of an example
    is what random preprocessing of this very sample draws from, whichever host does it.
    """

    def __init__(
        self,
        data_dir: str,
        shard_format: shard_formats.ShardFormat | None,
        fields: RecordFields,
        splits: Mapping[str, str] | None = None,
        index_dir: str | None = None,
        window_bytes: int = DEFAULT_WINDOW_BYTES,
    ):
        """Describes the data; touches no file.

        Args:
          data_dir: folder of the data set, local, gs:// or whatever tf.io.gfile reads.
          shard_format: how records lie in files; None for what the files' names say.
          fields: which fields are read.
          splits: split name -> glob pattern under `data_dir`; default: the format's usual ones.
          index_dir: where to keep the record index; the default is a folder in `data_dir`.
          window_bytes: size of the shuffle window, in bytes of records as stored; also the most
            that is kept of remote shards, twice.
        """
        self._data_dir = data_dir
        self._format, self._fields = shard_format, fields
        self._patterns = dict(splits or formats.patterns(shard_format))
        self._index_dir = index_dir or os.path.join(data_dir, ".record_index")
        self._has_own_index_dir = index_dir is None
        self._window_bytes = window_bytes
        self._cache = shard_reader.BlockCache(2 * window_bytes)
        self._lock = threading.Lock()
        self._indices: dict[str, record_index.RecordIndex] = {}
        self.records = bad_records.BadRecords()
        super().__init__(
            splits=tuple(self._patterns), caching_permitted=False, performs_internal_shuffling=True
        )

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Every record can be reached: any number of hosts can share any number of shards."""
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        """Paths of the split's shards, sorted by name.

        Raises:
          UserError: the split is unknown, or no file matches its pattern, or files of several
            formats do.
        """
        return self._shards(split)[0]

    def _shards(self, split: str) -> tuple[Sequence[str], shard_formats.ShardFormat]:
        if split not in self._patterns:
            raise UserError(
                f"split {split!r} is not one of {sorted(self._patterns)} of the data set at "
                f"{self._data_dir}: name one of them, or give the source a pattern for it."
            )
        pattern = os.path.join(self._data_dir, self._patterns[split])
        found = sorted(tf.io.gfile.glob(pattern))
        shards, shard_format = formats.resolve(found, self._format)
        if not shards or shard_format is None:
            known = " of a known format" if found else ""
            raise UserError(
                f"data set directory {self._data_dir} {_what_is_there(self._data_dir)}: no file"
                f"{known} matches {pattern}. Set the task's data_dir (DATA_DIR, or an evaluation's "
                "own, such as COCO_DIR) to where the shards are and its splits (DATA_SPLITS) to "
                "their patterns, or write them (python -m clipa_t5x.data.build)."
            )
        return shards, shard_format

    def index(self, split: str) -> record_index.RecordIndex:
        """The record index of a split, built at the first call; safe among threads.

        Raises:
          UserError: no shard holds a record, one is of another format or is not what the data set's
            manifest says, or records lack the fields asked for.
        """
        with self._lock:
            if split not in self._indices:
                self._indices[split] = self._load_index(split)
            return self._indices[split]

    def _load_index(self, split: str) -> record_index.RecordIndex:
        shards, shard_format = self._shards(split)
        index_path = os.path.join(self._index_dir, self._index_name(split))
        index = record_index.load(shards, index_path, shard_format)
        if not len(index):
            problem = next(iter(index.problems.items()), (shards[0], "has no records"))
            raise UserError(
                f"the {len(shards)} shards of split {split!r} at {self._data_dir} hold no record "
                f"({' '.join(problem)}): remove them, or write the data set again."
            )
        manifests.check(self._data_dir, index)
        for shard, problem in index.problems.items():
            self.records.add(BadRecord("damaged shard", problem), shard)
        self._check_fields(index)
        return index

    def _index_name(self, split: str) -> str:
        """Of a split's index in its folder, which several data sets may share."""
        name = split.replace("/", "_")
        if self._has_own_index_dir:
            return name
        shards = os.path.join(os.path.abspath(self._data_dir), self._patterns[split])
        return f"{name}-{hashlib.sha256(shards.encode()).hexdigest()[:8]}"

    def _check_fields(self, index: record_index.RecordIndex) -> None:
        """Refuses field names that none of the first records has: training would read nothing."""
        first = index.read(np.arange(min(len(index), _RECORDS_TO_LOOK_AT)))
        present = [record for record in first if not isinstance(record, BadRecord)]
        for name in self._fields.all_names():
            if any(shard_formats.has(record, n) for record in present for n in name.split(";")):
                continue
            if not present and isinstance(first[0], BadRecord):
                raise UserError(f"the first records of {index.shards[0]} are damaged: {first[0]}.")
            raise UserError(
                f"the records of {index.shards[0]} have no field {name!r}; their fields are "
                f"{', '.join(shard_formats.field_names(present)) or 'none'}: set the "
                "task's image_key, caption_key or label_key (IMAGE_KEY, CAPTION_KEY, or an "
                "evaluation's own macro, such as FEW_SHOT_IMAGE_KEY) to one of them."
            )

    def feature_names(self) -> Sequence[str]:
        """Those of `EXAMPLE_SPEC` that its examples have."""
        absent = {
            "caption": not self._fields.captions,
            "label": self._fields.label is None,
            "labels": self._fields.labels is None,
        }
        return [name for name in EXAMPLE_SPEC if not absent.get(name)]

    def num_input_examples(self, split: str) -> int:
        """Number of records in a split."""
        return len(self.index(split))

    def num_classes(self, split: str) -> int | None:
        """How many classes a split's labels tell apart, where folders or multi-hot arrays say so.

        Raises:
          UserError: as `index`; or arrays are not of one length.
        """
        shards, shard_format = self._shards(split)
        if isinstance(shard_format, image_folders.ImageFolder) and self._fields.label == "label":
            return image_folders.num_classes(shards)
        name = self._fields.labels
        if name is None:
            return None
        found: set[int] = set()
        for record in self._first_records(self.index(split)):
            with contextlib.suppress(BadRecord):
                found |= {n for n in [labels.num_classes(record, name)] if n is not None}
        if len(found) > 1:
            raise UserError(
                f"the records of {shards[0]} have arrays of {' and '.join(map(str, sorted(found)))}"
                f" classes in field {name!r}: write the data set again."
            )
        return found.pop() if found else None

    def _first_records(self, index: record_index.RecordIndex) -> list[shard_formats.Fields]:
        """Those among the first records that are not damaged."""
        first = index.read(np.arange(min(len(index), _RECORDS_TO_LOOK_AT)))
        return [record for record in first if not isinstance(record, BadRecord)]

    def identity(self, split: str) -> dict[str, Any]:
        """What the order depends on beside the seed: the shards and the window."""
        index = self.index(split)
        return {
            "num_shards": len(index.shards),
            "num_examples": len(index),
            "shards_digest": index.digest,
            "window_records": self._order(split, True, 0).window,
        }

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def _order(self, split: str, shuffle: bool, seed: int) -> sample_order.SampleOrder:
        index = self.index(split)
        window = sample_order.window_records(self._window_bytes, index.mean_bytes)
        return sample_order.SampleOrder(index.ends, min(window, len(index)), shuffle, seed)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        sequence_length: Mapping[str, int] | None = None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """SeqIO's view of the source: one pass after the other, strided over shards of the job."""
        del sequence_length, use_cached
        shard_info = shard_info or seqio.ShardInfo(0, 1)
        count = self.num_input_examples(split)
        end = np.iinfo(np.int64).max if not num_epochs or num_epochs < 0 else count * num_epochs
        indices = tf.data.Dataset.range(shard_info.index, end, shard_info.num_shards).batch(64)
        read = functools.partial(self.examples_at, split, shuffle=shuffle, seed=seed or 0)
        return fetch(read, indices, self.feature_names()).unbatch()

    def examples_at(
        self,
        split: str,
        indices: np.ndarray,
        *,
        shuffle: bool,
        seed: int,
        replace_bad: bool = True,
        attempt: int = 0,
    ) -> dict[str, np.ndarray]:
        """The examples that stand at global indices of the endless sequence of epochs.

        They are functions of (seed, index) alone, see `sample_order`. Where a record is bad,
        another one of the split stands in for it: it, too, is drawn by (seed, index) alone.

        Args:
          split: split name.
          indices: int64 [n].
          shuffle: whether epochs are permuted.
          seed: of the order and of the samples' own draws.
          replace_bad: whether others stand in for bad records, or these are only marked.
          attempt: 0 for the samples themselves, n for the n-th stand-in of each.

        Returns:
          Arrays [n, ...] by `feature_names`, as in `EXAMPLE_SPEC`; 'valid' is False where a record
          is bad and was not replaced.

        Raises:
          UserError: no good record was found in place of a bad one.
        """
        found: list[_Sample | None] = [None] * len(indices)
        todo = np.arange(len(indices))
        for number in range(attempt, attempt + (MAX_ATTEMPTS if replace_bad else 1)):
            self.records.saw(len(todo))
            records = self._records_at(split, indices[todo], shuffle, seed, number)
            fields = self.index(split).read(records, self._cache)
            for i, record in zip(todo, fields, strict=True):
                found[i] = self._sample(record, split, int(indices[i]), shuffle, seed, number)
            todo = np.asarray([i for i in todo if found[i] is None], np.int64)
            if not len(todo):
                break
        if len(todo) and replace_bad:
            self.records.give_up(MAX_ATTEMPTS)
        examples = _stack([sample or _Sample() for sample in found], indices, seed)
        return {name: examples[name] for name in self.feature_names()}

    def _records_at(
        self, split: str, indices: np.ndarray, shuffle: bool, seed: int, attempt: int
    ) -> np.ndarray:
        order = self._order(split, shuffle, seed)
        if not attempt:
            return order.records(indices)
        draws = captions.uniform(np.stack([np.full_like(indices, seed), indices], 1), attempt)
        return np.minimum((draws * order.num_records).astype(np.int64), order.num_records - 1)

    def where(self, split: str, index: int, *, shuffle: bool, seed: int, attempt: int = 0) -> str:
        """The shard and the number in it of a sample's record, and its key where it has one."""
        record = self._records_at(split, np.asarray([index]), shuffle, seed, attempt)
        records = self.index(split)
        shard = int(records.shard_of(record)[0])
        number = int(record[0] - (records.ends[shard - 1] if shard else 0))
        (fields,) = records.read(record, self._cache)
        key = "" if isinstance(fields, BadRecord) else fields.get("__key__") or fields.get("key")
        name = f", key {key[0].decode('utf-8', 'replace')!r}" if key else ""  # pyright: ignore
        return f"{number} of {records.shards[shard]}{name}"

    def _sample(
        self, record: Any, split: str, index: int, shuffle: bool, seed: int, attempt: int
    ) -> "_Sample | None":
        """What a record gives; None if it is bad, which is counted."""
        try:
            if isinstance(record, BadRecord):
                raise record
            data = shard_formats.first_present(record, self._fields.image)
            image = image_files.check(data, self._fields.max_pixels)
            if image.mended:
                self.records.mend(image.mended)
            caption = self._caption(record, seed, index)
            fields = self._fields
            label = -1 if fields.label is None else labels.one(record, fields.label)
            several = _NO_LABELS if fields.labels is None else labels.several(record, fields.labels)
        except BadRecord as error:
            place = self.where(split, index, shuffle=shuffle, seed=seed, attempt=attempt)
            self.records.add(error, place)
            return None
        size = (image.height, image.width)
        return _Sample(image.data, size, caption, label, several, True)

    def _caption(self, record: shard_formats.Fields, seed: int, index: int) -> bytes:
        """One of a record's captions, or all of them, one a line."""
        fields = self._fields
        if not fields.captions:
            return b""
        if fields.max_captions is None:
            caption, mended = captions.choose(record, fields.captions, seed, index)
        else:
            caption, mended = captions.every(record, fields.captions, fields.max_captions)
        if mended:
            self.records.mend(mended)
        return caption


_NO_LABELS = np.full(labels.MAX_LABELS, -1, np.int32)


@dataclasses.dataclass(frozen=True)
class _Sample:
    """An example's fields; by default those of a bad record: a black pixel without a caption."""

    encoded_image: bytes = dataclasses.field(default_factory=image_files.black)
    image_size: tuple[int, int] = (2, 2)
    caption: bytes = b""
    label: int = -1
    labels: np.ndarray = dataclasses.field(default_factory=lambda: _NO_LABELS)
    valid: bool = False


def _stack(samples: Sequence[_Sample], indices: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    result = {}
    for field in dataclasses.fields(_Sample):
        dtype = EXAMPLE_SPEC[field.name][0].as_numpy_dtype
        result[field.name] = np.array([getattr(x, field.name) for x in samples], dtype)
    result["index"] = indices
    result["seed"] = np.stack([np.full_like(indices, seed), indices], axis=1)
    return result


def _what_is_there(directory: str) -> str:
    if not tf.io.gfile.isdir(directory):
        return "is a file" if tf.io.gfile.exists(directory) else "does not exist"
    names = sorted(tf.io.gfile.listdir(directory))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"has no such shards (it holds {', '.join(names[:5]) or 'nothing'}{more})"


def blank(indices: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Examples as `examples_at` returns them, all of them marked as bad."""
    return _stack([_Sample()] * len(indices), indices, seed)


def fetch(
    read: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    indices: tf.data.Dataset,
    names: Sequence[str],
) -> tf.data.Dataset:
    """Batches of examples, by a function such as `examples_at`, of batches of int64 [n] indices.

    Two are read at a time. An error is raised to whoever reads the data set, as tf.errors.
    """
    specs = {name: EXAMPLE_SPEC[name] for name in names}

    def values(indices: np.ndarray) -> list[np.ndarray]:
        examples = read(indices)
        return [examples[name] for name in names]

    def read_op(indices: tf.Tensor) -> dict[str, tf.Tensor]:
        dtypes = [dtype for dtype, _ in specs.values()]
        found = tf.numpy_function(values, [indices], dtypes, stateful=False)
        for value, (_, shape) in zip(found, specs.values(), strict=True):
            value.set_shape([*indices.shape, *shape])
        return dict(zip(specs, found, strict=True))

    read_op = tf.autograph.experimental.do_not_convert(read_op)
    return indices.map(read_op, num_parallel_calls=2, deterministic=True)
