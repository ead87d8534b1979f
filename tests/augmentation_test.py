import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clipa_t5x import augmentation, partitioning

NAMES = ("brightness", "contrast", "saturation", "hue")
ORDERS = list(itertools.permutations(range(4)))
PUBLISHED = {"strength": 0.4, "jitter_probability": 0.8, "gray_probability": 0.2}
NUM_KEYS = 24_000


# The reference: NumPy on 0-1, an image [height, width, 3] at a time.


def to_hsv(image):
    value, least = image.max(-1), image.min(-1)
    chroma = value - least
    with np.errstate(invalid="ignore", divide="ignore"):
        saturation = np.where(value > 0, chroma / value, 0)
        r, g, b = np.moveaxis((value[..., None] - image) / chroma[..., None], -1, 0)
    red, green, _ = np.moveaxis(image == value[..., None], -1, 0)
    hue = np.where(red, b - g, np.where(green, 2 + r - b, 4 + g - r)) / 6
    return np.where(chroma > 0, hue, 0) % 1, saturation, value


def to_rgb(hue, saturation, value):
    """By the six sectors of the circle, as in textbooks."""
    sector = np.floor(6 * hue).astype(int) % 6
    rest = 6 * hue - np.floor(6 * hue)
    p, q, t = (value * (1 - saturation * x) for x in (1, rest, 1 - rest))
    choices = [(value, t, p), (q, value, p), (p, value, t), (p, q, value), (t, p, value),
               (value, p, q)]  # fmt: skip
    return np.stack([np.choose(sector, channel) for channel in zip(*choices, strict=True)], -1)


def adjust(name, image, factor):
    """One operation on [height, width, 3] float64, and the clipping after it."""
    if name == "brightness":
        image = image * factor
    elif name == "contrast":
        mean = image.mean((0, 1))
        image = mean + factor * (image - mean)
    else:
        hue, saturation, value = to_hsv(image)
        if name == "saturation":
            saturation = np.minimum(saturation * factor, 1)
        else:
            hue = (hue + factor) % 1
        image = to_rgb(hue, saturation, value)
    return np.clip(image, 0, 1)


def reference(image, factors, order, jitter=True, gray=False):
    """`factors` by the index of their operation; `order` of these indices, the first first."""
    image = image.astype(np.float64) / 255
    if jitter:
        for index in order:
            image = adjust(NAMES[index], image, factors[index])
    if gray:
        image = np.repeat(image @ [[0.2989], [0.587], [0.114]], 3, axis=-1)
    return 255 * image


TENSORFLOW = {
    "brightness": lambda image, factor: image * factor,
    "contrast": tf.image.adjust_contrast,
    "saturation": tf.image.adjust_saturation,
    "hue": tf.image.adjust_hue,
}
FACTORS = {
    "brightness": (0.68, 1.32),
    "contrast": (0.68, 1.32),
    "saturation": (0.0, 0.68, 1.32, 50.0),
    "hue": (-0.5, -0.08, 0.08, 0.4),
}


def picture(size=16, seed=0):
    """Noise of every saturation, with a row of grays and a row of pure colours and ties."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, size, 3))
    image = (image * rng.random((size, size, 1)) + 255 * rng.random((size, size, 1))) / 2
    image[0] = np.linspace(0, 255, size)[:, None]
    corners = 255 * np.array(list(itertools.product((0, 1), repeat=3)))
    image[1, : len(corners)] = corners
    return image.astype(np.uint8)


def draws(factors, order, jitter=True, gray=False):
    """Given ones; an operation's time is its place in the order."""
    return augmentation.Draws(
        jnp.asarray(jitter),
        jnp.asarray(gray),
        *jnp.asarray(factors, jnp.float32),
        times=jnp.argsort(jnp.asarray(order)).astype(jnp.float32),
    )


def planes(image):
    return tuple(jnp.asarray(image[..., c], jnp.float32) for c in range(3))


def one_operation(name, image, factor):
    if name in ("brightness", "contrast"):
        result = augmentation.scale(planes(image), factor, name == "contrast")
    else:
        saturation, hue = (factor, 0.0) if name == "saturation" else (1.0, factor)
        result = augmentation.recolor(planes(image), saturation, hue)
    return np.stack(result, -1)


