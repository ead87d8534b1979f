"""From a task to global, sharded batches whose order is a function of (seed, step) alone.

Row r of the global batch of step s is sample s * batch_size + r of an endless sequence. Each
process prepares exactly the rows that its devices hold, so the batches are the same for any number
of processes, and a position is one integer.
"""

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorflow as tf

from clipa_t5x.data import feature_converters, preprocessors, tasks
from clipa_t5x.errors import UserError, check_number

HostBatch = Mapping[str, np.ndarray]


def keep_accelerators_for_jax() -> None:
    """Hides GPUs from TensorFlow, which would otherwise take all their memory."""
    tf.config.set_visible_devices([], "GPU")


# What goes to devices; captions and the like stay with the host.
DEVICE_FEATURES = ("images", "text", "label", "weights", "augment_keys")


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Which examples, in T5X's words.

    Attributes:
      mixture_or_task_name: a registered SeqIO task.
      task_feature_lengths: {'images': pixels, 'text': tokens}.
      split: of the task.
      batch_size: global, over all processes.
      shuffle: whether every epoch is a fresh permutation.
      seed: of order and augmentation.
      max_examples: caps an evaluation's examples; None takes them all.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]
    split: str
    batch_size: int
    shuffle: bool = True
    seed: int = 0
    max_examples: int | None = None

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a global training batch; reads no data.

        Raises:
          UserError: the lengths are not of images and text, or a number cannot be a size.
        """
        unknown = sorted(set(self.task_feature_lengths) - {"images", "text"})
        if unknown:
            raise UserError(f"TASK_FEATURE_LENGTHS has {unknown[0]!r}; 'images' and 'text' is all.")
        size, length = (self._feature_length(key) for key in ("images", "text"))
        check_number("BATCH_SIZE", self.batch_size, minimum=1, whole=True)
        return {
            "images": jax.ShapeDtypeStruct((self.batch_size, size, size, 3), np.uint8),
            "text": jax.ShapeDtypeStruct((self.batch_size, length), np.int32),
            "augment_keys": jax.ShapeDtypeStruct((self.batch_size, 2), np.uint32),
        }

    def check(self) -> None:
        """Reads the data's index, and what the task's text is shortened by.

        Raises:
          UserError: the data, or the vocabulary's table of word classes, are missing or damaged, or
            a number cannot be a size.
        """
        check_number(f"batch_size of {self.mixture_or_task_name}", self.batch_size, minimum=1,
                     whole=True)  # fmt: skip
        if self.max_examples is not None:
            check_number("EVAL_EXAMPLES", self.max_examples, minimum=1, whole=True)
        num_examples(self)
        text = tasks.get_task(self.mixture_or_task_name).output_features.get("text")
        if isinstance(text, preprocessors.TextFeature):
            text.check()

    def _feature_length(self, key: str) -> int:
        length = self.task_feature_lengths.get(key)
        if not isinstance(length, int) or length < 1:
            raise UserError(
                f"TASK_FEATURE_LENGTHS is {dict(self.task_feature_lengths)}: {key!r} must be "
                "a positive integer, as in {'images': 84, 'text': 8}."
            )
        return length


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How the rows of global batches lie on devices, and which of them this process must prepare.

    Attributes:
      sharding: of every array of a batch, over its first dimension.
    """

    sharding: jax.sharding.NamedSharding

    def local_rows(self, batch_size: int) -> np.ndarray:
        """Rows of the global batch that this process's devices hold: sorted int64."""
        parts = self.sharding.addressable_devices_indices_map((batch_size,)).values()
        rows = {row for part in parts if part for row in range(*part[0].indices(batch_size))}
        return np.asarray(sorted(rows), np.int64)

    def to_global(self, host_batch: HostBatch, batch_size: int) -> dict[str, jax.Array]:
        """Global arrays [batch_size, ...] from this process's rows, in `local_rows` order."""
        rows = self.local_rows(batch_size)

        def put(values: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(batch_size)
                first = int(np.searchsorted(rows, start))
                return values[first : first + stop - start]

            return jax.make_array_from_callback(
                (batch_size, *values.shape[1:]), self.sharding, part
            )

        return {k: put(v) for k, v in host_batch.items() if k in DEVICE_FEATURES}


def _dataset(
    cfg: DatasetConfig, rows: np.ndarray, first_sample: int, num_steps: int | None
) -> tf.data.Dataset:
    """Batches of this process's rows, from the global batch that begins at `first_sample`."""
    task = tasks.get_task(cfg.mixture_or_task_name)
    source = tasks.get_source(cfg.mixture_or_task_name)
    count = num_examples(cfg)

    def fetch(step: tf.Tensor) -> dict[str, tf.Tensor]:
        indices = first_sample + step * cfg.batch_size + rows
        if num_steps is not None:  # an evaluation ends: rows past the end repeat the last example
            indices = tf.minimum(indices, count - 1)
        return source.examples_at(cfg.split, indices, shuffle=cfg.shuffle, seed=cfg.seed)

    def with_keys(step: tf.Tensor, batch: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        indices = first_sample + step * cfg.batch_size + rows
        return {**batch, "augment_keys": preprocessors.augment_keys(cfg.seed, indices)}

    limit = np.iinfo(np.int64).max if num_steps is None else num_steps
    ds = tf.data.Dataset.range(limit).map(
        preprocessors.as_written(fetch), num_parallel_calls=2, deterministic=True
    )
    ds = task.preprocess_postcache(ds.unbatch(), cfg.task_feature_lengths)
    ds, _ = feature_converters.convert(ds, cfg.task_feature_lengths)
    ds = ds.batch(len(rows), drop_remainder=True)
    if num_steps is None:
        ds = ds.enumerate().map(preprocessors.as_written(with_keys))
    ds = ds.prefetch(2)
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False  # preprocessors.NUM_PARALLEL_CALLS says why
    return ds.with_options(options)


def num_examples(cfg: DatasetConfig) -> int:
    """Examples in one pass over the configured split."""
    count = tasks.get_source(cfg.mixture_or_task_name).num_input_examples(cfg.split)
    return min(count, cfg.max_examples or count)


class TrainIterator:
    """Endless global batches; prepared ahead in a thread.

    Attributes:
      waited_seconds: how long the last `next` waited for its batch.
    """

    def __init__(
        self, cfg: DatasetConfig, layout: BatchLayout, first_sample: int = 0, prefetch: int = 2
    ):
        """Starts preparing the batch that begins at `first_sample`.

        Args:
          cfg: which examples.
          layout: where the rows go.
          first_sample: position in the endless sequence of samples, from `state`.
          prefetch: batches held ready on devices.
        """
        self._cfg, self._layout = cfg, layout
        self._next_sample = first_sample
        self.waited_seconds = 0.0
        self._rows = layout.local_rows(cfg.batch_size)
        dataset = _dataset(cfg, self._rows, first_sample, None)
        self._batches: Iterator[Any] = dataset.as_numpy_iterator()
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=prefetch)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._prepare, name="train-data", daemon=True)
        self._thread.start()

    def _prepare(self) -> None:
        try:
            for host_batch in self._batches:
                self._put(self._layout.to_global(host_batch, self._cfg.batch_size))
                if self._stopped.is_set():
                    return
        except Exception as error:  # handed to whoever asks for the next batch
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return

    def __next__(self) -> dict[str, jax.Array]:
        start = time.perf_counter()
        item = self._queue.get()
        self.waited_seconds = time.perf_counter() - start
        if isinstance(item, Exception):
            self._queue.put(item)  # whoever asks again hears it again, instead of waiting for ever
            raise item
        self._next_sample += self._cfg.batch_size
        return item

    def __iter__(self) -> "TrainIterator":
        return self

    def state(self) -> dict[str, Any]:
        """The position after the last batch taken: all that a resumed run needs."""
        return {
            "next_sample": self._next_sample,
            "seed": self._cfg.seed,
            "shuffle": self._cfg.shuffle,
            "task": self._cfg.mixture_or_task_name,
            "split": self._cfg.split,
            "num_examples": num_examples(self._cfg),
        }

    def close(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self._thread.join(timeout=10)


def resume_position(cfg: DatasetConfig, state: Mapping[str, Any]) -> int:
    """Where to go on, from a saved `TrainIterator.state`.

    Raises:
      UserError: the data are others than those of the checkpoint, so that the order would not be
        a continuation.
    """
    current = {
        "seed": cfg.seed,
        "shuffle": cfg.shuffle,
        "split": cfg.split,
        "num_examples": num_examples(cfg),
    }
    changed = [f"{k} {state[k]} -> {v}" for k, v in current.items() if state.get(k) != v]
    if changed:
        raise UserError(
            f"the training data differ from the checkpoint's ({', '.join(changed)}): restore the "
            "data and RANDOM_SEED, or start a new MODEL_DIR with INITIAL_CHECKPOINT_PATH."
        )
    return int(state["next_sample"])


def eval_batches(
    cfg: DatasetConfig, layout: BatchLayout
) -> Iterator[tuple[HostBatch, dict[str, jax.Array]]]:
    """One pass over the examples in order; the last batch is padded and 'weights' says where.

    Yields:
      (host batch of this process's rows, global device batch); 'weights' is float32 [batch_size],
      0 for padding.
    """
    count = num_examples(cfg)
    rows = layout.local_rows(cfg.batch_size)
    num_steps = -(-count // cfg.batch_size)
    batches: Any = _dataset(cfg, rows, 0, num_steps).as_numpy_iterator()
    for step, batch in enumerate(batches):
        valid = step * cfg.batch_size + rows < count
        host_batch = {**batch, "weights": valid.astype(np.float32)}
        yield host_batch, layout.to_global(host_batch, cfg.batch_size)


def vocabulary_size(cfg: DatasetConfig) -> int | None:
    """Number of token ids of the task's text; None for a task without text.

    Raises:
      UserError: the vocabulary's file is missing or not one.
    """
    text = tasks.get_task(cfg.mixture_or_task_name).output_features.get("text")
    return None if text is None else text.vocabulary.vocab_size
