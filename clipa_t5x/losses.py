"""Contrastive losses: pure functions of embeddings, in float32.

Both work through the global batch's matrix of logits by blocks of text columns, and every device
holds its own images' rows of a block. With `num_chunks` above 1 only one block, and only its texts,
exist on a device at a time, in the backward pass, too, which gathers and computes them again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import spmd

from clipa_t5x.errors import UserError, check_number

_LEAST = jnp.finfo(jnp.float32).min


def softmax_contrastive(
    image_embeddings: jax.Array,
    text_embeddings: jax.Array,
    logit_scale: jax.Array,
    weights: jax.Array | None = None,
    *,
    logit_bias: jax.Array | None = None,
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
      logit_bias: None: it would cancel out.
      num_chunks: how many blocks of texts to work through one by one; it divides the batch.

    Returns:
      The loss, a float32 scalar, and {'accuracy': share of the images whose own text is the most
      similar of the batch}.

    Raises:
      UserError: num_chunks does not divide the batch, or there is a bias.
    """
    if logit_bias is not None:
        raise UserError(
            "INIT_LOGIT_BIAS is for losses.sigmoid_contrastive; in softmax_contrastive an offset "
            "of all logits cancels out: set it to None."
        )
    images = image_embeddings.astype(jnp.float32)
    texts = text_embeddings.astype(jnp.float32)
    weights, valid = _weights(weights, len(images))
    scale = logit_scale.astype(jnp.float32)

    def block(rows: tuple[Any, jax.Array, jax.Array], columns: tuple[jax.Array, ...]) -> Any:
        """What all blocks so far come to for every row, and the column sums of this one."""
        nearest, total, own = rows
        texts, index, columns_valid = columns
        logits = spmd.with_logical_constraint(scale * (images @ texts.T), ("batch", None))
        logits = jnp.where(valid[:, None] & columns_valid[None, :], logits, _LEAST)
        own = own + jnp.sum(jnp.where(_own_text(len(images), index), logits, 0.0), axis=1)
        # The shift cancels out: no gradient need flow through it.
        shift, _ = closer = _nearest(nearest, logits, index)
        total = total * jnp.exp(nearest[0] - shift) + jnp.exp(logits - shift[:, None]).sum(axis=1)
        return (closer, total, own), jax.nn.logsumexp(logits, axis=0)

    zeros = jnp.zeros((len(images),))
    columns = texts, jnp.arange(len(texts)), valid
    rows, column_sums = _by_blocks(block, (_nothing(images), zeros, zeros), columns, num_chunks)
    (shift, closest), total, own = rows
    per_pair = 0.5 * (shift + jnp.log(total) + column_sums) - own
    return _mean(per_pair, weights), _metrics(closest, weights)


def sigmoid_contrastive(
    image_embeddings: jax.Array,
    text_embeddings: jax.Array,
    logit_scale: jax.Array,
    weights: jax.Array | None = None,
    *,
    logit_bias: jax.Array | None = None,
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
      logit_bias: scalar added to the logits; required.
      num_chunks: as for `softmax_contrastive`.

    Returns:
      As `softmax_contrastive`.

    Raises:
      UserError: num_chunks does not divide the batch, or there is no bias.
    """
    if logit_bias is None:
        raise UserError(
            "losses.sigmoid_contrastive needs a bias of the logits: set INIT_LOGIT_BIAS, to -10 as "
            "SigLIP does."
        )
    images = image_embeddings.astype(jnp.float32)
    texts = text_embeddings.astype(jnp.float32)
    weights, valid = _weights(weights, len(images))
    scale, bias = logit_scale.astype(jnp.float32), logit_bias.astype(jnp.float32)

    def block(rows: tuple[Any, jax.Array], columns: tuple[jax.Array, ...]) -> Any:
        nearest, per_pair = rows
        texts, index, valid = columns
        logits = spmd.with_logical_constraint(scale * (images @ texts.T) + bias, ("batch", None))
        losses = jax.nn.softplus(jnp.where(_own_text(len(images), index), -logits, logits))
        per_pair = per_pair + jnp.sum(jnp.where(valid, losses, 0.0), axis=1)
        return (_nearest(nearest, jnp.where(valid, logits, _LEAST), index), per_pair), None

    rows = _nothing(images), jnp.zeros((len(images),))
    columns = texts, jnp.arange(len(texts)), valid
    ((_, closest), per_pair), _ = _by_blocks(block, rows, columns, num_chunks)
    return _mean(per_pair, weights), _metrics(closest, weights)


def _own_text(batch: int, index: jax.Array) -> jax.Array:
    """Where in a block of the texts `index` each image meets its own: bool [batch, texts]."""
    return jnp.arange(batch)[:, None] == index


def _nothing(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Before the first block of `_nearest`."""
    return jnp.full((len(images),), _LEAST), jnp.full((len(images),), len(images))


def _nearest(
    nearest: tuple[jax.Array, jax.Array], logits: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(greatest logit, its text) of every row with one more block; of equals the first text."""
    logits = jax.lax.stop_gradient(logits)
    greatest, text = logits.max(axis=1), index[jnp.argmax(logits, axis=1)]
    is_first = (greatest == nearest[0]) & (text < nearest[1])
    wins = (greatest > nearest[0]) | is_first
    return jnp.maximum(greatest, nearest[0]), jnp.where(wins, text, nearest[1])


def _metrics(closest: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
    correct = closest == jnp.arange(len(closest))
    return {"accuracy": _mean(correct.astype(jnp.float32), weights)}


def _weights(weights: jax.Array | None, batch: int) -> tuple[jax.Array, jax.Array]:
    """(float32 weights, which of them are not zero)."""
    weights = jnp.ones((batch,)) if weights is None else weights
    return weights.astype(jnp.float32), weights > 0


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    valid = jnp.where(weights > 0, values * weights, 0.0)
    return jnp.sum(valid) / jnp.maximum(jnp.sum(weights), 1.0)


def _by_blocks(
    block: Callable[..., Any], rows: Any, columns: tuple[jax.Array, ...], num_chunks: int
) -> tuple[Any, Any]:
    """Scans `block` over the columns; what it gives for them comes back in their order.

    Block c holds the columns c, c + num_chunks, c + 2 num_chunks ...: where texts are split over
    devices, every device has its share of every block, and nothing but that block is gathered.
    """
    batch = len(columns[0])
    check_number("LOSS_CHUNKS", num_chunks, minimum=1, whole=True)
    if batch % num_chunks:
        some = ", ".join(str(2**i) for i in range(11) if batch % 2**i == 0)
        raise UserError(
            f"LOSS_CHUNKS is {num_chunks}; it must divide the batch of {batch}: choose one of "
            f"{some}, or another divisor."
        )
    if num_chunks == 1:
        return block(rows, columns)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(batch // num_chunks, num_chunks, *x.shape[1:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(batch, *x.shape[2:])

    def gathered(rows: Any, columns: tuple[jax.Array, ...]) -> Any:
        texts, *rest = columns
        # So the gradient, too, is only whole block by block.
        texts = spmd.with_logical_constraint(texts, ("batch", None))
        texts = spmd.with_logical_constraint(texts, (None, None))
        return block(rows, (texts, *rest))

    rows, outputs = jax.lax.scan(jax.checkpoint(gathered), rows, jax.tree.map(split, columns))
    return rows, jax.tree.map(join, outputs)
