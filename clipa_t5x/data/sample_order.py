"""Which record a sample is: a function of (seed, global index), computed in place, without state.

An epoch takes the shards in a random order and mixes records within windows of neighbouring ones.
A window is as much as stays in memory, so that storage is read piece by piece, and each piece once
an epoch; where one window holds everything, an epoch is a permutation of all records.
"""

import dataclasses
import functools

import numpy as np
import tensorflow as tf

from clipa_t5x.data import splitmix


@dataclasses.dataclass(frozen=True, eq=False)
class SampleOrder:
    """The endless sequence of epochs over a split.

    Attributes:
      ends: int64 [shards], number of records up to and including each shard.
      window: records that are mixed with each other.
      shuffle: whether epochs are permuted at all.
      seed: of the permutations.
    """

    ends: np.ndarray
    window: int
    shuffle: bool
    seed: int

    @property
    def num_records(self) -> int:
        """In an epoch."""
        return int(self.ends[-1])

    def records(self, indices: np.ndarray) -> np.ndarray:
        """Record numbers (int64 [n]) of global indices (int64 [n])."""
        epochs, places = np.divmod(indices, self.num_records)
        if not self.shuffle:
            return places
        return self.in_epoch(epochs, self._mixed(epochs, places))

    def _mixed(self, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Places in the epochs' sequences of shards, mixed within windows."""
        windows = places // self.window
        first = windows * self.window
        last = np.minimum(first + self.window, self.num_records) - 1 - first
        with tf.device("CPU"):
            # With fewer rounds, or keys that differ in few bits, neighbours stay near each other.
            mixed = tf.raw_ops.RandomIndexShuffle(
                index=tf.constant(places - first),
                seed=_window_keys(self.seed, tf.constant(epochs), tf.constant(windows)),
                max_index=tf.constant(last),
                rounds=8,
            )
        return first + np.asarray(mixed)

    def in_epoch(self, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Record numbers at places of the epochs' sequences of shards."""
        if self.window >= self.num_records:
            return places  # Everything is mixed with everything: the order of shards is no matter.
        records = np.empty_like(places)
        for epoch in np.unique(epochs):
            where = epochs == epoch
            shards, ends = _shard_order(self, int(epoch))
            at = np.searchsorted(ends, places[where], side="right")
            # Counted from the end of a shard: the distance is the same in both orders.
            records[where] = self.ends[shards[at]] - (ends[at] - places[where])
        return records


def window_records(window_bytes: int, mean_bytes: float) -> int:
    """How many records a window of so many bytes holds, at least one."""
    return max(1, int(window_bytes / max(mean_bytes, 1.0)))


@functools.lru_cache(maxsize=8)
def _shard_order(order: SampleOrder, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(shards in an epoch's order, number of records up to and including each in that order)."""
    keys = _window_keys(order.seed, tf.constant([epoch], tf.int64), tf.constant([-1], tf.int64))
    numbers = tf.range(len(order.ends), dtype=tf.int64)
    seeds = tf.stack([tf.fill(tf.shape(numbers), keys[0, 0]), numbers], axis=1)
    shards = np.argsort(splitmix.uniform(seeds, 1).numpy()[:, 0], kind="stable")
    lengths = np.diff(order.ends, prepend=0)
    return shards, np.cumsum(lengths[shards])


def _window_keys(seed: int, epochs: tf.Tensor, windows: tf.Tensor) -> tf.Tensor:
    """Keys of the permutations, int64 [n, 3], that look unrelated for neighbours of any kind."""
    step = tf.constant(splitmix.GAMMA, tf.uint64)
    key = splitmix.mix(tf.bitcast(tf.constant(seed, tf.int64), tf.uint64) + step)
    key = splitmix.mix(key + tf.bitcast(epochs, tf.uint64) * step)
    key = tf.bitwise.bitwise_xor(key, splitmix.mix(tf.bitcast(windows, tf.uint64) * step))
    keys = [splitmix.mix(key + tf.constant(word, tf.uint64)) for word in range(3)]
    return tf.bitcast(tf.stack(keys, axis=1), tf.int64)
