"""Draws antialiased, shaded, patterned shapes on textured backgrounds with NumPy.

Lengths are fractions of the image's side unless said otherwise, x to the right and y down; images
are float32 [size, size, 3], RGB, black at 0 and white at 1. A name such as "red" or "sandy" is a
range of colours, from which every call draws anew.
"""

import colorsys
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

Range = tuple[float, float]

# Ranges of hue (degrees), saturation and value (0 to 1).
COLORS: dict[str, tuple[Range, Range, Range]] = {
    "red": ((-7, 5), (0.82, 1.0), (0.72, 0.95)),
    "orange": ((23, 32), (0.85, 1.0), (0.92, 1.0)),
    "yellow": ((51, 58), (0.78, 1.0), (0.92, 1.0)),
    "green": ((112, 142), (0.75, 1.0), (0.55, 0.85)),
    "cyan": ((177, 187), (0.75, 1.0), (0.82, 1.0)),
    "blue": ((216, 232), (0.8, 1.0), (0.75, 1.0)),
    "purple": ((270, 284), (0.7, 0.95), (0.55, 0.8)),
    "pink": ((322, 336), (0.4, 0.58), (0.94, 1.0)),
}
BACKGROUNDS: dict[str, tuple[Range, Range, Range]] = {
    "dark": ((0, 360), (0.0, 0.25), (0.07, 0.17)),
    "light": ((0, 360), (0.0, 0.07), (0.84, 0.96)),
    "sandy": ((34, 42), (0.3, 0.42), (0.7, 0.84)),
    "grassy": ((82, 104), (0.45, 0.6), (0.3, 0.44)),
    "wooden": ((18, 27), (0.5, 0.65), (0.36, 0.52)),
    "cloudy": ((205, 216), (0.42, 0.58), (0.75, 0.88)),
}
# Layers of luminance noise: rows, columns and amplitude. Many columns and few rows are upright
# blades of grass; the other way round is the grain of wood.
_TEXTURES: dict[str, tuple[tuple[int, int, float], ...]] = {
    "dark": ((4, 4, 0.25),),
    "light": ((4, 4, 0.04),),
    "sandy": ((64, 64, 0.12), (7, 7, 0.06)),
    "grassy": ((16, 56, 0.4), (5, 5, 0.15)),
    "wooden": ((30, 3, 0.2), (9, 2, 0.15)),
    "cloudy": ((5, 4, 0.03),),
}
# Degrees either way that leave a shape what it is called.
_MAX_ROTATION = {"circle": 180, "square": 8, "triangle": 8, "star": 8}
_PERIODS = {"striped": 0.62, "dotted": 0.74}  # In radii.
# Training's first stage shrinks images to 32 pixels: no pattern is finer than 4.5 of those.
_MIN_PERIOD = 4.5 / 32
_BORDER = 0.09  # In radii.


def _uniform(rng: np.random.Generator, limits: Range) -> float:
    return float(rng.uniform(*limits))


def _sample_rgb(rng: np.random.Generator, ranges: tuple[Range, Range, Range]) -> np.ndarray:
    hue, saturation, value = (_uniform(rng, limits) for limits in ranges)
    return np.array(colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value), np.float32)


def _value_noise(rng: np.random.Generator, rows: int, columns: int, size: int) -> np.ndarray:
    coarse = rng.random((rows, columns), dtype=np.float32) * 2 - 1
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def background(name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """Paints a background.

    Args:
      name: one of `BACKGROUNDS`.
      rng: chooses its tone, texture and the fall of light.
      size: the image's side, in pixels.

    Returns:
      float32 [size, size, 3], about 0 to 1.
    """
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.35)
    luminance = 1 + np.float32(slope * math.cos(angle)) * axis[None, :]
    luminance = luminance + np.float32(slope * math.sin(angle)) * axis[:, None]
    for rows, columns, amplitude in _TEXTURES[name]:
        luminance = luminance + amplitude * _value_noise(rng, rows, columns, size)
    image = luminance[:, :, None] * _sample_rgb(rng, BACKGROUNDS[name])
    if name == "cloudy":
        clouds = np.clip(0.35 + 0.9 * _value_noise(rng, 6, 4, size), 0, 0.9)
        image += (0.97 - image) * clouds[:, :, None]
    return image


