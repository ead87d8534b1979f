import math

import numpy as np
import pytest

from clipa_t5x.towers import position_embeddings


def test_sincos_2d_begins_with_a_zero_row_for_the_class_token():
    table = position_embeddings.sincos_2d(3, 4, 16)
    assert table.shape == (1 + 3 * 4, 16) and table.dtype == np.float32
    np.testing.assert_array_equal(table[0], np.zeros(16))


def test_sincos_2d_of_the_first_patch_is_zeros_and_ones():
    origin = position_embeddings.sincos_2d(3, 4, 16)[1]
    np.testing.assert_array_equal(origin, [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4)


def test_sincos_2d_by_hand():
    # Width 12: three frequencies, 10000^(0, -1/2, -1). Row 2, column 3 of a grid of 5 columns.
    omega = (1.0, 0.01, 0.0001)
    expected = [
        *[math.sin(3 * w) for w in omega],
        *[math.cos(3 * w) for w in omega],
        *[math.sin(2 * w) for w in omega],
        *[math.cos(2 * w) for w in omega],
    ]
    table = position_embeddings.sincos_2d(4, 5, 12)
    np.testing.assert_allclose(table[1 + 2 * 5 + 3], expected, rtol=1e-6, atol=1e-7)


def test_sincos_2d_of_a_part_of_a_grid_is_part_of_its_table():
    # What lets one model see every resolution.
    whole = position_embeddings.sincos_2d(6, 7, 16)[1:].reshape(6, 7, 16)
    part = position_embeddings.sincos_2d(4, 3, 16)[1:].reshape(4, 3, 16)
    np.testing.assert_array_equal(whole[:4, :3], part)


@pytest.mark.parametrize("dim", [4, 10, 18])
def test_sincos_2d_refuses_widths_without_whole_quarters(dim):
    with pytest.raises(ValueError, match=f"multiple of 4 and >= 8; it is {dim}"):
        position_embeddings.sincos_2d(2, 2, dim)


def test_sincos_1d_by_hand():
    omega = (1.0, math.exp(-math.log(10_000) / 2), 0.0001)
    expected = [*[math.sin(5 * w) for w in omega], *[math.cos(5 * w) for w in omega]]
    table = position_embeddings.sincos_1d(8, 6)
    assert table.shape == (8, 6) and table.dtype == np.float32
    np.testing.assert_array_equal(table[0], [0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(table[5], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dim", [2, 7])
def test_sincos_1d_refuses_widths_without_halves(dim):
    with pytest.raises(ValueError, match=f"even tower width >= 4; it is {dim}"):
        position_embeddings.sincos_1d(3, dim)
