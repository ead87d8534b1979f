"""Procedural scenes of coloured, patterned shapes, with compositional captions.

A scene holds one or two kinds of object on a background that has a name. It is drawn in the spirit
of a photograph: antialiased edges, light from one side, a highlight, a soft shadow, sensor noise,
and jitter in everything that the caption does not fix. A quarter of the combinations of colour,
shape and pattern never occurs in training, although every pair of attributes does: whoever
recognises these combinations has learned to compose.
"""

import collections
import dataclasses
import functools
import itertools
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import NamedTuple, TypeVar

import numpy as np

from clipa_t5x.data import drawing, record_writer

T = TypeVar("T")
Range = tuple[float, float]
Cell = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the image.

SHAPES = drawing.SHAPES
COLORS = tuple(drawing.COLORS)
PATTERNS = drawing.PATTERNS
BACKGROUNDS = tuple(drawing.BACKGROUNDS)
SIZES = ("small", "medium", "large")
RELATIONS = ("above", "below", "left", "right")
SPLITS = ("train", "validation", "zeroshot")

# Radii as fractions of the image's side, by size: of an object alone and of one in company.
_RADII_ALONE: dict[str, Range] = {
    "small": (0.29, 0.31),
    "medium": (0.35, 0.37),
    "large": (0.42, 0.44),
}
_RADII_IN_COMPANY: dict[str, Range] = {
    "small": (0.135, 0.15),
    "medium": (0.175, 0.2),
    "large": (0.22, 0.245),
}

_PLURALS = {shape: f"{shape}s" for shape in SHAPES}
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_OPENERS = ("a", "a", "one", "there is a", "there is one", "a photo of a", "a picture of a")
_PLURAL_OPENERS = ("", "", "there are", "a photo of", "a picture of")
_WITH_PATTERN = {"striped": "with stripes", "dotted": "with dots"}
_SHAPE_FIRST = ("a {shape} that is {traits}", "one {shape} that is {traits}")
_COLOR_FIRST = (
    "something {traits}: a {shape}",
    "one {color} object: a {pattern} {shape}",
    "one {color} shape: a {pattern} {shape}",
)
_RELATION_PHRASES: dict[str | None, tuple[str, ...]] = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left": ("to the left of", "left of", "next to"),
    "right": ("to the right of", "right of", "next to"),
}
_BACKGROUND_PHRASES = {
    "dark": ("on a dark background", "against a dark background"),
    "light": ("on a light background", "against a light background"),
    "sandy": ("on a sandy background", "on a sandy beach", "on the sand"),
    "grassy": ("on a grassy background", "on a grassy meadow", "on the grass"),
    "wooden": ("on a wooden background", "on a wooden table"),
    "cloudy": ("on a cloudy background", "in a cloudy sky"),
}
# Class names that follow "a" start with a consonant; "orange" is why colours do without.
_TEMPLATES = {
    "shapes": (
        "a {}",
        "one {}",
        "a photo of a {}",
        "a picture of a {}",
        "there is a {}",
        "there is one {}",
    ),
    "shape": ("a {}", "one {}", "a photo of a {}", "a picture of a {}", "there is a {}"),
    "color": ("something {}", "one {} object", "one {} shape"),
}
# [CLS] and seven tokens are what a text of length 8 holds, and every word here is one token.
_MAX_FIRST_WORDS = 7
_MIN_CAPTION_WORDS = 5
_CHUNK = 32  # Records per task of a worker: large enough to hide the cost of handing it over.


class Combination(NamedTuple):
    """A colour, a shape and a pattern."""

    color: str
    shape: str
    pattern: str

    @property
    def name(self) -> str:
        """The class name, such as "striped red triangle"."""
        return f"{self.pattern} {self.color} {self.shape}"


