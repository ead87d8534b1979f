"""Contrastive losses: pure functions of embeddings, in float32."""

import jax
import jax.numpy as jnp
from flax.linen import spmd


def softmax_contrastive(
    image_embeddings: jax.Array,
    text_embeddings: jax.Array,
    logit_scale: jax.Array,
    weights: jax.Array | None = None,
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

    Returns:
      The loss, a float32 scalar, and {'accuracy': share of the images whose own text is the most
      similar of the batch}.
    """
    images = image_embeddings.astype(jnp.float32)
    texts = text_embeddings.astype(jnp.float32)
    batch = images.shape[0]
    weights = jnp.ones((batch,), jnp.float32) if weights is None else weights.astype(jnp.float32)
    logits = logit_scale.astype(jnp.float32) * (images @ texts.T)
    logits = spmd.with_logical_constraint(logits, ("batch", None))
    valid = weights > 0
    logits = jnp.where(valid[:, None] & valid[None, :], logits, jnp.finfo(jnp.float32).min)
    own = jnp.diagonal(logits)
    per_pair = 0.5 * (jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)) - own
    correct = jnp.argmax(logits, axis=1) == jnp.arange(batch)
    total = jnp.maximum(weights.sum(), 1.0)
    loss = jnp.sum(jnp.where(valid, per_pair, 0.0)) / total
    return loss, {"accuracy": jnp.sum(correct * weights) / total}
