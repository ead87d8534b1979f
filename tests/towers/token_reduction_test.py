import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipa_t5x.towers import token_reduction

STRATEGIES = ("random", "grid", "block")


@pytest.mark.parametrize("strategy", ["random", "grid"])
@pytest.mark.parametrize(
    ("side", "mask_ratio", "kept"),
    [(16, 0.3, 179), (16, 0.4, 153), (24, 0.4, 345), (14, 0.5, 98), (14, 0.75, 49), (6, 0.0, 36)],
)
def test_num_kept_is_clipas(side, mask_ratio, kept, strategy):
    assert token_reduction.num_kept((side, side), mask_ratio, strategy) == kept


@pytest.mark.parametrize(
    ("side", "mask_ratio", "kept"),
    [(16, 0.25, 192), (16, 0.5, 128), (16, 0.75, 64), (16, 0.4, 150), (24, 0.4, 345), (5, 0.3, 16)],
)
def test_a_block_is_the_largest_rectangle_within_the_count(side, mask_ratio, kept):
    assert token_reduction.num_kept((side, side), mask_ratio, "block") == kept


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("grid", [(16, 16), (5, 5), (7, 4), (1, 6)])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.3, 0.75])
def test_as_many_are_kept_as_are_counted(grid, mask_ratio, strategy):
    patches = jnp.zeros((2, *grid, 3))
    kept = token_reduction.num_kept(grid, mask_ratio, strategy)
    masked = jax.eval_shape(
        lambda rng: token_reduction.mask(rng, patches, mask_ratio, strategy), jax.random.key(0)
    )
    assert masked.shape == (2, kept, 3)


@pytest.mark.parametrize("grid", [(1, 4), (2, 5), (3, 4), (5, 5), (5, 1)])
def test_block_shapes_are_brute_forces(grid):
    for most in range(1, grid[0] * grid[1] + 1):
        fitting = [
            (h, w) for h in range(1, grid[0] + 1) for w in range(1, grid[1] + 1) if h * w <= most
        ]
        area = max(h * w for h, w in fitting)
        skew = min(abs(h - w) for h, w in fitting if h * w == area)
        best = {s for s in fitting if s[0] * s[1] == area and abs(s[0] - s[1]) == skew}
        assert set(token_reduction.block_shapes(grid, most)) == best


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.0, 1.5])
def test_num_kept_refuses_ratios_out_of_range(mask_ratio):
    with pytest.raises(ValueError, match=r"mask_ratio is .* it must be"):
        token_reduction.num_kept((4, 4), mask_ratio)


def test_num_kept_refuses_to_keep_nothing():
    with pytest.raises(ValueError, match=r"mask_ratio 0.8 keeps none of 4 patches"):
        token_reduction.num_kept((2, 2), 0.8)


def test_unknown_strategies_are_refused():
    with pytest.raises(ValueError, match=r"mask_strategy is 'blok'; .*'block', 'grid', 'random'"):
        token_reduction.num_kept((2, 2), 0.5, "blok")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ratio_zero_leaves_patches_as_they_are(strategy):
    patches = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
    masked = token_reduction.mask(jax.random.key(1), patches, 0.0, strategy)
    np.testing.assert_array_equal(masked, patches.reshape(2, 9, 4))


def _indices(samples, grid, mask_ratio, strategy="random", seed=0):
    """Indices of the patches that a mask keeps, [samples, kept]."""
    patches = np.tile(np.arange(grid[0] * grid[1]).reshape(*grid, 1), (samples, 1, 1, 1))
    rng = jax.random.key(seed)
    return np.asarray(token_reduction.mask(rng, jnp.asarray(patches), mask_ratio, strategy))[..., 0]


def _chi_square(counts):
    expected = np.sum(counts) / len(counts)
    return np.sum((np.asarray(counts) - expected) ** 2) / expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kept_patches_are_distinct_and_in_order(strategy):
    for grid in ((4, 4), (5, 3)):
        indices = _indices(200, grid, 0.5, strategy)
        assert np.all(np.diff(indices, axis=1) > 0)
        assert indices.min() >= 0 and indices.max() < grid[0] * grid[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_samples_of_a_batch_and_keys_have_masks_of_their_own(strategy):
    masks = _indices(50, (6, 6), 0.5, strategy)
    # A block has but eight places here.
    assert len({tuple(mask) for mask in masks}) == (8 if strategy == "block" else 50)
    assert not np.array_equal(masks, _indices(50, (6, 6), 0.5, strategy, seed=1))


def test_every_patch_is_kept_equally_often():
    samples, num_patches, kept = 8192, 16, 8
    counts = np.bincount(_indices(samples, (4, 4), 0.5).ravel(), minlength=num_patches)
    share = kept / num_patches
    variance = samples * share * (1 - share)
    chi_square = np.sum((counts - samples * share) ** 2) / variance
    chi_square *= (num_patches - 1) / num_patches  # A draw without replacement.
    assert chi_square < 37.7  # The 99.9 % quantile at 15 degrees of freedom.


def test_every_subset_is_equally_likely():
    masks = [tuple(mask) for mask in _indices(8192, (1, 5), 0.6)]
    subsets = list(itertools.combinations(range(5), 2))
    assert set(masks) == set(subsets)
    assert _chi_square([masks.count(s) for s in subsets]) < 27.9  # 99.9 %, 9 degrees of freedom.


@pytest.mark.parametrize(("mask_ratio", "of_four"), [(0.75, 1), (0.5, 2), (0.25, 3)])
def test_a_grid_mask_keeps_as_many_of_every_window(mask_ratio, of_four):
    indices = _indices(100, (6, 8), mask_ratio, "grid")
    windows = indices // 8 // 2 * 4 + indices % 8 // 2
    counts = np.stack([np.bincount(row, minlength=12) for row in windows])
    np.testing.assert_array_equal(counts, of_four)


def test_a_grid_mask_of_any_ratio_differs_by_one_between_windows():
    indices = _indices(100, (6, 8), 0.3, "grid")  # 33 of 48: 2.75 of four
    windows = indices // 8 // 2 * 4 + indices % 8 // 2
    counts = np.stack([np.bincount(row, minlength=12) for row in windows])
    assert set(counts.ravel()) == {2, 3}


def test_every_patch_of_a_window_is_kept_equally_often():
    counts = np.bincount(_indices(8192, (4, 4), 0.75, "grid").ravel(), minlength=16)
    assert _chi_square(counts) < 32.9  # 99.9 %, 12 degrees of freedom: three per window.


def test_odd_grids_keep_their_edges_as_often():
    samples = 8192
    share = np.bincount(_indices(samples, (5, 5), 0.5, "grid").ravel(), minlength=25) / samples
    np.testing.assert_allclose(share, 12 / 25, atol=0.04)


def test_every_place_of_a_block_is_equally_likely():
    masks = [tuple(mask) for mask in _indices(8192, (4, 4), 0.5, "block")]
    places = set(masks)
    # 2 x 4 patches at three heights, 4 x 2 at three places across.
    assert (0, 1, 2, 3, 4, 5, 6, 7) in places and (1, 2, 5, 6, 9, 10, 13, 14) in places
    assert len(places) == 6
    assert _chi_square([masks.count(p) for p in places]) < 20.5  # 99.9 %, 5 degrees of freedom.


def test_a_block_is_a_rectangle():
    for mask in _indices(100, (5, 7), 0.5, "block"):
        rows, columns = np.unique(mask // 7), np.unique(mask % 7)
        assert np.all(np.diff(rows) == 1) and np.all(np.diff(columns) == 1)
        assert len(rows) * len(columns) == len(mask)
