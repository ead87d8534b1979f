import io

import numpy as np
import pytest
import tensorflow as tf
import tiny_records
from PIL import Image

from clipa_t5x.data import preprocessors
from clipa_t5x.errors import UserError


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return tf.constant(buffer.getvalue())


def size_of(encoded):
    image = Image.open(io.BytesIO(encoded.numpy()))
    return tf.constant([image.height, image.width])


def apply(preprocess, encoded, size, seed, **kwargs):
    """As a task does, which knows every image's size before it is decoded."""
    return preprocess(encoded, size_of(encoded), size, seed, **kwargs)


def seed(*values):
    return tf.constant(values or (0, 0), tf.int64)


def ramp(height, width):
    """A picture that tells its pixels' places: red is x, green is y, on the scale 0-255."""
    x = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    y = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return np.stack([x, y, np.full_like(x, 128)], axis=-1).astype(np.uint8)


SHAPES = [(20, 80), (80, 20), (1, 50), (50, 1), (1, 1), (16, 16), (37, 41), (300, 400)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [16, 21])
def test_every_preprocessor_gives_a_square(shape, size):
    for preprocess in (
        preprocessors.squash,
        preprocessors.center_crop,
        preprocessors.InceptionCrop(),
    ):
        image = apply(preprocess, png(ramp(*shape)), size, seed()).numpy()
        assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
        assert set(np.unique(image[..., 2])) <= {127, 128}  # truncated


def test_nothing_happens_to_an_image_of_the_right_size():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    for preprocess in (preprocessors.squash, preprocessors.center_crop):
        np.testing.assert_array_equal(apply(preprocess, png(image), 16, seed()), image)


@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (64, 64)])
def test_squash_takes_the_whole_image(shape):
    image = apply(preprocessors.squash, png(ramp(*shape)), 16, seed()).numpy().astype(float)
    centres = (np.arange(16) + 0.5) / 16 * 255
    assert np.abs(image[8, :, 0] - centres).max() < 4
    assert np.abs(image[:, 8, 1] - centres).max() < 4


@pytest.mark.parametrize("shape", [(32, 96), (96, 32)])
def test_center_crop_takes_the_middle_third(shape):
    image = apply(preprocessors.center_crop, png(ramp(*shape)), 16, seed()).numpy().astype(float)
    long, short = (0, 1) if shape[1] > shape[0] else (1, 0)
    image = image if long == 0 else image.transpose(1, 0, 2)
    assert np.abs(image[8, :, long] - (np.arange(16) + 16.5) / 48 * 255).max() < 4
    assert np.abs(image[:, 8, short] - (np.arange(16) + 0.5) / 16 * 255).max() < 9


def test_resize_is_pillows_up_to_truncation():
    """Antialiased, half-pixel centres; Pillow rounds to the nearest where CLIPA truncates."""
    image = np.random.default_rng(0).integers(0, 256, (60, 44, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))
    difference = expected.astype(int) - preprocessors.resize(image, 16, 16).numpy()
    assert difference.min() >= -1
    assert difference.max() <= 1
    assert 0.3 < difference.mean() < 0.7


def crop_box(image):
    """(width, height) of a crop of `ramp`, as shares of the whole, from its inner pixels."""
    inner = image.astype(float)
    n = inner.shape[0]
    width = (inner[:, -2, 0].mean() - inner[:, 1, 0].mean()) / 255 * n / (n - 3)
    height = (inner[-2, :, 1].mean() - inner[1, :, 1].mean()) / 255 * n / (n - 3)
    return width, height


@pytest.mark.parametrize("bounds", [(0.4, 1.0), (0.08, 0.3)])
def test_inception_crop_keeps_to_its_bounds(bounds):
    low, high = bounds
    encoded = png(ramp(200, 240))
    whole = size_of(encoded)

    def crop(i):
        preprocess = preprocessors.InceptionCrop(min_area=low, max_area=high)
        return preprocess(encoded, whole, 32, tf.stack([tf.constant(0, tf.int64), i]))

    crops = tf.map_fn(crop, tf.range(150, dtype=tf.int64), tf.uint8).numpy()
    boxes = np.array([crop_box(image) for image in crops])
    areas, aspects = boxes.prod(axis=1), boxes[:, 0] * 240 / (boxes[:, 1] * 200)
    assert areas.min() > low - 0.03
    assert areas.max() < high + 0.03
    assert np.ptp(areas) > 0.7 * (high - low)
    assert aspects.min() > 3 / 4 - 0.05
    assert aspects.max() < 4 / 3 + 0.05
    assert np.ptp(aspects) > 0.4


