"""Fewer image tokens: which patches a training step keeps.

Four strategies of CLIPA (Li et al., 2023, section 3): a smaller image needs nothing here; 'random',
'grid' and 'block' drop patches. All add position embeddings first, so that kept patches carry them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from clipa_t5x.errors import UserError, check_number
from clipa_t5x.towers import batch_part, layers

Grid = tuple[int, int]  # rows and columns of patches

_WINDOW = 2  # side of the windows that a grid mask thins evenly


def num_kept(grid: Grid, mask_ratio: float, strategy: str = "random") -> int:
    """Patches kept of a grid: floor(N (1 - ratio)), as FLIP and CLIPA count.

    A block keeps the largest rectangle of at most so many patches.

    Args:
      grid: rows and columns of patches.
      mask_ratio: share of the patches to drop, in [0, 1).
      strategy: 'random', 'grid' or 'block'.

    Raises:
      UserError: the ratio is out of range or would keep no patch at all, or the strategy is
        unknown.
    """
    check_number("mask_ratio", mask_ratio, minimum=0)
    if mask_ratio >= 1.0:
        raise UserError(f"mask_ratio is {mask_ratio}; it must be in [0, 1).")
    num_patches = grid[0] * grid[1]
    kept = int(num_patches * (1.0 - mask_ratio))
    if kept < 1:
        raise UserError(f"mask_ratio {mask_ratio} keeps none of {num_patches} patches.")
    counts = {
        "random": lambda: kept,
        "grid": lambda: kept,
        "block": lambda: int(np.prod(block_shapes(grid, kept)[0])),
    }
    return layers.choose("mask_strategy", strategy, counts)()


def block_shapes(grid: Grid, max_patches: int) -> list[Grid]:
    """Shapes of the block to keep: the largest rectangle that fits, the squarest of equal ones.

    Args:
      grid: rows and columns of patches.
      max_patches: most patches in the block.

    Returns:
      One shape, or one and its transpose where both fit into the grid.
    """
    rows, columns = grid
    shapes = [(h, w) for h in range(1, rows + 1) for w in [min(columns, max_patches // h)] if w]
    height, width = max(shapes, key=lambda s: (s[0] * s[1], -abs(s[0] - s[1])))
    turned = (width, height)
    both = turned != (height, width) and width <= rows and height <= columns
    return [(height, width), turned] if both else [(height, width)]


def mask(
    rng: jax.Array,
    patches: jax.Array,
    mask_ratio: float,
    strategy: str,
    part: batch_part.BatchPart = batch_part.WHOLE,
) -> jax.Array:
    """Keeps some of each sample's patches, drawn anew for every sample.

    * 'random': every subset of the right size is equally likely (FLIP, Li et al., 2023, section 3).
    * 'grid': every window of 2 x 2 patches keeps the same number of them, or as nearly as the ratio
      allows; ratio 0.75 keeps exactly one of each. Which ones is random.
    * 'block': one contiguous rectangle at a random place, see `block_shapes`.

    Kept patches stay in their order; they carry their position embeddings with them, so the caller
    adds those first.

    Args:
      rng: random key.
      patches: [batch, rows, columns, width].
      mask_ratio: share of the patches to drop, in [0, 1).
      strategy: one of these names.
      part: which part of the batch this is.

    Returns:
      [batch, num_kept((rows, columns), mask_ratio, strategy), width].

    Raises:
      UserError: as `num_kept`.
    """
    batch, rows, columns, width = patches.shape
    grid = (rows, columns)
    kept = num_kept(grid, mask_ratio, strategy)
    flat = patches.reshape(batch, rows * columns, width)
    if kept == rows * columns:
        return flat
    choices = {
        "random": functools.partial(_random_indices, num_patches=rows * columns, kept=kept),
        "grid": functools.partial(_grid_indices, grid=grid, kept=kept),
        "block": functools.partial(_block_indices, grid=grid, kept=kept),
    }
    indices = layers.choose("mask_strategy", strategy, choices)(rng, batch, part)
    return jnp.take_along_axis(flat, indices[:, :, None], axis=1)


def _lowest(scores: jax.Array, kept: int) -> jax.Array:
    """Indices of each row's `kept` lowest scores, ascending: int32 [batch, kept]."""
    return jnp.sort(jnp.argsort(scores, axis=1)[:, :kept], axis=1)


def _uniform(rng: jax.Array, batch: int, part: batch_part.BatchPart, *shape: int) -> jax.Array:
    """Numbers in [0, 1) for every sample: float32 [batch, *shape]."""
    return part.draw(lambda n: jax.random.uniform(rng, (n, *shape)), batch)


def _random_indices(
    rng: jax.Array, batch: int, part: batch_part.BatchPart, num_patches: int, kept: int
) -> jax.Array:
    return _lowest(_uniform(rng, batch, part, num_patches), kept)


def _grid_indices(
    rng: jax.Array, batch: int, part: batch_part.BatchPart, grid: Grid, kept: int
) -> jax.Array:
    """Shuffles each window, then takes its first, second ... patches until there are enough.

    A patch's score is its place within its window, as a share of the window's size, plus a random
    part smaller than one place: where a round is not finished, its windows are drawn at random, and
    the smaller windows at the edges of odd grids keep their share.
    """
    members, sizes = _windows(grid)
    order_rng, tie_rng = jax.random.split(rng)
    noise = _uniform(order_rng, batch, part, *members.shape)
    noise = jnp.where(members < 0, 2.0, noise)  # absent members come last
    places = jnp.argsort(jnp.argsort(noise, axis=2), axis=2)
    ties = _uniform(tie_rng, batch, part, *members.shape)
    scores = (places + ties) / sizes[:, None]
    # From window order back to row-major order of the grid.
    where = np.argsort(np.where(members < 0, members.size, members).ravel(), kind="stable")
    scores = scores.reshape(batch, -1)[:, where[: grid[0] * grid[1]]]
    return _lowest(scores, kept)


def _windows(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """(patches of each window, int [windows, 4] with -1 for none; sizes, int [windows])."""
    rows, columns = grid
    padded = np.full([-(-n // _WINDOW) * _WINDOW for n in grid], -1)
    padded[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    split = padded.reshape(padded.shape[0] // _WINDOW, _WINDOW, padded.shape[1] // _WINDOW, _WINDOW)
    members = split.transpose(0, 2, 1, 3).reshape(-1, _WINDOW**2)
    return members, np.sum(members >= 0, axis=1)


def _block_indices(
    rng: jax.Array, batch: int, part: batch_part.BatchPart, grid: Grid, kept: int
) -> jax.Array:
    rows, columns = grid
    shapes = block_shapes(grid, kept)
    # Per shape: a block's patches from its corner, and how many corners there are each way.
    offsets = [(np.arange(h)[:, None] * columns + np.arange(w)).ravel() for h, w in shapes]
    corners = np.asarray([(rows - h + 1, columns - w + 1) for h, w in shapes])
    shape_rng, corner_rng = jax.random.split(rng)
    shape = part.draw(lambda n: jax.random.randint(shape_rng, (n,), 0, len(shapes)), batch)
    places = _uniform(corner_rng, batch, part, 2)
    corner = (places * jnp.asarray(corners)[shape]).astype(jnp.int32)
    first = corner[:, 0] * columns + corner[:, 1]
    return first[:, None] + jnp.asarray(np.stack(offsets))[shape]
