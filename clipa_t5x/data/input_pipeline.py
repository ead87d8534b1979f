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
from absl import logging

from clipa_t5x.data import host_batches, preprocessors, tasks
from clipa_t5x.errors import UserError, check_number

HostBatch = Mapping[str, np.ndarray]


def keep_accelerators_for_jax() -> None:
    """Hides GPUs from TensorFlow, which would otherwise take all their memory."""
    tf.config.set_visible_devices([], "GPU")


# What goes to devices; captions and the like stay with the host.
DEVICE_FEATURES = ("images", "text", "texts", "label", "labels", "weights", "augment_keys")


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
      max_bad_fraction: of a training's records; above it, training stops.
      accept_changes: go on from a checkpoint although the data are others than it was trained on.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]
    split: str
    batch_size: int
    shuffle: bool = True
    seed: int = 0
    max_examples: int | None = None
    max_bad_fraction: float = 0.1
    accept_changes: bool = False

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

    def check(self, num_parts: int = 1) -> None:
        """Reads the data's index, and what the task's text is shortened by.

        Args:
          num_parts: into how many parts the mesh splits the rows of a batch.

        Raises:
          UserError: the data, or the vocabulary's table of word classes, are missing or damaged, or
            a number cannot be a size, or is none that the mesh can split.
        """
        name, size = f"batch_size of {self.mixture_or_task_name}", self.batch_size
        check_number(name, size, minimum=1, whole=True)
        if size % num_parts:
            raise UserError(
                f"{name} is {size}, which the mesh cannot split into {num_parts} equal parts: set "
                f"EVAL_BATCH_SIZE to a multiple of {num_parts}, such as "
                f"{-(-size // num_parts) * num_parts}."
            )
        if self.max_examples is not None:
            check_number("EVAL_EXAMPLES", self.max_examples, minimum=1, whole=True)
        num_examples(self)
        for feature in tasks.get_task(self.mixture_or_task_name).output_features.values():
            if isinstance(feature, preprocessors.TextFeature):
                feature.check()

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


def num_examples(cfg: DatasetConfig) -> int:
    """Examples in one pass over the configured split."""
    count = tasks.get_source(cfg.mixture_or_task_name).num_input_examples(cfg.split)
    return min(count, cfg.max_examples or count)


def num_classes(cfg: DatasetConfig) -> int | None:
    """How many classes the labels tell apart, where the data themselves say so."""
    return tasks.get_source(cfg.mixture_or_task_name).num_classes(cfg.split)


def has_all_captions(cfg: DatasetConfig) -> bool:
    """Whether examples hold several captions of an image, 'texts', instead of one."""
    return "texts" in tasks.get_task(cfg.mixture_or_task_name).output_features


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
        self._source = tasks.get_source(cfg.mixture_or_task_name)
        self._rows = layout.local_rows(cfg.batch_size)
        self._supply = Supply(len(self._rows))
        self._batches = host_batches.train(cfg, self._rows, first_sample)
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=prefetch)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._prepare, name="train-data", daemon=True)
        self._thread.start()

    def _prepare(self) -> None:
        try:
            while not self._stopped.is_set():
                with self._supply.measured():
                    host_batch = next(self._batches)
                self._source.records.check(self._cfg.max_bad_fraction)
                self._put(self._layout.to_global(host_batch, self._cfg.batch_size))
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
            "task": self._cfg.mixture_or_task_name,
            **_identity(self._cfg),
        }

    def statistics(self) -> dict[str, float]:
        """What the pipeline could give, and the bad records so far, of this process.

        'data/supplied_per_core' is images per second and core while it was preparing batches since
        the last call;
        'data/bad/<reason>' and 'data/mended/<reason>' are counts, see `bad_records`.
        """
        counts = self._source.records.counts()
        values = {f"data/{name.replace(' ', '_')}": float(n) for name, n in counts.items()}
        supplied = self._supply.per_core()
        return values if supplied is None else {"data/supplied_per_core": supplied, **values}

    def close(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self._thread.join(timeout=10)


class Supply:
    """How many images a second the pipeline gives while it works; waiting for room is no work."""

    def __init__(self, batch_rows: int):
        """Measures a pipeline that gives `batch_rows` images at a time."""
        self._batch_rows = batch_rows
        self._lock = threading.Lock()
        self._batches, self._seconds = 0, 0.0

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Around the preparation of one batch."""
        start = time.perf_counter()
        yield
        with self._lock:
            self._batches += 1
            # The first batch comes with all that is read and built before it.
            self._seconds += time.perf_counter() - start if self._batches > 1 else 0.0

    def per_core(self) -> float | None:
        """Images per second and core since the last call; None where no batch was prepared."""
        with self._lock:
            batches, seconds = self._batches - 1, self._seconds
            if batches < 1 or not seconds:
                return None
            self._batches, self._seconds = 1, 0.0
        return batches * self._batch_rows / seconds / preprocessors.NUM_PARALLEL_CALLS


def _identity(cfg: DatasetConfig) -> dict[str, Any]:
    """What the order of the samples depends on."""
    source = tasks.get_source(cfg.mixture_or_task_name)
    return {"seed": cfg.seed, "shuffle": cfg.shuffle, "split": cfg.split,
            **source.identity(cfg.split)}  # fmt: skip


def resume_position(cfg: DatasetConfig, state: Mapping[str, Any]) -> int:
    """Where to go on, from a saved `TrainIterator.state`.

    Where nothing has been read yet, as after an import of weights, any data will do.

    Raises:
      UserError: the data are others than those of the checkpoint, so that the order would not be
        a continuation, and `cfg` does not accept it.
    """
    if state["next_sample"] == 0:
        return 0
    current = _identity(cfg)
    changed = [f"{k} {state.get(k)} -> {v}" for k, v in current.items() if state.get(k) != v]
    if changed and not cfg.accept_changes:
        raise UserError(
            f"the training data differ from the checkpoint's ({', '.join(changed)}): restore the "
            "data, SHUFFLE_WINDOW_BYTES and RANDOM_SEED, start a new MODEL_DIR with "
            "INITIAL_CHECKPOINT_PATH, or go on with other data by --gin.ACCEPT_DATA_CHANGES=True."
        )
    if changed:
        logging.warning("The training data differ from the checkpoint's: %s.", ", ".join(changed))
    return int(state["next_sample"])


def eval_batches(
    cfg: DatasetConfig, layout: BatchLayout
) -> Iterator[tuple[HostBatch, dict[str, jax.Array]]]:
    """One pass over the examples in order; the last batch is padded and 'weights' says where.

    Yields:
      (host batch of this process's rows, global device batch); 'weights' is float32 [batch_size],
      0 for padding and for bad records.
    """
    count = num_examples(cfg)
    rows = layout.local_rows(cfg.batch_size)
    for step, batch in enumerate(host_batches.evaluation(cfg, rows, count)):
        valid = (step * cfg.batch_size + rows < count) & batch["valid"]
        host_batch = {**batch, "weights": valid.astype(np.float32)}
        yield host_batch, layout.to_global(host_batch, cfg.batch_size)


def vocabulary_size(cfg: DatasetConfig) -> int | None:
    """Number of token ids of the task's text; None for a task without text.

    Raises:
      UserError: the vocabulary's file is missing or not one.
    """
    text = tasks.get_task(cfg.mixture_or_task_name).output_features.get("text")
    return None if text is None else text.vocabulary.vocab_size