@dataclasses.dataclass(frozen=True)
class ObjectSpec:
    """One kind of object in a scene.

    Attributes:
      combination: its colour, shape and pattern.
      size: one of `SIZES`.
      count: how many of them there are, 1 to 4.
    """

    combination: Combination
    size: str = "medium"
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a caption can tell of an image.

    Attributes:
      background: one of `BACKGROUNDS`.
      objects: one or two kinds of object.
      relation: where the first kind is, seen from the second: one of `RELATIONS`; None in a scene
        of one kind.
    """

    background: str
    objects: tuple[ObjectSpec, ...]
    relation: str | None = None


@functools.cache
def held_out_combinations() -> tuple[Combination, ...]:
    """Returns the combinations that never occur in training: 24 of 96, each colour in three.

    A colour's three are one shape in two patterns and another shape in one of these, so that none
    of the attributes can be guessed from the other two. Every pair of attributes is left to
    training.
    """
    corner = ((0, 0), (0, 1), (2, 0))
    return tuple(
        Combination(color, SHAPES[(c + s) % len(SHAPES)], PATTERNS[(c + p) % len(PATTERNS)])
        for c, color in enumerate(COLORS)
        for s, p in corner
    )


@functools.cache
def train_combinations() -> tuple[Combination, ...]:
    """Returns the combinations that training images are made of."""
    held_out = set(held_out_combinations())
    return tuple(c for c in _all_combinations() if c not in held_out)


@functools.cache
def _all_combinations() -> tuple[Combination, ...]:
    return tuple(itertools.starmap(Combination, itertools.product(COLORS, SHAPES, PATTERNS)))


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


# ---------------------------------------------------------------------------------- scenes


def sample_scene(
    rng: np.random.Generator, split: str, combination: Combination | None = None
) -> Scene:
    """Draws a scene: about 80 % show a single object, 8 % several alike, 12 % two kinds.

    Args:
      rng: the source of randomness.
      split: one of `SPLITS`. Scenes of "train" hold no held-out combination, scenes of
        "validation" at least one, scenes of "zeroshot" are single objects of one.
      combination: the combination to show in any case; drawn if None.

    Returns:
      The scene.
    """
    if combination is None:
        pool = train_combinations() if split == "train" else held_out_combinations()
        combination = _pick(rng, pool)
    background = _pick(rng, BACKGROUNDS)
    kind = 0.0 if split == "zeroshot" else rng.random()
    if kind < 0.88:
        count = 1 if kind < 0.8 else _pick(rng, (2, 3, 4))
        return Scene(background, (_sample_object(rng, combination, count),))
    pool = train_combinations() if split == "train" else _all_combinations()
    other = _pick(rng, [c for c in pool if c != combination])
    counts = _pick(rng, ((1, 1), (1, 1), (1, 1), (1, 2), (2, 1)))
    pair = (combination, other) if rng.random() < 0.5 else (other, combination)
    first, second = (_sample_object(rng, c, count) for c, count in zip(pair, counts, strict=True))
    return Scene(background, (first, second), _pick(rng, RELATIONS))


def _sample_object(rng: np.random.Generator, combination: Combination, count: int) -> ObjectSpec:
    return ObjectSpec(combination, _pick(rng, ("small", "medium", "medium", "large")), count)


# -------------------------------------------------------------------------------- captions


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describes a scene.

    The first object's colour, shape and pattern are among the first seven words and punctuation
    marks; but of a lone object one caption in eight names the shape and no other trait, as a web
    page's caption would. Elsewhere a solid object is called so in about 70 % of the captions, any
    other pattern is always named; a medium size never is.

    Args:
      scene: the scene.
      rng: chooses the phrasing.

    Returns:
      A caption of 5 to 20 words.
    """
    first, *others = scene.objects
    lone = not others and first.count == 1
    if lone and rng.random() < 1 / 8:
        background = _pick(rng, _BACKGROUND_PHRASES[scene.background])
        return f"{_pick(rng, _OPENERS)} {first.combination.shape} {background}"
    if lone and rng.random() < 0.2:
        text = _indirect_phrase(first, rng)
    else:
        text = _opening_phrase(first, rng, alone=not others)
    for other in others:
        relation = "and"
        if rng.random() < 0.75:
            relation = _pick(rng, _RELATION_PHRASES[scene.relation])
        text = f"{text} {relation} {_object_phrase(other, rng)}"
    if rng.random() < 0.25 or len(text.split()) < _MIN_CAPTION_WORDS:
        text = f"{text} {_pick(rng, _BACKGROUND_PHRASES[scene.background])}"
    return text


def _says_pattern(spec: ObjectSpec, rng: np.random.Generator) -> bool:
    return spec.combination.pattern != "solid" or rng.random() < 0.7


def _traits(spec: ObjectSpec, rng: np.random.Generator, max_words: int) -> list[str]:
    words = [spec.combination.color, _noun(spec)]
    if _says_pattern(spec, rng):
        words.insert(0, spec.combination.pattern)
    if spec.size != "medium" and len(words) < max_words and rng.random() < 0.85:
        words.insert(0, spec.size)
    return words


def _noun(spec: ObjectSpec) -> str:
    shape = spec.combination.shape
    return shape if spec.count == 1 else _PLURALS[shape]


