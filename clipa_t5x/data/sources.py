"""SeqIO data sources over image-text records that can be read at any position."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import seqio
import tensorflow as tf
from google.protobuf import message

from clipa_t5x.data import record_index, splitmix
from clipa_t5x.errors import UserError

# What `img2dataset` writes when a split is a folder of its own.
SPLIT_FOLDERS = {"train": "train/*.tfrecord*", "validation": "validation/*.tfrecord*"}


# Enough to tell a misspelt field from one that some records lack, as captions may be lacking.
_RECORDS_TO_LOOK_AT = 32


@runtime_checkable
class PositionalSource(Protocol):
    """A data source that can be read at any position: what a run resumes at its step on."""

    def num_input_examples(self, split: str) -> int:
        """Number of records in a split."""
        ...

    def examples_at(
        self, split: str, indices: tf.Tensor, *, shuffle: bool, seed: int
    ) -> dict[str, tf.Tensor]:
        """The examples at global indices of the endless sequence of epochs."""
        ...


def _epoch_keys(seed: int, epochs: tf.Tensor) -> tf.Tensor:
    """Keys of the permutations, int64 [n, 3], that look unrelated for neighbouring epochs."""
    step = tf.constant(splitmix.GAMMA, tf.uint64)
    key = splitmix.mix(tf.bitcast(tf.cast(seed, tf.int64), tf.uint64) + step)
    key = splitmix.mix(key + tf.bitcast(epochs, tf.uint64) * step)
    keys = [splitmix.mix(key + tf.constant(word, tf.uint64)) for word in range(3)]
    return tf.bitcast(tf.stack(keys, axis=1), tf.int64)


class TFRecordSource(seqio.DataSource):
    """TFRecord shards as img2dataset writes them, one glob pattern a split.

    Nothing is read before the first record or count is asked for. An example is
    {'record': serialised tf.train.Example, 'index': int64, 'seed': int64 [2]}; 'seed' is what
    random preprocessing of this very sample draws from, whichever host does it.
    """

    def __init__(
        self,
        data_dir: str,
        splits: Mapping[str, str] | None = None,
        index_dir: str | None = None,
        fields: Sequence[str] = (),
    ):
        """Describes the data; touches no file.

        Args:
          data_dir: folder of the data set, local or gs://.
          splits: split name -> glob pattern under `data_dir`. The default is `SPLIT_FOLDERS`.
          index_dir: where to keep the record index; the default is a folder in `data_dir`.
          fields: names of fields that the records must have; not each of them every record.
        """
        self._data_dir = data_dir
        self._patterns = dict(splits or SPLIT_FOLDERS)
        self._index_dir = index_dir or os.path.join(data_dir, ".record_index")
        self._fields = tuple(fields)
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
          UserError: the split is unknown, or no file matches its pattern.
        """
        if split not in self._patterns:
            raise UserError(
                f"split {split!r} is not one of {sorted(self._patterns)} of the data set at "
                f"{self._data_dir}: name one of them, or give the source a pattern for it."
            )
        pattern = os.path.join(self._data_dir, self._patterns[split])
        shards = sorted(tf.io.gfile.glob(pattern))
        if not shards:
            what = "has no shards" if tf.io.gfile.isdir(self._data_dir) else "does not exist"
            raise UserError(
                f"data set directory {self._data_dir} {what}: no file matches {pattern}. Set "
                "DATA_DIR to where the shards are, or write them (python -m clipa_t5x.data.build)."
            )
        return shards

    @functools.cache  # noqa: B019  sources live as long as the registry of tasks
    def index(self, split: str) -> record_index.RecordIndex:
        """The record index of a split, built at the first call.

        Raises:
          UserError: a shard is missing, empty or damaged, or records lack the fields asked for.
        """
        shards = self.list_shards(split)
        index = record_index.load(shards, os.path.join(self._index_dir, split.replace("/", "_")))
        if self._fields:
            self._check_fields(index, shards[0])
        return index

    def _check_fields(self, index: record_index.RecordIndex, shard: str) -> None:
        """Refuses field names that none of the first records has: training would read nothing."""
        present: set[str] = set()
        for record in index.read(np.arange(min(len(index), _RECORDS_TO_LOOK_AT))):
            try:
                present.update(tf.train.Example.FromString(record).features.feature)
            except message.DecodeError as error:
                raise UserError(
                    f"{shard} holds records that are no tf.train.Example: write the data set with "
                    "img2dataset's output_format=tfrecord."
                ) from error
        if missing := [field for field in self._fields if field not in present]:
            raise UserError(
                f"the records of {shard} have no field {missing[0]!r}; their fields are "
                f"{', '.join(sorted(present)) or 'none'}: set IMAGE_KEY, CAPTION_KEY or the task's "
                "label_key to one of them."
            )

    def num_input_examples(self, split: str) -> int:
        """Number of records in a split."""
        return len(self.index(split))

    def read(self, split: str, positions: tf.Tensor) -> tf.Tensor:
        """Serialised records (string [n]) at `positions` (int64 [n]), as an op for tf.data."""
        index = self.index(split)

        def read(positions: np.ndarray) -> np.ndarray:
            return np.array(index.read(positions), dtype=object)

        records = tf.numpy_function(read, [positions], tf.string)
        records.set_shape(positions.shape)
        return records

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
        count = self.num_input_examples(split)
        shard_info = shard_info or seqio.ShardInfo(0, 1)
        total = tf.data.experimental.INFINITE_CARDINALITY if num_epochs is None else num_epochs
        end = np.iinfo(np.int64).max if total < 0 else count * total
        ds = tf.data.Dataset.range(shard_info.index, end, shard_info.num_shards)
        return ds.batch(64).map(
            functools.partial(self.examples_at, split, shuffle=shuffle, seed=seed or 0)
        ).unbatch()  # fmt: skip

    def examples_at(
        self, split: str, indices: tf.Tensor, *, shuffle: bool, seed: int
    ) -> dict[str, tf.Tensor]:
        """The examples that stand at global indices of the endless sequence of epochs.

        The order is a function of (seed, index) alone: epoch e = index // records is a permutation
        of the records keyed by (seed, e), computed element by element. No state, no buffer, no
        replay: any index is as near as the first.

        Args:
          split: split name.
          indices: int64 [n].
          shuffle: whether epochs are permuted.
          seed: of the permutation and of the samples' own seeds.
        """
        count = self.num_input_examples(split)
        epochs, positions = indices // count, tf.math.floormod(indices, count)
        if shuffle:
            last = tf.fill(tf.shape(epochs), tf.constant(count - 1, tf.int64))
            # With fewer rounds, or keys that differ in few bits, neighbours stay near each other.
            positions = tf.raw_ops.RandomIndexShuffle(
                index=positions, seed=_epoch_keys(seed, epochs), max_index=last, rounds=8
            )
        seeds = tf.stack([tf.fill(tf.shape(indices), tf.cast(seed, tf.int64)), indices], axis=1)
        return {"record": self.read(split, positions), "index": indices, "seed": seeds}