def test_inception_crop_is_a_function_of_the_seed():
    encoded = png(ramp(64, 64))
    crops = {
        s: apply(preprocessors.InceptionCrop(), encoded, 16, seed(*s)).numpy()
        for s in [(0, 0), (0, 1), (1, 0), (0, 2**40), (7, 123)]
    }
    for s, crop in crops.items():
        again = apply(preprocessors.InceptionCrop(), encoded, 16, seed(*s)).numpy()
        np.testing.assert_array_equal(again, crop)
    assert len({crop.tobytes() for crop in crops.values()}) == len(crops)


def test_the_same_crop_inside_a_dataset():
    encoded = png(ramp(64, 64))
    seeds = [(0, i) for i in range(8)]
    ds = tf.data.Dataset.from_tensor_slices(tf.constant(seeds, tf.int64))
    whole = size_of(encoded)
    ds = ds.map(lambda s: preprocessors.InceptionCrop()(encoded, whole, 16, s))
    for s, crop in zip(seeds, ds.as_numpy_iterator(), strict=True):
        expected = apply(preprocessors.InceptionCrop(), encoded, 16, seed(*s))
        np.testing.assert_array_equal(crop, expected)


def encode(image, form):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=form)
    return tf.constant(buffer.getvalue())


@pytest.mark.parametrize("form, tolerance", [("PNG", 0), ("BMP", 0), ("JPEG", 20)])
def test_formats(form, tolerance):
    image = ramp(40, 30)
    decoded = preprocessors.decode(encode(image, form)).numpy().astype(int)
    assert np.abs(decoded - image).max() <= tolerance


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF"])
def test_grey_images_become_coloured(form):
    grey = np.full((20, 30), 77, np.uint8)
    decoded = preprocessors.decode(encode(grey, form)).numpy()
    assert decoded.shape == (20, 30, 3)
    np.testing.assert_array_equal(decoded, 77)


def test_transparency_is_dropped():
    image = np.dstack([ramp(10, 12), np.full((10, 12), 9, np.uint8)])
    np.testing.assert_array_equal(preprocessors.decode(png(image)), image[..., :3])


def test_encode_png_keeps_every_pixel():
    image = tiny_records.picture(3)
    decoded = np.asarray(Image.open(io.BytesIO(preprocessors.encode_png(image))))
    np.testing.assert_array_equal(decoded, image)


# Scaled decoding.


