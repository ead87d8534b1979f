"""Sin-cos position tables, in one and two dimensions."""

import numpy as np

from clipa_t5x.errors import UserError


def sincos_2d(height: int, width: int, dim: int) -> np.ndarray:
    """The image tower's fixed position table (MoCo v3's layout, as CLIPA uses it).

    With K = dim / 4 and omega_k = 10000^(-k / (K - 1)), the row of the patch at (y, x) is
    [sin(x omega), cos(x omega), sin(y omega), cos(y omega)]. A row of zeros for the class token
    comes first.

    Args:
      height: patches from top to bottom.
      width: patches from left to right.
      dim: the tower's width; a multiple of 4 and at least 8.

    Returns:
      float32 [1 + height * width, dim], patches in row-major order.
    """
    if dim % 4 or dim < 8:
        raise UserError(
            f"sincos2d needs a tower width that is a multiple of 4 and >= 8; it is {dim}."
        )
    quarter = dim // 4
    omega = 10_000.0 ** (-np.arange(quarter) / (quarter - 1))
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    by_x, by_y = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega
    table = np.concatenate([np.sin(by_x), np.cos(by_x), np.sin(by_y), np.cos(by_y)], axis=1)
    return np.concatenate([np.zeros((1, dim)), table]).astype(np.float32)


def sincos_1d(length: int, dim: int) -> np.ndarray:
    """A fixed position table for text: half sines, half cosines.

    The i-th frequency is exp(-i ln(10000) / (dim / 2 - 1)).

    Returns:
      float32 [length, dim].
    """
    if dim % 2 or dim < 4:
        raise UserError(f"sincos1d needs an even tower width >= 4; it is {dim}.")
    half = dim // 2
    angles = np.arange(length)[:, None] * np.exp(-np.arange(half) * np.log(10_000.0) / (half - 1))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
