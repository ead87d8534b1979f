"""What an evaluator is given, and what all of them share."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from clipa_t5x.data import input_pipeline


@dataclasses.dataclass(frozen=True)
class EmbedFunctions:
    """The model as evaluators see it.

    Attributes:
      embed_images: (params, uint8 [batch, size, size, 3]) -> unit float32 [batch, joint].
      embed_text: (params, int32 [batch, length]) -> unit float32 [batch, joint].
      layout: how batches lie on the devices.
    """

    embed_images: Callable[[Any, jax.Array], jax.Array]
    embed_text: Callable[[Any, jax.Array], jax.Array]
    layout: input_pipeline.BatchLayout


@functools.cache
def _replicate(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(lambda x: x, out_shardings=replicated)


def replicate(x: jax.Array, layout: input_pipeline.BatchLayout) -> jax.Array:
    """A batch's global array, whole, on every device; nothing waits for it."""
    return _replicate(layout.sharding.mesh)(x)


def gather(x: jax.Array, layout: input_pipeline.BatchLayout) -> np.ndarray:
    """A batch's global array, whole, on every host."""
    return np.asarray(replicate(x, layout))


class Evaluator(Protocol):
    """Scalars for a set of parameters."""

    def check(self, num_parts: int = 1) -> None:
        """Refuses, before training begins, files and data that `evaluate` could not use.

        Args:
          num_parts: into how many parts the mesh splits the rows of a batch.

        Raises:
          UserError: names them.
        """
        ...

    def evaluate(
        self, params: Any, embed: EmbedFunctions, output_dir: str | None
    ) -> Mapping[str, float]:
        """Returns metrics by name; called by all processes at the same step.

        Args:
          params: the model's.
          embed: the model's embedding functions.
          output_dir: where process 0 may leave what is not a number, after the last step; None
            during training.
        """
        ...
