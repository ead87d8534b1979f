"""Contrastive losses: pure functions of embeddings, in float32.

Both work through the global batch's matrix of logits by blocks of image rows. With `num_chunks`
above 1 only one block exists at a time, in the backward pass, too, which computes it again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import spmd

from clipa_t5x.errors import UserError

_LEAST = jnp.finfo(jnp.float32).min


def softmax_contrastive(
    image_embeddings: jax.Array,
    text_embeddings: jax.Array,
    logit_scale: jax.Array,
    weights: jax.Array | None = None,
    *,
    num_chunks: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """CLIP's symmetric softmax loss over the global batch (Radford et al., 2021, figure 3).

    With s_ij = logit_scale <image_i, text_j>, the loss is the mean over i of
    (logsumexp_j s_ij + logsumexp_j s_ji) / 2 - s_ii. The matrix of logits is laid out by the image
    rows, so that a device holds its own rows times the global batch and no more.

    Args:
      image_embeddings: [batch, joint], unit length.
      text_embeddings: [batch, joint], unit length.
      logit_scale: scalar factor of the logits (not its logarithm).
      weights: [batch], 1 for a pair that counts and 0 for padding; None for all ones.
      num_chunks: how many blocks of image rows to work through one by one; it divides the batch.

    Returns:
      The loss, a float32 scalar, and {'accuracy': share of the images whose own text is the most
      similar of the batch}.

    Raises:
      UserError: num_chunks does not divide the batch.
    """
    images = image_embeddings.astype(jnp.float32)
    texts = text_embeddings.astype(jnp.float32)
    weights, valid = _weights(weights, len(images))
    scale = logit_scale.astype(jnp.float32)

    def block(columns: tuple[jax.Array, jax.Array], rows: tuple[jax.Array, ...]) -> Any:
        """Row sums of one block, and column sums of all blocks so far, as (greatest, sum)."""
        images, index, rows_valid = rows
        logits = spmd.with_logical_constraint(scale * (images @ texts.T), ("batch", None))
        logits = jnp.where(rows_valid[:, None] & valid[None, :], logits, _LEAST)
        own = jnp.sum(jnp.where(_own_text(index, len(texts)), logits, 0.0), axis=1)
        greatest, total = columns
        # The shift cancels out: no gradient need flow through it.
        shift = jnp.maximum(greatest, jax.lax.stop_gradient(logits).max(axis=0))
        total = total * jnp.exp(greatest - shift) + jnp.exp(logits - shift).sum(axis=0)
        correct = jnp.argmax(logits, axis=1) == index
        return (shift, total), (jax.nn.logsumexp(logits, axis=1), own, correct)

    start = jnp.full((len(images),), _LEAST), jnp.zeros((len(images),))
    rows = images, jnp.arange(len(images)), valid
    (shift, total), (row_sums, own, correct) = _by_blocks(block, start, rows, num_chunks)
    per_pair = 0.5 * (row_sums + shift + jnp.log(total)) - own
    return _mean(per_pair, weights), {"accuracy": _mean(correct.astype(jnp.float32), weights)}


def sigmoid_contrastive(
    image_embeddings: jax.Array,
    text_embeddings: jax.Array,
    logit_scale: jax.Array,
    weights: jax.Array | None = None,
    *,
    logit_bias: jax.Array,
    num_chunks: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """SigLIP's loss (Zhai et al., 2023, section 3.2): every pair is a yes-or-no question.

    With s_ij = logit_scale <image_i, text_j> + logit_bias, the loss is the mean over i of
    sum_j softplus(-z_ij s_ij), z being 1 on the diagonal and -1 elsewhere.

    Args:
      image_embeddings: [batch, joint], unit length.
      text_embeddings: [batch, joint], unit length.
      logit_scale: scalar factor of the logits (not its logarithm).
      weights: [batch], 1 for a pair that counts and 0 for padding; None for all ones.
      logit_bias: scalar added to the logits.
      num_chunks: as for `softmax_contrastive`.

    Returns:
      As `softmax_contrastive`.

    Raises:
      UserError: num_chunks does not divide the batch.
    """
    images = image_embeddings.astype(jnp.float32)
    texts = text_embeddings.astype(jnp.float32)
    weights, valid = _weights(weights, len(images))
    scale, bias = logit_scale.astype(jnp.float32), logit_bias.astype(jnp.float32)

    def block(carry: None, rows: tuple[jax.Array, ...]) -> Any:
        images, index = rows
        logits = spmd.with_logical_constraint(scale * (images @ texts.T) + bias, ("batch", None))
        losses = jax.nn.softplus(jnp.where(_own_text(index, len(texts)), -logits, logits))
        correct = jnp.argmax(jnp.where(valid, logits, _LEAST), axis=1) == index
        return carry, (jnp.sum(jnp.where(valid, losses, 0.0), axis=1), correct)

    rows = images, jnp.arange(len(images))
    _, (per_pair, correct) = _by_blocks(block, None, rows, num_chunks)
    return _mean(per_pair, weights), {"accuracy": _mean(correct.astype(jnp.float32), weights)}


def _own_text(index: jax.Array, batch: int) -> jax.Array:
    """Where in its block of logits each image meets its own text: bool [rows, batch]."""
    return index[:, None] == jnp.arange(batch)


def _weights(weights: jax.Array | None, batch: int) -> tuple[jax.Array, jax.Array]:
    """(float32 weights, which of them are not zero)."""
    weights = jnp.ones((batch,)) if weights is None else weights
    return weights.astype(jnp.float32), weights > 0


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    valid = jnp.where(weights > 0, values * weights, 0.0)
    return jnp.sum(valid) / jnp.maximum(jnp.sum(weights), 1.0)


def _by_blocks(
    block: Callable[..., Any], carry: Any, rows: tuple[jax.Array, ...], num_chunks: int
) -> Any:
    """Scans `block` over the rows; outputs come back in the rows' order.

    Block c holds the rows c, c + num_chunks, c + 2 num_chunks ...: where rows are split over
    devices, every device has its share of every block.
    """
    batch = len(rows[0])
    if num_chunks < 1 or batch % num_chunks:
        raise UserError(f"num_chunks is {num_chunks}; it must divide the batch of {batch}.")
    if num_chunks == 1:
        return block(carry, rows)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(batch // num_chunks, num_chunks, *x.shape[1:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(batch, *x.shape[2:])

    carry, outputs = jax.lax.scan(jax.checkpoint(block), carry, jax.tree.map(split, rows))
    return carry, jax.tree.map(join, outputs)