@pytest.fixture(scope="module")
def keys():
    return jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (NUM_KEYS, 2), np.uint32))


@pytest.fixture(scope="module")
def drawn(keys):
    def draw(key):
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        return augmentation.draw(key, **PUBLISHED)

    return jax.device_get(jax.jit(jax.vmap(draw))(keys))


@pytest.fixture(scope="module")
def augment():
    return jax.jit(augmentation.simclr_jitter_gray)


# Operations.


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_tensorflows_and_the_references(name):
    image = picture()
    for factor in FACTORS[name]:
        found = one_operation(name, image, factor)
        theirs = TENSORFLOW[name](tf.constant(image / 255, tf.float32), factor).numpy()
        np.testing.assert_allclose(found, 255 * np.clip(theirs, 0, 1), atol=5e-3)
        np.testing.assert_allclose(found, 255 * adjust(name, image / 255, factor), atol=5e-3)


def test_neutral_operations_change_nothing():
    image = picture()
    for name, factor in zip(NAMES, (1.0, 1.0, 1.0, 0.0), strict=True):
        np.testing.assert_allclose(one_operation(name, image, factor), image, atol=1e-4)


def test_all_orders_are_the_operations_one_after_the_other():
    image, rng = picture(), np.random.default_rng(1)
    # Strong factors: clipping makes every order's result another.
    factors = rng.uniform([0.4, 0.4, 0.2, -0.3], [2.0, 2.0, 3.0, 0.3], (24, 4))
    factors[:4] = (1.9, 1.8, 2.5, 0.3)
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x), *[draws(f, o) for f, o in zip(factors, ORDERS, strict=True)]
    )
    found = jax.jit(jax.vmap(augmentation.jitter, (None, 0)))(planes(image), stacked)
    expected = [reference(image, f, o) for f, o in zip(factors, ORDERS, strict=True)]
    np.testing.assert_allclose(np.stack(found, -1), expected, atol=2e-2)


def test_the_order_matters():
    results = [reference(picture(), (1.9, 1.8, 2.5, 0.3), order) for order in ORDERS]
    # Side by side, saturation and hue are one: 24 orders make 18 results.
    distinct = [
        a for i, a in enumerate(results) if all(np.abs(a - b).max() > 1 for b in results[:i])
    ]
    assert len(distinct) == 18


@pytest.mark.parametrize("jitter, gray", [(False, True), (True, False), (True, True)])
def test_bytes_are_tensorflows_within_rounding(jitter, gray):
    image, factors, order = picture(), (1.2, 0.8, 1.3, -0.05), (2, 1, 3, 0)
    found = np.asarray(augmentation.apply(jnp.asarray(image), draws(factors, order, jitter, gray)))
    theirs = tf.constant(image / 255, tf.float32)
    if jitter:
        for index in order:
            theirs = TENSORFLOW[NAMES[index]](theirs, factors[index])
            theirs = tf.clip_by_value(theirs, 0, 1)
    if gray:
        theirs = tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(theirs))
    theirs = tf.cast(tf.clip_by_value(theirs * 255, 0, 255), tf.uint8).numpy()
    difference = np.abs(found.astype(int) - theirs)
    assert found.dtype == np.uint8
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 0.01


def test_an_image_left_alone_keeps_its_bytes():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1) * np.ones(3, np.uint8)
    left = augmentation.apply(jnp.asarray(image), draws((1.2, 1.2, 1.2, 0.1), ORDERS[0], False))
    np.testing.assert_array_equal(left, image)


# Draws.


