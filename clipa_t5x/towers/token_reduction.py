"""Fewer image tokens: which patches a training step keeps."""

import jax
import jax.numpy as jnp


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """Patches kept of `num_patches`: floor(N (1 - ratio)), as FLIP and CLIPA count.

    Raises:
      ValueError: the ratio is outside [0, 1) or would keep no patch at all.
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio is {mask_ratio}; it must be in [0, 1).")
    kept = int(num_patches * (1.0 - mask_ratio))
    if kept < 1:
        raise ValueError(f"mask_ratio {mask_ratio} keeps none of {num_patches} patches.")
    return kept


def random_mask(rng: jax.Array, patches: jax.Array, mask_ratio: float) -> jax.Array:
    """Keeps a random subset of each sample's patches (Li et al., FLIP, section 3).

    Every subset of the right size is equally likely. Kept patches stay in their order; they carry
    their position embeddings with them, so the caller adds those first.

    Args:
      rng: random key.
      patches: [batch, patches, width].
      mask_ratio: share of the patches to drop, in [0, 1).

    Returns:
      [batch, num_kept(patches, mask_ratio), width].
    """
    batch, num_patches, _ = patches.shape
    kept = num_kept(num_patches, mask_ratio)
    if kept == num_patches:
        return patches
    noise = jax.random.uniform(rng, (batch, num_patches))
    chosen = jnp.sort(jnp.argsort(noise, axis=1)[:, :kept], axis=1)
    return jnp.take_along_axis(patches, chosen[:, :, None], axis=1)
