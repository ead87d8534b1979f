import colorsys
import itertools

import numpy as np
import pytest

from clipa_t5x.data import drawing

SIZE = 32
LIGHT = (0.0, -1.0)


def draw(shape="circle", color="red", pattern="solid", radius=0.4, size=SIZE, seed=0):
    image = np.full((size, size, 3), 0.6, np.float32)
    drawing.draw_object(
        image,
        shape=shape,
        color=color,
        pattern=pattern,
        center=(0.5, 0.5),
        radius=radius,
        light=LIGHT,
        rng=np.random.default_rng(seed),
    )
    return image


def middle(image, radius):
    axis = (np.arange(len(image)) + 0.5) / len(image) - 0.5
    return image[np.hypot(axis[:, None], axis[None, :]) < radius]


def silhouette(shape, size=SIZE):
    # Red on gray: shadows leave the saturation alone.
    image = draw(shape, size=size)
    return (image.max(axis=2) - image.min(axis=2)) > 0.25


@pytest.mark.parametrize("color", drawing.COLORS)
def test_hue_is_the_named_colours(color):
    low, high = drawing.COLORS[color][0]
    hues = []
    for seed in range(5):
        rgb = np.median(middle(draw(color=color, seed=seed), 0.2), axis=0)
        hue = 360 * colorsys.rgb_to_hsv(*map(float, rgb))[0]
        assert low - 4 <= (hue + 15) % 360 - 15 <= high + 4
        hues.append(hue)
    assert len({round(hue, 1) for hue in hues}) > 1  # A distribution, not a constant.


def test_named_colours_keep_their_distance():
    ranges = sorted(hue for hue, _, _ in drawing.COLORS.values())
    gaps = [right[0] - left[1] for left, right in itertools.pairwise(ranges)]
    assert min([*gaps, ranges[0][0] + 360 - ranges[-1][1]]) >= 15


def test_silhouettes_differ_at_24_pixels():
    masks = {shape: silhouette(shape, size=24) for shape in drawing.SHAPES}
    for a, b in itertools.combinations(drawing.SHAPES, 2):
        overlap = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
        assert overlap < 0.85, (a, b)


@pytest.mark.parametrize("shape", drawing.SHAPES)
def test_objects_fill_their_radius(shape):
    rows, columns = np.nonzero(silhouette(shape))
    assert 0.75 * 2 * 0.4 * SIZE < max(np.ptp(rows), np.ptp(columns)) + 1 < 1.25 * 2 * 0.4 * SIZE
    assert abs(rows.mean() + 0.5 - SIZE / 2) < 2.6
    assert abs(columns.mean() + 0.5 - SIZE / 2) < 2.6


@pytest.mark.parametrize("color", drawing.COLORS)
@pytest.mark.parametrize("pattern", drawing.PATTERNS[1:])
def test_patterns_survive_shrinking(color, pattern):
    def contrast(pattern):
        image = draw("circle", color, pattern, radius=0.25, size=64, seed=3)
        small = image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        return middle(small, 0.15).mean(axis=1).std()

    assert contrast(pattern) > 2.5 * contrast("solid")


def test_objects_may_stick_out_of_the_image():
    image = np.full((16, 16, 3), 0.5, np.float32)
    before = image.copy()
    for center in ((0.0, 0.0), (1.0, 1.0), (-0.1, 0.5)):
        drawing.draw_object(
            image,
            shape="star",
            color="blue",
            pattern="dotted",
            center=center,
            radius=0.3,
            light=LIGHT,
            rng=np.random.default_rng(0),
        )
    assert np.isfinite(image).all()
    assert np.array_equal(image[6:10, 9:11], before[6:10, 9:11])


def test_backgrounds_are_what_they_are_called():
    images = {
        name: np.mean([drawing.background(name, np.random.default_rng(i), 16) for i in range(8)], 0)
        for name in drawing.BACKGROUNDS
    }
    means = {name: image.mean(axis=(0, 1)) for name, image in images.items()}
    assert means["dark"].max() < 0.2 < 0.8 < means["light"].min()
    assert means["grassy"].argmax() == 1
    assert means["cloudy"].argmax() == 2
    assert means["sandy"].argmax() == means["wooden"].argmax() == 0
    assert means["sandy"].mean() > means["wooden"].mean() + 0.2


def test_finish_quantises_and_adds_noise():
    image = drawing.finish(np.full((32, 32, 3), 0.5, np.float32), np.random.default_rng(0))
    assert image.dtype == np.uint8
    assert 100 < image.mean() < 140
    assert 1 < image.std() < 12
    assert drawing.finish(np.full((8, 8, 3), 2, np.float32), np.random.default_rng(0)).max() == 255