def finish(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Applies what a camera does: exposure, vignetting, sensor noise, quantisation.

    Args:
      image: float32 [size, size, 3]; overwritten.
      rng: chooses the strengths and the noise.

    Returns:
      uint8 [size, size, 3].
    """
    size = len(image)
    axis = np.linspace(-1, 1, size, dtype=np.float32) ** 2
    vignette = 1 - np.float32(rng.uniform(0, 0.12)) * (axis[:, None] + axis[None, :]) / 2
    image *= (np.float32(rng.uniform(0.93, 1.05)) * vignette)[:, :, None]
    sigma = np.float32(rng.uniform(0.006, 0.025))
    image += sigma * rng.standard_normal(image.shape, dtype=np.float32)
    np.clip(image, 0, 1, out=image)
    return np.rint(image * 255).astype(np.uint8)


# ------------------------------------------------------------ shapes: signed distances in radii


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.95


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.84


def _star_polygon(
    x: np.ndarray, y: np.ndarray, points: int, outer: float, inner: float
) -> np.ndarray:
    # Folded onto half of one point, the outline is a single line from the tip to the notch.
    sector = 2 * math.pi / points
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    radius = np.hypot(x, y)
    notch_x, notch_y = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    length = math.hypot(outer - notch_x, notch_y)
    normal_x, normal_y = notch_y / length, (outer - notch_x) / length
    return (radius * np.cos(angle) - outer) * normal_x + radius * np.sin(angle) * normal_y


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _star_polygon(x, y - 0.2, points=3, outer=1.2, inner=0.6)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _star_polygon(x, y - 0.03, points=5, outer=1.12, inner=0.52)


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
}
SHAPES = tuple(_DISTANCES)


# ----------------------------------------------------- patterns: share of the second tone, 0 to 1


def _coverage(distance: np.ndarray, scale: float) -> np.ndarray:
    # The share of a pixel that lies inside, for edges that are straight at a pixel's scale.
    return np.clip(0.5 - distance * scale, 0, 1)


def _from_cell_middle(u: np.ndarray, period: float) -> np.ndarray:
    return (u / period % 1 - 0.5) * period


def _striped(u: np.ndarray, v: np.ndarray, period: float, scale: float) -> np.ndarray:
    del v
    return _coverage(np.abs(_from_cell_middle(u, period)) - 0.23 * period, scale)


def _dotted(u: np.ndarray, v: np.ndarray, period: float, scale: float) -> np.ndarray:
    offset = np.hypot(_from_cell_middle(u, period), _from_cell_middle(v, period))
    return _coverage(offset - 0.29 * period, scale)


_PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]] = {
    "striped": _striped,
    "dotted": _dotted,
}
PATTERNS = ("solid", *_PATTERNS)


def _second_tone(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Bright colours are patterned with a deep shade and deep ones with a pale tint, so that the
    # pattern is a contrast of luminance, which shrinking and JPEG keep best.
    luminance = float(rgb @ np.array([0.3, 0.59, 0.11], np.float32))
    if luminance + rng.uniform(-0.08, 0.08) > 0.52:
        return 0.28 * rgb
    return 0.12 * rgb + 0.86


def _rotate(x: np.ndarray, y: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    angle = np.float32(math.radians(degrees))
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def draw_object(
    image: np.ndarray,
    *,
    shape: str,
    color: str,
    pattern: str,
    center: tuple[float, float],
    radius: float,
    light: tuple[float, float],
    rng: np.random.Generator,
) -> None:
    """Draws one object and its shadow.

    Args:
      image: float32 [size, size, 3]; drawn upon.
      shape: one of `SHAPES`.
      color: one of `COLORS`.
      pattern: one of `PATTERNS`.
      center: x and y.
      radius: about half of the object's extent.
      light: unit vector in the image's plane, towards the light.
      rng: chooses tone, rotation, the pattern's place and the strength of shading.
    """
    size = len(image)
    # The object and its shadow end within 1.7 radii; nothing outside is worth computing.
    left, top = (max(int((c - 1.7 * radius) * size), 0) for c in center)
    right, bottom = (min(int((c + 1.7 * radius) * size) + 2, size) for c in center)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x = (axis[None, left:right] - np.float32(center[0])) / np.float32(radius)
    y = (axis[top:bottom, None] - np.float32(center[1])) / np.float32(radius)
    patch = image[top:bottom, left:right]
    scale = radius * size  # Pixels in a radius.
    rotation = rng.uniform(-1, 1) * _MAX_ROTATION[shape]
    distance = _DISTANCES[shape]

    depth, softness = rng.uniform(0.08, 0.22), rng.uniform(0.12, 0.3)
    shadow_x, shadow_y = _rotate(x + depth * light[0], y + depth * light[1], rotation)
    shadow = np.clip(0.5 - distance(shadow_x, shadow_y) / softness, 0, 1)
    patch *= 1 - np.float32(rng.uniform(0.35, 0.6)) * shadow[:, :, None]

    outline = distance(*_rotate(x, y, rotation))
    surface = _surface(x, y, outline, color, pattern, radius, scale, rotation, rng)
    shade = 1 + np.float32(rng.uniform(0.08, 0.26)) * (x * light[0] + y * light[1])
    # Edges turn away from the viewer; the rim also parts objects from look-alike backgrounds.
    shade *= 1 - 0.3 * np.clip(1 + outline / 0.14, 0, 1)
    surface *= shade[:, :, None]
    gloss = np.exp(-((x - 0.4 * light[0]) ** 2 + (y - 0.4 * light[1]) ** 2) / 0.14)
    surface += np.float32(rng.uniform(0.05, 0.3)) * gloss[:, :, None] * (1 - surface)
    patch += (surface - patch) * _coverage(outline, scale)[:, :, None]


def _surface(
    x: np.ndarray,
    y: np.ndarray,
    outline: np.ndarray,
    color: str,
    pattern: str,
    radius: float,
    scale: float,
    rotation: float,
    rng: np.random.Generator,
) -> np.ndarray:
    rgb = _sample_rgb(rng, COLORS[color])
    if pattern == "solid":
        return np.broadcast_to(rgb, (*outline.shape, 3)).copy()
    # Stripes may run anywhere, but checks on their corners look like a lattice of dots.
    turn = rng.uniform(0, 180)
    u, v = _rotate(x, y, rotation + turn)
    period = np.float32(max(_PERIODS[pattern] * rng.uniform(0.9, 1.1), _MIN_PERIOD / radius))
    # A dot or stripe near the middle, where even a star is wide enough to show it.
    shift_u, shift_v = rng.uniform(0.2, 0.8, 2).astype(np.float32) * period
    share = _PATTERNS[pattern](u + shift_u, v + shift_v, float(period), scale)
    # A border in the first tone keeps the silhouette whole where the second is the background's.
    share *= _coverage(outline + _BORDER, scale)
    return rgb + share[:, :, None] * (_second_tone(rgb, rng) - rgb)