def _object_phrase(spec: ObjectSpec, rng: np.random.Generator) -> str:
    traits = _traits(spec, rng, max_words=4)
    return _join([_NUMBERS.get(spec.count, "a")], traits)


def _opening_phrase(spec: ObjectSpec, rng: np.random.Generator, alone: bool) -> str:
    if spec.count == 1:
        opener = _pick(rng, _OPENERS).split()
    else:
        opener = [*_pick(rng, _PLURAL_OPENERS).split(), _NUMBERS[spec.count]]
    _, shape, pattern = spec.combination
    if alone and len(opener) <= 2 and pattern in _WITH_PATTERN and rng.random() < 0.15:
        words = [spec.combination.color, _noun(spec), _WITH_PATTERN[pattern]]
        return _join(opener, words if spec.size == "medium" else [spec.size, *words])
    return _join(opener, _traits(spec, rng, _MAX_FIRST_WORDS - len(opener)))


def _join(opener: Sequence[str], traits: Sequence[str]) -> str:
    # Of all the words that follow an article here, only "orange" starts with a vowel.
    if opener[-1] == "a" and traits[0] == "orange":
        opener = [*opener[:-1], "an"]
    return " ".join([*opener, *traits])


def _indirect_phrase(spec: ObjectSpec, rng: np.random.Generator) -> str:
    # These phrasings put prompts of a shape alone or a colour alone within what training reads.
    color, shape, pattern = spec.combination
    phrase = _pick(rng, _SHAPE_FIRST if rng.random() < 0.5 else _COLOR_FIRST)
    said = _says_pattern(spec, rng)
    traits = _pick(rng, (f"{color} and {pattern}", f"{pattern} and {color}")) if said else color
    text = phrase.format(color=color, shape=shape, traits=traits, pattern=pattern if said else "")
    return " ".join(text.split())


# -------------------------------------------------------------------- class lists and words


def class_lists() -> dict[str, tuple[str, ...]]:
    """Returns the class names, by label, of each label feature of the split "zeroshot"."""
    return {
        "shape": SHAPES,
        "color": COLORS,
        "combination": tuple(c.name for c in held_out_combinations()),
    }


def template_lists() -> dict[str, tuple[str, ...]]:
    """Returns the prompt templates: "shapes" for combinations, "shape" and "color" for these."""
    return dict(_TEMPLATES)


def phrases() -> list[str]:
    """Returns texts that together hold every word of every caption, class name and template."""
    formats = [*_SHAPE_FIRST, *_COLOR_FIRST, *itertools.chain(*_TEMPLATES.values())]
    blank = {"shape": "", "color": "", "pattern": "", "traits": "and"}
    return [
        *(text.format("", **blank) for text in formats),
        *COLORS,
        *SHAPES,
        *PATTERNS,
        *SIZES,
        *_PLURALS.values(),
        *_NUMBERS.values(),
        *_OPENERS,
        *_PLURAL_OPENERS,
        *_WITH_PATTERN.values(),
        *itertools.chain(*_RELATION_PHRASES.values()),
        *itertools.chain(*_BACKGROUND_PHRASES.values()),
        "an",
    ]


def word_classes() -> dict[str, tuple[str, ...]]:
    """Returns the grammar's nouns, adjectives and verbs; its other words are none of these."""
    things = "background beach sand meadow grass table sky photo picture object shape stripes dots"
    return {
        "noun": (*SHAPES, *_PLURALS.values(), *things.split()),
        "adjective": (*COLORS, *PATTERNS, *SIZES, *BACKGROUNDS),
        "verb": ("is", "are"),
    }


# -------------------------------------------------------------------------------- pictures


def render(scene: Scene, rng: np.random.Generator, image_size: int) -> np.ndarray:
    """Draws a picture of a scene.

    Args:
      scene: the scene.
      rng: chooses everything that the scene leaves open.
      image_size: the side of the picture, in pixels.

    Returns:
      uint8 [image_size, image_size, 3], RGB.
    """
    image = drawing.background(scene.background, rng, image_size)
    angle = rng.uniform(0.15, 0.85) * math.pi
    light = (math.cos(angle), -math.sin(angle))  # From above, as light mostly comes.
    alone = len(scene.objects) == 1 and scene.objects[0].count == 1
    radii = _RADII_ALONE if alone else _RADII_IN_COMPANY
    for spec, cells in zip(scene.objects, _layout(scene, rng), strict=True):
        color, shape, pattern = spec.combination
        for left, top, right, bottom in cells:
            radius = rng.uniform(*radii[spec.size])
            center = (
                _jitter(rng, left, right, radius),
                _jitter(rng, top, bottom, radius),
            )
            drawing.draw_object(
                image,
                shape=shape,
                color=color,
                pattern=pattern,
                center=center,
                radius=radius,
                light=light,
                rng=rng,
            )
    return drawing.finish(image, rng)


