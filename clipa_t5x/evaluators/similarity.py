"""The nearest of many embeddings, without the matrix of all similarities ever being there."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipa_t5x.data import input_pipeline
from clipa_t5x.evaluators import evaluator

# Similarities on a device at a time: 16 MiB of float32.
ROWS_PER_DEVICE, BLOCK = 1024, 4096


@functools.partial(jax.jit, static_argnames="k")
def _merge(
    best: tuple[jax.Array, jax.Array], queries: jax.Array, keys: jax.Array, first: Any, count: Any,
    k: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The best k of those so far and of a block of keys, of which the first `count` are any."""
    scores = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
    places = jnp.arange(len(keys))
    scores = jnp.where(places < count, scores, -jnp.inf)
    # Those so far stand in front: of equal scores, `top_k` takes the earlier.
    scores = jnp.concatenate([best[0], scores], axis=1)
    numbers = jnp.broadcast_to(first + places, (len(queries), len(keys)))
    numbers = jnp.concatenate([best[1], numbers.astype(jnp.int32)], axis=1)
    scores, chosen = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(numbers, chosen, axis=1)


def nearest(
    queries: np.ndarray,
    keys: np.ndarray,
    k: int,
    layout: input_pipeline.BatchLayout,
    *,
    rows_per_device: int = ROWS_PER_DEVICE,
    block: int = BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """The keys of the greatest inner products with each query.

    The devices share the queries and go through the keys in blocks; a device holds similarities of
    `rows_per_device` queries and `block` keys at a time. Of equal similarities, the earlier key
    comes first, as in a stable sort: a model that tells nothing apart finds what stands first.

    Args:
      queries: float32 [n, joint], the same on all processes.
      keys: float32 [m, joint], the same on all processes.
      k: how many are wanted; m at most.
      layout: whose mesh the work is spread over.
      rows_per_device: queries of a device at a time.
      block: keys at a time.

    Returns:
      (float32 [n, k] similarities, int32 [n, k] numbers of keys), best first.
    """
    k, block = min(k, len(keys)), min(block, len(keys))
    sharding = layout.sharding
    shards = sharding.mesh.size // sharding.shard_shape((sharding.mesh.size,))[0]
    rows = shards * min(rows_per_device, -(-len(queries) // shards))
    found = []
    for start in range(0, len(queries), rows):
        padded = _part(queries, start, rows)
        part = _shard(padded, sharding)
        best = (
            _shard(np.full((rows, k), -np.inf, np.float32), sharding),
            _shard(np.zeros((rows, k), np.int32), sharding),
        )
        for first in range(0, len(keys), block):
            count = min(block, len(keys) - first)
            best = _merge(best, part, _part(keys, first, block), first, count, k)
        scores, numbers = (evaluator.gather(x, layout) for x in best)
        found.append((scores[: len(queries) - start], numbers[: len(queries) - start]))
    scores, numbers = zip(*found, strict=True)
    return np.concatenate(scores), np.concatenate(numbers)


def _part(values: np.ndarray, start: int, rows: int) -> np.ndarray:
    """Rows from `start` on, zeros after the last."""
    part = values[start : start + rows]
    return np.pad(part, ((0, rows - len(part)), (0, 0)))


def _shard(values: np.ndarray, sharding: jax.sharding.NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
