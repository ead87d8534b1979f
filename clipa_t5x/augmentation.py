"""Colours jittered and grayed on the accelerator, within the jitted train step.

CLIPA's recipes from L/16 up jitter as SimCLR does (Chen et al., 2020, "A Simple Framework for
Contrastive Learning of Visual Representations", appendix A): brightness, contrast, saturation and
hue in a random order, then grayscale. Each is the operation of TensorFlow's `tf.image`. All of them
keep proportions, so that they are computed on 0-255 instead of 0-1: an image that is left alone
comes out as it was, bit for bit, on any hardware.
"""

import flax.struct
import jax
import jax.numpy as jnp

MAX = 255.0
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # as `tf.image.rgb_to_grayscale`'s

# One image's red, green and blue: float32 [height, width] each, on 0-255. Accelerators fill whole
# registers along the last dimension, where three channels would leave nearly all of them empty.
Planes = tuple[jax.Array, ...]


@flax.struct.dataclass
class Draws:
    """What one sample draws.

    Attributes:
      jitter: bool, whether colours are jittered at all.
      gray: bool, whether the image loses its colours in the end.
      brightness: float32, a factor.
      contrast: float32, a factor of the distance to the mean.
      saturation: float32, a factor.
      hue: float32, turns of the colour circle.
      times: float32 [4], when brightness, contrast, saturation and hue (in this order) have their
        turn: the earliest comes first.
    """

    jitter: jax.Array
    gray: jax.Array
    brightness: jax.Array
    contrast: jax.Array
    saturation: jax.Array
    hue: jax.Array
    times: jax.Array


def draw(
    key: jax.Array, *, strength: float, jitter_probability: float, gray_probability: float
) -> Draws:
    """What the sample of a key draws; see `simclr_jitter_gray`.

    Independent uniform times make every order of the four equally likely, without sorting.
    """
    u = jax.random.uniform(key, (10,))
    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    brightness, contrast, saturation = low + (high - low) * u[2:5]
    return Draws(
        jitter=u[0] < jitter_probability,
        gray=u[1] < gray_probability,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=0.2 * strength * (2 * u[5] - 1),
        times=u[6:],
    )


def scale(planes: Planes, factor: jax.Array, about_mean: jax.Array) -> Planes:
    """Brightness, or about each channel's mean contrast (`tf.image.adjust_contrast`), clipped.

    Args:
      planes: of one image.
      factor: float32 scalar.
      about_mean: bool scalar; false scales about black.
    """
    pivots = [jnp.where(about_mean, jnp.mean(plane), 0.0) for plane in planes]
    scaled = [(x - pivot) * factor + pivot for x, pivot in zip(planes, pivots, strict=True)]
    return tuple(jnp.clip(x, 0.0, MAX) for x in scaled)


def recolor(planes: Planes, saturation: jax.Array, hue: jax.Array) -> Planes:
    """`tf.image.adjust_saturation` and `tf.image.adjust_hue` in one.

    Each changes what the other leaves, so that their order does not matter; and neither leaves the
    range. HSV and back, written out (Smith, 1978, "Color Gamut Transform Pairs"): a pixel is its
    greatest channel less a share of its chroma, and the hue alone decides the share.

    Args:
      planes: of one image.
      saturation: float32 scalar, a factor; 1 leaves it.
      hue: float32 scalar, turns of the colour circle; 0 leaves it.
    """
    red, green, blue = planes
    value = jnp.maximum(red, jnp.maximum(green, blue))
    chroma = value - jnp.minimum(red, jnp.minimum(green, blue))
    sixth = 1 / jnp.where(chroma > 0, chroma, 1.0)
    angle = jnp.where(
        value == red,
        (green - blue) * sixth,
        jnp.where(value == green, 2 + (blue - red) * sixth, 4 + (red - green) * sixth),
    )
    angle += 6 * hue  # in sixths of the circle
    angle -= 6 * jnp.floor(angle / 6)
    chroma = jnp.minimum(chroma * saturation, value)
    missing = (
        2 - jnp.abs(angle - 3),
        jnp.abs(angle - 2) - 1,
        jnp.abs(angle - 4) - 1,
    )
    return tuple(value - chroma * jnp.clip(share, 0.0, 1.0) for share in missing)


def jitter(planes: Planes, draws: Draws) -> Planes:
    """The four operations in the order of their times, clipped after each.

    Saturation and hue come before, between or after brightness and contrast, and side by side they
    are one operation. So three rounds of colours and scale give all 24 orders exactly, with neither
    branches nor gathers, where one of four operations at each of four turns would take sixteen.
    """
    brightness_at, contrast_at, saturation_at, hue_at = draws.times
    first, second = (pick(brightness_at, contrast_at) for pick in (jnp.minimum, jnp.maximum))
    saturation_round, hue_round = (
        (at > first).astype(jnp.int32) + (at > second) for at in (saturation_at, hue_at)
    )
    contrast_round = (contrast_at > brightness_at).astype(jnp.int32)

    def turn(number: jax.Array, planes: Planes) -> Planes:
        planes = recolor(
            planes,
            jnp.where(number == saturation_round, draws.saturation, 1.0),
            jnp.where(number == hue_round, draws.hue, 0.0),
        )
        is_contrast = number == contrast_round
        factor = jnp.where(is_contrast, draws.contrast, draws.brightness)
        return scale(planes, jnp.where(number < 2, factor, 1.0), is_contrast)

    # A loop, because XLA would compute what the rounds share anew for each channel of each round.
    return jax.lax.fori_loop(0, 3, turn, tuple(planes))


def apply(image: jax.Array, draws: Draws) -> jax.Array:
    """One image, uint8 [height, width, 3], as its draws say."""
    planes = tuple(image[..., channel].astype(jnp.float32) for channel in range(3))
    jittered = jitter(planes, draws)
    colors = [jnp.where(draws.jitter, new, x) for new, x in zip(jittered, planes, strict=True)]
    gray = sum(weight * x for weight, x in zip(GRAY_WEIGHTS, colors, strict=True))
    results = [jnp.where(draws.gray, gray, x) for x in colors]
    return jnp.stack([jnp.clip(x, 0.0, MAX).astype(jnp.uint8) for x in results], axis=-1)


def simclr_jitter_gray(
    images: jax.Array,
    keys: jax.Array,
    *,
    strength: float = 0.4,
    jitter_probability: float = 0.8,
    gray_probability: float = 0.2,
) -> jax.Array:
    """Jitters colours, then grays, each with its probability: CLIPA's preprocessing of that name.

    A sample's draws are a function of its key alone, whatever row, batch or device it is in.

    Args:
      images: uint8 [batch, height, width, 3].
      keys: uint32 [batch, 2], threefry key data, one for each sample.
      strength: brightness, contrast and saturation are multiplied by up to 1 -+ 0.8 strength; the
        hue turns by up to 0.2 strength of the circle.
      jitter_probability: that a sample's colours are jittered.
      gray_probability: that a sample becomes gray, jittered or not.

    Returns:
      uint8 [batch, height, width, 3]; fractions are cut off, as CLIPA's cast does.
    """

    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        draws = draw(
            jax.random.wrap_key_data(key, impl="threefry2x32"),
            strength=strength,
            jitter_probability=jitter_probability,
            gray_probability=gray_probability,
        )
        return apply(image, draws)

    return jax.vmap(augment)(images, keys)
