"""One process's rows of every batch, as NumPy arrays: full ones, whatever single records are like.

Records that are bad as they lie are replaced where they are read (`sources`). An image that only
its decoder finds broken leaves a gap in the stream; what is here notices by the samples' indices,
and fills it with a stand-in that is the same for every process and after every restart.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from clipa_t5x.data import feature_converters, preprocessors, sources, tasks
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.errors import UserError

HostBatch = dict[str, np.ndarray]

# Records are read so many at a time.
_READ_TOGETHER = 256
_MOST_IN_VAIN = 4096


def train(cfg: Any, rows: np.ndarray, first_sample: int) -> Iterator[HostBatch]:
    """Endless batches of `rows` (int64 [n]) of the global batches from `first_sample` on.

    They carry 'augment_keys', uint32 [n, 2], for what is drawn on the accelerator.
    """
    stream = _Stream(cfg, rows, first_sample)
    for step in itertools.count():
        indices = first_sample + step * cfg.batch_size + rows
        keys = preprocessors.augment_keys(cfg.seed, tf.constant(indices)).numpy()
        yield {**stream.take(indices), "augment_keys": keys}


def evaluation(cfg: Any, rows: np.ndarray, count: int) -> Iterator[HostBatch]:
    """Batches of `rows` of one pass over the first `count` examples, in order.

    Rows past the end repeat the last example. 'valid' is False for records that are bad.
    """
    stream = _Stream(cfg, rows, 0, count)
    for step in range(-(-count // cfg.batch_size)):
        batch = stream.take(step * cfg.batch_size + rows)
        yield {**batch, "index": np.minimum(batch["index"], count - 1)}


class _Stream:
    """Examples in the order of their indices, of which the data set may leave some out."""

    def __init__(self, cfg: Any, rows: np.ndarray, first_sample: int, count: int | None = None):
        """Begins at `first_sample`; `count` is None for training, which replaces what is bad."""
        self._cfg, self._count = cfg, count
        self._source = tasks.get_source(cfg.mixture_or_task_name)
        self._error: Exception | None = None
        # Records read since the last image was decoded: where none can be, nothing would ever come.
        self._in_vain, self._most_in_vain = 0, 4 * len(rows) + _MOST_IN_VAIN
        num_steps = None if count is None else -(-count // cfg.batch_size)
        wanted = indices(rows, first_sample, cfg.batch_size, num_steps)
        examples = sources.fetch(self._read, wanted, self._source.feature_names())
        # What goes wrong in reading is kept and raised: the errors dropped here are a decoder's.
        prepared = _prepare(cfg, examples).ignore_errors(log_warning=False)
        self._chunks: Iterator[Any] = prepared.batch(len(rows)).as_numpy_iterator()
        self._chunk: HostBatch = {"index": np.zeros(0, np.int64)}

    def _read(self, indices: np.ndarray) -> HostBatch:
        try:
            self._in_vain += len(indices)
            if self._in_vain > self._most_in_vain:
                raise UserError(
                    f"none of the last {self._in_vain} images of {self._cfg.mixture_or_task_name} "
                    "can be decoded: their headers are in order, what follows is not. Write the "
                    "data set again."
                )
            return self._examples(indices, 0)
        except Exception as error:
            self._error = self._error or error
            return sources.blank(indices, self._cfg.seed)

    def _examples(self, indices: np.ndarray, attempt: int) -> HostBatch:
        examples = self._source.examples_at(
            self._cfg.split, self._known(indices), shuffle=self._cfg.shuffle, seed=self._cfg.seed,
            replace_bad=self._count is None, attempt=attempt,
        )  # fmt: skip
        return {**examples, "index": indices}

    def take(self, wanted: np.ndarray) -> HostBatch:
        """The examples of the next indices, int64 [n]."""
        parts: list[HostBatch] = []
        while len(wanted):
            found = self._present()
            if self._error is not None:
                raise self._error
            most = min(len(found), len(wanted))
            same = found[:most] == wanted[:most]
            good = most if same.all() else int(np.argmin(same))
            if good:
                parts.append({name: values[:good] for name, values in self._chunk.items()})
                self._chunk = {name: values[good:] for name, values in self._chunk.items()}
            if good == most < len(wanted) and len(found):
                wanted = wanted[good:]
                continue
            if good < len(wanted):
                parts.append(self._stand_in(wanted[good : good + 1]))
            wanted = wanted[good + 1 :]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _present(self) -> np.ndarray:
        """Indices of the examples at hand; none at the end."""
        if not len(self._chunk["index"]):
            self._chunk = next(self._chunks, self._chunk)
            self._in_vain = 0
        return self._chunk["index"]

    def _stand_in(self, index: np.ndarray) -> HostBatch:
        """An example, as a batch of one, for one whose image could not be decoded."""
        if self._count is not None:
            self._add_undecodable(index, 0)
            return self._prepare_one(sources.blank(index, self._cfg.seed))
        for attempt in range(sources.MAX_ATTEMPTS):
            self._add_undecodable(index, attempt)
            with contextlib.suppress(tf.errors.InvalidArgumentError):
                return self._prepare_one(self._examples(index, attempt + 1))
        return self._source.records.give_up(sources.MAX_ATTEMPTS)

    def _add_undecodable(self, index: np.ndarray, attempt: int) -> None:
        where = self._source.where(
            self._cfg.split, int(self._known(index)[0]), shuffle=self._cfg.shuffle,
            seed=self._cfg.seed, attempt=attempt,
        )  # fmt: skip
        self._source.records.add(BadRecord("undecodable image"), where)

    def _known(self, indices: np.ndarray) -> np.ndarray:
        """Indices, of which those past an evaluation's end are the last."""
        return indices if self._count is None else np.minimum(indices, self._count - 1)

    def _prepare_one(self, examples: HostBatch) -> HostBatch:
        given = {name: examples[name] for name in self._source.feature_names()}
        prepared = _prepare(self._cfg, tf.data.Dataset.from_tensors(given)).batch(1)
        batch: Any = next(iter(prepared.as_numpy_iterator()))
        return batch


def indices(
    rows: np.ndarray, first_sample: int, batch_size: int, num_steps: int | None
) -> tf.data.Dataset:
    """Global indices of the rows of all steps, in batches of a size that is read at once."""
    parts = -(-len(rows) // _READ_TOGETHER)
    end = np.iinfo(np.int64).max // batch_size if num_steps is None else num_steps * parts

    def chosen_indices(number: Any) -> tf.Tensor:
        step, part = number // parts, number % parts
        chosen = tf.constant(rows)[part * _READ_TOGETHER : (part + 1) * _READ_TOGETHER]
        return first_sample + step * batch_size + chosen

    return tf.data.Dataset.range(end).map(preprocessors.as_written(chosen_indices))


def _prepare(cfg: Any, examples: tf.data.Dataset) -> tf.data.Dataset:
    """Images and tokens of batches of examples, one by one and in order."""
    task = tasks.get_task(cfg.mixture_or_task_name)
    ds = task.preprocess_postcache(examples, cfg.task_feature_lengths)
    ds, _ = feature_converters.convert(ds, cfg.task_feature_lengths)
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False  # preprocessors.NUM_PARALLEL_CALLS says why
    return ds.with_options(options)
