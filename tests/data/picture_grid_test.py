import struct

import numpy as np
import pytest
import tiny_tars
from PIL import ImageFont

from clipa_t5x.data import picture_grid

FONT = ImageFont.load_default(11)


def test_pictures_stand_in_rows_with_captions_below():
    pictures = [(tiny_tars.image(i, 300, 200), f"caption {i}") for i in range(5)]
    grid = np.asarray(picture_grid.draw([*pictures, (None, "bad")]))
    assert grid.shape[1] > grid.shape[0] * 0.9  # three columns, two rows
    side = picture_grid.PICTURE
    cell = grid[8 : 8 + side, 8 : 8 + side]
    assert (cell[80, 80] != 255).any() and (cell[80, 5] == 255).all()  # centred, 107 pixels wide
    below = grid[8 + side : 8 + side + 20, 8 : 8 + side]
    assert below.min() < 100
    last = grid[grid.shape[0] // 2 + 40, grid.shape[1] - 80]
    assert last.tolist() == [225, 225, 225]


def test_small_pictures_are_not_enlarged():
    grid = np.asarray(picture_grid.draw([(tiny_tars.image(0, 20, 20), "")]))
    assert (grid != 255).any(-1).sum() <= 400


@pytest.mark.parametrize(
    "text", ["", "one", "a few short words that take two lines or so", "word " * 99, "x" * 500]
)
def test_lines_fit(text):
    lines = picture_grid.wrap(text, FONT, 160, 4)
    assert len(lines) <= 4
    assert all(0 < FONT.getlength(line) <= 160 for line in lines)
    if len(text) < 100:
        assert " ".join(lines) == text
    else:
        assert lines[-1].endswith("...")


def test_no_pictures():
    picture_grid.draw([])


def test_pictures_that_cannot_be_decoded_are_gray():
    png = tiny_tars.image(0, kind="PNG")
    huge = png[:16] + struct.pack(">II", 60_000, 60_000) + png[24:]
    for data in (b"", b"rubbish", huge, png[:100], b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        grid = np.asarray(picture_grid.draw([(data, "")]))
        assert grid[88, 88].tolist() == [225, 225, 225]