def _jitter(rng: np.random.Generator, low: float, high: float, radius: float) -> float:
    room = max((high - low) / 2 - radius, 0)
    return (low + high) / 2 + 0.25 * room * rng.uniform(-1, 1)


def _layout(scene: Scene, rng: np.random.Generator) -> list[list[Cell]]:
    # Per kind of object, a cell of the image for each: rows, or columns if transposed.
    if len(scene.objects) == 2:
        counts = [spec.count for spec in scene.objects]
        transposed = scene.relation in ("left", "right")
        reversed_order = scene.relation in ("below", "right")
        rows = _row_cells(counts[::-1] if reversed_order else counts, transposed)
        return rows[::-1] if reversed_order else rows
    counts = _pick(
        rng, {1: ((1,),), 2: ((1, 1),), 3: ((1, 2), (2, 1)), 4: ((2, 2),)}[scene.objects[0].count]
    )
    return [list(itertools.chain(*_row_cells(counts, transposed=rng.random() < 0.5)))]


def _row_cells(counts: Sequence[int], transposed: bool) -> list[list[Cell]]:
    rows = []
    for row, count in enumerate(counts):
        top, bottom = row / len(counts), (row + 1) / len(counts)
        sides = [(i / count, (i + 1) / count) for i in range(count)]
        if transposed:
            rows.append([(top, left, bottom, right) for left, right in sides])
        else:
            rows.append([(left, top, right, bottom) for left, right in sides])
    return rows


# --------------------------------------------------------------------------------- records


def example(
    split: str, index: int, *, image_size: int = 64, seed: int = 0
) -> dict[str, bytes | int | str]:
    """Makes one record, a function of the arguments alone.

    Args:
      split: one of `SPLITS`.
      index: the record's place in its split.
      image_size: the side of the image, in pixels. Scene and caption do not depend on it.
      seed: the data set's seed.

    Returns:
      Features for `record_writer.serialize`: img2dataset's, and in the split "zeroshot" `shape`,
      `color` and `combination`, indices into the lists of `class_lists`.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    combination, labels = None, {}
    if split == "zeroshot":
        label = index % len(held_out_combinations())
        combination = held_out_combinations()[label]
        labels = {
            "shape": SHAPES.index(combination.shape),
            "color": COLORS.index(combination.color),
            "combination": label,
        }
    scene = sample_scene(rng, split, combination)
    text = caption(scene, rng)
    return record_writer.image_features(
        f"{index:08d}", render(scene, rng, image_size), text, labels
    )


def _examples_chunk(
    split: str, indices: range, image_size: int, seed: int
) -> list[dict[str, bytes | int | str]]:
    return [example(split, index, image_size=image_size, seed=seed) for index in indices]


def examples(
    split: str,
    num_examples: int,
    *,
    image_size: int = 64,
    seed: int = 0,
    num_workers: int = 0,
) -> Iterator[dict[str, bytes | int | str]]:
    """Yields the records of a split in order; the workers change the speed only.

    Args:
      split: one of `SPLITS`.
      num_examples: how many records; fewer are the beginning of more.
      image_size: the side of the images, in pixels.
      seed: the data set's seed.
      num_workers: processes to render in; this one if 0 or 1.

    Yields:
      What `example` returns, for the indices from 0.
    """
    chunks = (
        (split, range(start, min(start + _CHUNK, num_examples)), image_size, seed)
        for start in range(0, num_examples, _CHUNK)
    )
    if num_workers <= 1:
        for chunk in chunks:
            yield from _examples_chunk(*chunk)
        return
    # Forking a process whose threads belong to TensorFlow or JAX can deadlock, so spawn.
    context = multiprocessing.get_context("spawn")
    pool = futures.ProcessPoolExecutor(num_workers, mp_context=context)
    try:
        # Enough pending chunks to keep the workers busy, few enough to bound the memory.
        pending: collections.deque[futures.Future] = collections.deque()
        for chunk in chunks:
            pending.append(pool.submit(_examples_chunk, *chunk))
            if len(pending) > 64 * num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        # Whoever stops reading early does not wait for what is still queued.
        pool.shutdown(cancel_futures=True)
