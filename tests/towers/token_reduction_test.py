import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipa_t5x.towers import token_reduction


@pytest.mark.parametrize(
    ("num_patches", "mask_ratio", "kept"),
    [
        (256, 0.3, 179),
        (256, 0.4, 153),
        (576, 0.4, 345),
        (196, 0.5, 98),
        (196, 0.75, 49),
        (36, 0.0, 36),
    ],
)
def test_num_kept_is_clipas(num_patches, mask_ratio, kept):
    assert token_reduction.num_kept(num_patches, mask_ratio) == kept
    patches = jnp.zeros((1, num_patches, 1))
    masked = jax.eval_shape(
        lambda rng: token_reduction.random_mask(rng, patches, mask_ratio), jax.random.key(0)
    )
    assert masked.shape == (1, kept, 1)


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.0, 1.5])
def test_num_kept_refuses_ratios_out_of_range(mask_ratio):
    with pytest.raises(ValueError, match=r"it must be in \[0, 1\)"):
        token_reduction.num_kept(16, mask_ratio)


def test_num_kept_refuses_to_keep_nothing():
    with pytest.raises(ValueError, match=r"mask_ratio 0.8 keeps none of 4 patches"):
        token_reduction.num_kept(4, 0.8)


def test_ratio_zero_leaves_patches_as_they_are():
    patches = jax.random.normal(jax.random.key(0), (2, 9, 4))
    masked = token_reduction.random_mask(jax.random.key(1), patches, 0.0)
    np.testing.assert_array_equal(masked, patches)


def _indices(samples, num_patches, mask_ratio, seed=0):
    """Indices of the patches that a mask keeps, [samples, kept]."""
    patches = np.tile(np.arange(num_patches), (samples, 1))[:, :, None]
    rng = jax.random.key(seed)
    return np.asarray(token_reduction.random_mask(rng, jnp.asarray(patches), mask_ratio))[:, :, 0]


def test_kept_patches_are_distinct_and_in_order():
    assert np.all(np.diff(_indices(200, 16, 0.5), axis=1) > 0)


def test_samples_of_a_batch_and_keys_have_masks_of_their_own():
    masks = _indices(50, 36, 0.5)
    assert len({tuple(mask) for mask in masks}) == 50
    assert not np.array_equal(masks, _indices(50, 36, 0.5, seed=1))


def test_every_patch_is_kept_equally_often():
    samples, num_patches, kept = 8192, 16, 8
    counts = np.bincount(_indices(samples, num_patches, 0.5).ravel(), minlength=num_patches)
    share = kept / num_patches
    variance = samples * share * (1 - share)
    chi_square = np.sum((counts - samples * share) ** 2) / variance
    chi_square *= (num_patches - 1) / num_patches  # A draw without replacement.
    assert chi_square < 37.7  # The 99.9 % quantile at 15 degrees of freedom.


def test_every_subset_is_equally_likely():
    samples = 8192
    masks = [tuple(mask) for mask in _indices(samples, 5, 0.6)]
    subsets = list(itertools.combinations(range(5), 2))
    assert set(masks) == set(subsets)
    expected = samples / len(subsets)
    chi_square = sum((masks.count(subset) - expected) ** 2 / expected for subset in subsets)
    assert chi_square < 27.9  # The 99.9 % quantile at 9 degrees of freedom.
