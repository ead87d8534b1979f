"""A process's rows of batches as NumPy, for an engine that puts them on devices itself."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import clu.data.dataset_iterator
import jax
import numpy as np

from clipa_t5x.data import input_pipeline


@dataclasses.dataclass(frozen=True)
class HostRows:
    """In an `input_pipeline.BatchLayout`'s place: rows that another engine puts on devices.

    Attributes:
      rows: of the global batch, int [rows]: those that this process prepares.
    """

    rows: np.ndarray

    @classmethod
    def of(cls, cfg: input_pipeline.DatasetConfig, shard_id: int, num_shards: int) -> "HostRows":
        """The `shard_id`-th of `num_shards` equal parts of a batch."""
        size = cfg.batch_size // num_shards
        return cls(np.arange(shard_id * size, (shard_id + 1) * size))

    def local_rows(self, batch_size: int) -> np.ndarray:
        """See `input_pipeline.BatchLayout`."""
        del batch_size
        return self.rows

    def to_global(self, host_batch: Any, batch_size: int) -> Any:
        """The batch as it is."""
        del batch_size
        return host_batch

    def spec(self, global_spec: Mapping[str, Any]) -> dict[str, Any]:
        """Shapes and dtypes of these rows alone."""
        array_spec = clu.data.dataset_iterator.ArraySpec
        size = len(self.rows)
        return {k: array_spec(v.dtype, (size, *v.shape[1:])) for k, v in global_spec.items()}


class TrainData(clu.data.dataset_iterator.DatasetIterator):
    """This process's rows of endless training batches, from a step on; prepared ahead.

    The position is the step alone: nothing is saved, and another number of processes goes on with
    the same batches.
    """

    element_spec: Any = None  # Shapes and dtypes of what is given, of each of these.

    def __init__(self, cfg: input_pipeline.DatasetConfig, rows: HostRows, first_step: int):
        self.element_spec = rows.spec(cfg.batch_spec())
        first_sample = first_step * cfg.batch_size
        self._batches = input_pipeline.TrainIterator(cfg, rows, first_sample)  # pyright: ignore

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        return {name: batch[name] for name in self.element_spec}


class EvaluationData:
    """This process's rows of one pass over an evaluation's data; may be iterated again."""

    def __init__(self, cfg: input_pipeline.DatasetConfig, rows: HostRows):
        spec = {k: v for k, v in cfg.batch_spec().items() if k != "augment_keys"}
        spec["weights"] = jax.ShapeDtypeStruct((cfg.batch_size,), np.float32)
        self.element_spec = rows.spec(spec)
        self._cfg, self._rows = cfg, rows

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for batch, _ in input_pipeline.eval_batches(self._cfg, self._rows):  # pyright: ignore
            yield {name: batch[name] for name in self.element_spec}