def assert_uniform(counts):
    """Chi-square of equal expectations within five standard deviations of its mean."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    assert np.sum((counts - expected) ** 2) / expected < freedom + 5 * np.sqrt(2 * freedom)


def test_probabilities_are_those_asked_for(drawn):
    for name, probability in (("jitter", 0.8), ("gray", 0.2)):
        deviation = np.sqrt(probability * (1 - probability) / NUM_KEYS)
        assert abs(getattr(drawn, name).mean() - probability) < 4 * deviation


@pytest.mark.parametrize("name, low, high", [
    ("brightness", 0.68, 1.32), ("contrast", 0.68, 1.32), ("saturation", 0.68, 1.32),
    ("hue", -0.08, 0.08),
])  # fmt: skip
def test_factors_are_uniform(drawn, name, low, high):
    values = getattr(drawn, name)
    assert values.dtype == np.float32
    assert low <= values.min() and values.max() <= high
    assert_uniform(np.histogram(values, 32, (low, high))[0])


def test_orders_are_equally_likely(drawn):
    orders, counts = np.unique(np.argsort(drawn.times, axis=1), axis=0, return_counts=True)
    assert len(orders) == 24
    assert_uniform(counts)


def test_draws_are_independent(drawn):
    columns = [np.asarray(x, np.float64) for x in (*jax.tree.leaves(drawn)[:-1], *drawn.times.T)]
    correlations = np.corrcoef(columns)[~np.eye(len(columns), dtype=bool)]
    assert np.abs(correlations).max() < 5 / np.sqrt(NUM_KEYS)


def test_pixels_are_distributed_as_the_references(keys, augment):
    image, rng, count = picture(8, seed=3), np.random.default_rng(5), 4000
    found = np.asarray(augment(jnp.broadcast_to(jnp.asarray(image), (count, *image.shape)),
                               keys[:count]), np.float64)  # fmt: skip

    def simulate():
        factors = (*rng.uniform(0.68, 1.32, 3), rng.uniform(-0.08, 0.08))
        jitter, gray = rng.random() < 0.8, rng.random() < 0.2
        return np.floor(reference(image, factors, rng.permutation(4), jitter, gray) + 1e-6)

    expected = np.stack([simulate() for _ in range(count)])
    error = np.sqrt((found.var(0) + expected.var(0)) / count)
    assert np.all(np.abs(found.mean(0) - expected.mean(0)) < 5 * error + 0.05)
    # Roughly: the deviation of a deviation is that of the mean over the square root of two.
    assert np.all(np.abs(found.std(0) - expected.std(0)) < 6 * error + 0.05)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_arguments_are_what_they_say(keys, probability):
    images = jnp.asarray(np.stack([picture(seed=i) for i in range(16)]))
    options = {"jitter_probability": probability, "gray_probability": probability}
    results = np.asarray(augmentation.simclr_jitter_gray(images, keys[:16], **options))
    unchanged = np.all(results == images, axis=(1, 2, 3))
    gray = np.all(results == results[..., :1], axis=(1, 2, 3))
    assert unchanged.all() == (not probability) and gray.all() == bool(probability)
    still = augmentation.simclr_jitter_gray(
        images, keys[:16], strength=0.0, jitter_probability=1.0, gray_probability=0.0
    )
    assert np.abs(np.asarray(still, int) - np.asarray(images, int)).max() <= 1


# Batches.


def test_a_sample_depends_on_its_key_alone(keys, augment):
    images = jnp.asarray(np.stack([picture(seed=i) for i in range(16)]))
    whole = np.asarray(augment(images, keys[:16]))
    assert len(np.unique(whole, axis=0)) == 16
    rows = np.random.default_rng(0).permutation(16)[:11]
    np.testing.assert_array_equal(augment(images[rows], keys[:16][rows]), whole[rows])


@pytest.mark.parametrize("shape, rows", [((1, 8, 1), 2), ((2, 2, 2), 4)])
def test_devices_augment_their_own_rows_without_a_word(keys, augment, shape, rows):
    images = np.stack([picture(seed=i) for i in range(16)])
    mesh = Mesh(np.array(jax.devices()).reshape(shape), partitioning.MESH_AXES)
    sharding = NamedSharding(mesh, P(("replica", "data")))
    arguments = jax.device_put((images, np.asarray(keys[:16])), sharding)
    compiled = augment.lower(*arguments).compile()
    program = compiled.as_text()
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert word not in program
    found = compiled(*arguments)
    assert {shard.data.shape[0] for shard in found.addressable_shards} == {rows}
    np.testing.assert_array_equal(found, augment(jnp.asarray(images), keys[:16]))


def test_memory_is_a_few_images(augment):
    images = jax.ShapeDtypeStruct((256, 84, 84, 3), jnp.uint8)
    memory = augment.lower(images, jax.ShapeDtypeStruct((256, 2), jnp.uint32)).compile()
    batch_bytes = 4 * 256 * 84 * 84 * 3
    assert memory.memory_analysis().temp_size_in_bytes < 6 * batch_bytes