def photo(height, width, seed=0):
    """Something with the spectrum of a photograph, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    waves = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    waves[0, 0] = 1
    planes = []
    for _ in range(3):
        spectrum = np.fft.fft2(rng.normal(size=(height, width))) / waves**1.3
        plane = np.fft.ifft2(spectrum).real
        planes.append((plane - plane.mean()) / plane.std() * 50 + 120)
    return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)


def psnr(a, b):
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 10 * np.log10(255**2 / error)


def jpeg(image, **kwargs):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95, **kwargs)
    return tf.constant(buffer.getvalue())


@pytest.mark.parametrize("kwargs", [{}, {"subsampling": 0}, {"progressive": True}])
@pytest.mark.parametrize("scale, least", [(1.5, 38), (2.2, 35), (5, 35), (9.5, 35)])
def test_scaled_decoding_is_close_to_full_decoding(scale, least, kwargs):
    """Whatever fraction is decoded; and at the same place, or the likeness would be much less.

    The box is of whole pixels at every fraction: others are rounded to such.
    """
    size = 48
    sides = [int(size * scale) // 8 * 8, int(1.1 * size * scale) // 8 * 8]
    encoded = jpeg(photo(sides[0] + 40, sides[1] + 40), **kwargs)
    box = tf.constant([8, 24, *sides])
    full = preprocessors.full_decode(encoded, box, size).numpy()
    scaled = preprocessors.scaled_decode(encoded, box, size).numpy()
    assert psnr(full, scaled) > least
    moved = preprocessors.full_decode(encoded, box + [int(scale), 0, 0, 0], size).numpy()
    assert psnr(full, moved) < least - 4


def test_a_box_of_the_right_size_is_copied():
    for image, encode_fn in ((photo(40, 50), png), (np.full((40, 50, 3), 93, np.uint8), jpeg)):
        box = tf.constant([5, 9, 16, 16])
        found = preprocessors.scaled_decode(encode_fn(image), box, 16).numpy()
        np.testing.assert_array_equal(found, image[5:21, 9:25])


def test_grey_jpegs_become_coloured():
    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(buffer, format="JPEG")
    found = preprocessors.scaled_decode(
        tf.constant(buffer.getvalue()), tf.constant([0, 0, 64, 64]), 16
    )
    np.testing.assert_array_equal(found, np.full((16, 16, 3), 77))


@pytest.mark.parametrize("decode", ["scaled", "full"])
def test_a_crop_is_of_the_same_place_whatever_the_decoder(decode):
    image = ramp(300, 200)
    preprocess = preprocessors.InceptionCrop(decode=decode)
    crop = apply(preprocess, jpeg(image, subsampling=0), 32, seed(4, 5)).numpy()
    plain = apply(preprocessors.InceptionCrop(), png(image), 32, seed(4, 5)).numpy()
    assert np.abs(crop.astype(float) - plain)[1:-1, 1:-1].mean() < 1.5


def test_an_unknown_decoder_is_refused():
    with pytest.raises(UserError, match="DECODE is 'fast'; it must be 'scaled' or 'full'"):
        preprocessors.InceptionCrop(decode="fast")


@pytest.mark.parametrize("height, width", [(300, 200), (128, 128), (80, 320), (97, 120)])
def test_crops_are_distributed_as_tensorflows(height, width):
    count = 3000
    seeds = tf.stack(
        [tf.fill([count], tf.constant(3, tf.int64)), tf.range(count, dtype=tf.int64)], 1
    )
    sizes = tf.tile([[height, width]], [count, 1])
    ours = preprocessors.crop_boxes(sizes, seeds, (0.4, 1.0), (3 / 4, 4 / 3)).numpy()

    def tensorflows(seed):
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            [height, width, 3], tf.zeros([0, 0, 4]), seed, min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3), area_range=(0.4, 1.0),
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        return tf.concat([begin[:2], size[:2]], 0)

    theirs = tf.map_fn(tensorflows, seeds, tf.int32).numpy()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()

    def facts(boxes):
        """Height, area, aspect and place of each; the place within the room there is."""
        top, left, h, w = boxes.T.astype(float)
        room = np.maximum([height - h, width - w], 1)
        return np.stack([h, h * w, w / h, (top + h / 2) / height, (left + w / 2) / width, *room])

    for one, other in zip(facts(ours), facts(theirs), strict=True):
        for share in (10, 25, 50, 75, 90):
            spread = max(np.ptp(other), 1e-9)
            difference = np.percentile(one, share) - np.percentile(other, share)
            # The deviation of a sample quantile of 3,000 is below 2 % of the range.
            assert abs(difference) / spread < 0.06, (share, difference)


def test_many_images_are_planned_as_one_by_one():
    preprocess = preprocessors.InceptionCrop()
    encoded = tf.stack([jpeg(ramp(90, 70)), png(ramp(64, 64)), jpeg(ramp(300, 400))])
    sizes = tf.constant([[90, 70], [64, 64], [300, 400]])
    seeds = tf.constant([[0, i] for i in range(3)], tf.int64)
    plans = preprocess.plan(encoded, sizes, 16, seeds)
    for i in range(3):
        one = preprocess(encoded[i], sizes[i], 16, seeds[i])
        np.testing.assert_array_equal(preprocess.pixels(encoded[i], plans[i], 16), one)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tiny_records.vocabulary(tmp_path_factory.mktemp("vocabulary"))


TEXTS = ["", "a red cat", "a " * 50, "photo of a small blue dogs", "unheard of", "a, b"]


@pytest.mark.parametrize("length", [1, 2, 8, 40])
def test_a_batch_is_tokenized_as_one_by_one(vocabulary, length):
    batch = preprocessors.tokenize(tf.constant(TEXTS), vocabulary, length).numpy()
    assert (batch.shape, batch.dtype) == ((len(TEXTS), length), np.int32)
    for text, row in zip(TEXTS, batch, strict=True):
        one = preprocessors.tokenize(tf.constant(text), vocabulary, length).numpy()
        np.testing.assert_array_equal(row, one)
        pieces = vocabulary.encode(text)[: length - 1]
        expected = [vocabulary.cls_id, *pieces] + [0] * (length - 1 - len(pieces))
        assert row.tolist() == expected
    square = preprocessors.tokenize(tf.reshape(tf.constant(TEXTS), [2, 3]), vocabulary, length)
    np.testing.assert_array_equal(square.numpy().reshape(-1, length), batch)
