"""From encoded image and caption to pixels and token ids: pure functions in TensorFlow.

Random ones draw from the sample's own seed, so a sample looks the same whichever host, at whichever
restart, prepares it.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from clipa_t5x.data import image_files, splitmix, text_reduction, vocabularies
from clipa_t5x.errors import UserError

# One call per core. Left to tf.data's autotuning, an iterator is deleted only when its tuning
# thread next wakes, which after a minute of training takes as long again.
NUM_PARALLEL_CALLS = os.cpu_count() or 1

# For functions that datasets map: autograph would read the source of all they call, seconds at
# every start, to find no Python loop or branch over tensors in it.
as_written = tf.autograph.experimental.do_not_convert

Example = Mapping[str, tf.Tensor]
# (encoded image, int32 [height, width], pixels of each side of the result, int64 [2] seed) to
# uint8 [size, size, 3].
# Those that have `plan` and `pixels`, as `InceptionCrop`, are asked for many images at once.
ImagePreprocessor = Callable[[tf.Tensor, tf.Tensor, int, tf.Tensor], tf.Tensor]

# libjpeg decodes at these fractions of the size at less cost: it leaves out the finer waves.
_RATIOS = (1, 2, 4, 8)
# Captions are tokenised so many at a time, seven times faster than one by one.
_TOKENIZED_TOGETHER = 256
# An attempt at a crop fails only where the image is far from square.
_ATTEMPTS = 10
# What no one needs of an example once its image is decoded.
_USED_UP = ("encoded_image", "image_size", "seed", "plan")


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes JPEG, PNG, GIF (first frame) or BMP bytes to uint8 [height, width, 3]."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    return image


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of uint8 [height, width, 3]."""
    return tf.io.encode_png(image).numpy()


def resize(image: tf.Tensor, height: tf.Tensor | int, width: tf.Tensor | int) -> tf.Tensor:
    """Antialiased bilinear resize of uint8 to uint8 (truncated, as CLIPA's)."""
    resized = tf.image.resize(image, tf.stack([height, width]), "bilinear", antialias=True)
    return tf.cast(resized, tf.uint8)


def full_decode(encoded: tf.Tensor, box: tf.Tensor, size: int) -> tf.Tensor:
    """A part of an image, decoded at full size and squashed by an antialiased bilinear resize.

    Args:
      encoded: scalar string, the image file.
      box: int32 [top, left, height, width].
      size: pixels of each side of the result.

    Returns:
      uint8 [size, size, 3].
    """
    part = tf.image.crop_to_bounding_box(decode(encoded), *tf.unstack(box))
    return resize(part, size, size)


def scaled_decode(encoded: tf.Tensor, box: tf.Tensor, size: int) -> tf.Tensor:
    """As `full_decode`, from as few pixels as the result needs, averaged by area.

    A JPEG is decoded at a half, a quarter or an eighth where the part still has at least `size`
    pixels on its shorter side then, and only where the part is.
    """
    return decode_window(encoded, windows(encoded[tf.newaxis], box[tf.newaxis], size)[0], size)


def windows(encoded: tf.Tensor, boxes: tf.Tensor, size: int) -> tf.Tensor:
    """How parts of images are to be decoded for `size` pixels, for `decode_window`.

    Args:
      encoded: strings [n], the image files.
      boxes: int32 [n, 4], (top, left, height, width) of the parts.
      size: pixels of each side of the results.

    Returns:
      int32 [n, 5]: number of the decoder, and the box in the pixels that it gives.
    """
    sides = tf.reduce_min(boxes[:, 2:], axis=1, keepdims=True)
    numbers = tf.reduce_sum(tf.cast(sides >= np.array(_RATIOS[1:]) * size, tf.int32), axis=1)
    is_jpeg = tf.equal(tf.strings.substr(encoded, 0, 3), image_files.JPEG_START)
    ratios = tf.where(is_jpeg, tf.gather(tf.constant(_RATIOS), numbers), 1)[:, tf.newaxis]
    # The nearest whole pixels: at a half, a crop is moved by no more than one of its own.
    first, last = (boxes[:, :2] + ratios // 2) // ratios, (boxes[:, :2] + boxes[:, 2:]) // ratios
    numbers = tf.where(is_jpeg, numbers, len(_RATIOS))[:, tf.newaxis]
    return tf.concat([numbers, first, last - first], axis=1)


def decode_window(encoded: tf.Tensor, window: tf.Tensor, size: int) -> tf.Tensor:
    """Decodes what a row of `windows` says and averages it by area to uint8 [size, size, 3]."""
    box = window[1:]

    def jpeg_at(ratio: int) -> Callable[[], tf.Tensor]:
        return lambda: tf.image.decode_and_crop_jpeg(encoded, box, channels=3, ratio=ratio)

    def other() -> tf.Tensor:
        image = tf.image.decode_png(encoded, channels=3)
        return tf.slice(image, tf.pad(box[:2], [[0, 1]]), tf.concat([box[2:], [3]], axis=0))

    part = tf.switch_case(window[0], [*map(jpeg_at, _RATIOS), other])
    resized = tf.raw_ops.ResizeArea(images=part[tf.newaxis], size=[size, size])
    return tf.cast(resized[0], tf.uint8)


@dataclasses.dataclass(frozen=True)
class InceptionCrop:
    """A random crop of some share of the area, squashed to a square (Szegedy et al., 2015).

    What does not look at pixels is done for many images at once (`plan`), a fifth of the work if
    it were done for each.

    Attributes:
      min_area: least share of the area that the crop takes.
      max_area: greatest share.
      min_aspect: least width / height of the crop.
      max_aspect: greatest width / height.
      decode: 'scaled', see `scaled_decode`, or 'full', see `full_decode`, which is CLIPA's and
        takes thrice as long.
    """

    min_area: float = 0.4
    max_area: float = 1.0
    min_aspect: float = 3 / 4
    max_aspect: float = 4 / 3
    decode: str = "scaled"

    def __post_init__(self) -> None:
        if self.decode not in ("scaled", "full"):
            raise UserError(f"DECODE is {self.decode!r}; it must be 'scaled' or 'full'.")

    def plan(
        self, encoded: tf.Tensor, image_sizes: tf.Tensor, size: int, seeds: tf.Tensor
    ) -> tf.Tensor:
        """What `pixels` needs of images, int32 [n, ...]; arguments as of the call, for [n]."""
        boxes = crop_boxes(
            image_sizes, seeds, (self.min_area, self.max_area), (self.min_aspect, self.max_aspect)
        )
        return boxes if self.decode == "full" else windows(encoded, boxes, size)

    def pixels(self, encoded: tf.Tensor, plan: tf.Tensor, size: int) -> tf.Tensor:
        """uint8 [size, size, 3] of one image, by its row of `plan`."""
        return (full_decode if self.decode == "full" else decode_window)(encoded, plan, size)

    def __call__(
        self, encoded: tf.Tensor, image_size: tf.Tensor, size: int, seed: tf.Tensor
    ) -> tf.Tensor:
        """A crop of one image.

        Args:
          encoded: scalar string, the image file.
          image_size: int32 [height, width] of it.
          size: pixels of each side of the result.
          seed: int64 [2].

        Returns:
          uint8 [size, size, 3].
        """
        batch = (encoded[tf.newaxis], image_size[tf.newaxis], size, seed[tf.newaxis])
        return self.pixels(encoded, self.plan(*batch)[0], size)


def crop_boxes(
    image_sizes: tf.Tensor,
    seeds: tf.Tensor,
    areas: tuple[float, float],
    aspects: tuple[float, float],
) -> tf.Tensor:
    """Random parts of images, distributed as TensorFlow's `sample_distorted_bounding_box`.

    (But for the last row and column of places, which TensorFlow's never takes.) An aspect ratio is
    uniform, then the height among those that keep to the area and the image, then the place. Of
    several attempts the first that succeeds counts, or the whole image.

    Args:
      image_sizes: int32 [n, 2], (height, width).
      seeds: int64 [n, 2].
      areas: least and greatest share of the image's area.
      aspects: least and greatest width / height.

    Returns:
      int32 [n, 4], (top, left, height, width).
    """
    draws = tf.reshape(splitmix.uniform(seeds, 4 * _ATTEMPTS), [-1, _ATTEMPTS, 4])
    aspect_draw, height_draw, *place_draws = tf.unstack(draws, axis=2)
    full_height, full_width = tf.split(tf.cast(image_sizes, tf.float64), 2, axis=1)  # [n, 1]
    least, most = (full_height * full_width * tf.constant(share, tf.float64) for share in areas)
    aspect = aspects[0] + aspect_draw * (aspects[1] - aspects[0])  # [n, attempts]
    highest = tf.minimum(tf.round(tf.sqrt(most / aspect)), full_height)
    highest = tf.minimum(highest, tf.floor((full_width + 0.5 - 1e-7) / aspect))
    lowest = tf.minimum(tf.round(tf.sqrt(least / aspect)), highest)
    height = lowest + tf.floor(height_draw * (highest - lowest + 1))
    # Rounding may have left the bounds of the area by a row.
    height += tf.cast(height * tf.round(height * aspect) < least, tf.float64)
    height -= tf.cast(height * tf.round(height * aspect) > most, tf.float64)
    width = tf.round(height * aspect)
    area = height * width
    good = (area >= least) & (area <= most) & (width <= full_width) & (height <= full_height)
    good &= area > 0
    top = tf.floor(place_draws[0] * (full_height - height + 1))
    left = tf.floor(place_draws[1] * (full_width - width + 1))
    boxes = tf.cast(tf.stack([top, left, height, width], axis=2), tf.int32)
    chosen = tf.gather(boxes, tf.argmax(good, axis=1), batch_dims=1)
    whole = tf.concat([tf.zeros_like(image_sizes), image_sizes], axis=1)
    return tf.where(tf.reduce_any(good, axis=1, keepdims=True), chosen, whole)


def squash(encoded: tf.Tensor, image_size: tf.Tensor, size: int, seed: tf.Tensor) -> tf.Tensor:
    """The whole image, squashed to a square: CLIPA-v2's fine-tuned models are evaluated so."""
    del image_size, seed
    return resize(decode(encoded), size, size)


def center_crop(encoded: tf.Tensor, image_size: tf.Tensor, size: int, seed: tf.Tensor) -> tf.Tensor:
    """The short side resized to `size`, then the centre: CLIPA's pre-trained models' evaluation."""
    del image_size, seed
    image = decode(encoded)
    shape = tf.shape(image)[:2]
    scaled = tf.cast(tf.round(shape * size / tf.reduce_min(shape)), tf.int32)
    image = resize(image, scaled[0], scaled[1])
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return tf.image.crop_to_bounding_box(image, top, left, size, size)


def augment_keys(seed: int, indices: tf.Tensor) -> tf.Tensor:
    """Keys of what is drawn on the accelerator, from a seed and samples' global indices.

    int64 [n] to uint32 [n, 2], key data of `jax.random`'s threefry.
    """
    seeds = tf.stack([tf.fill(tf.shape(indices), tf.constant(seed, tf.int64)), indices], axis=1)
    return tf.bitcast(splitmix.keys(seeds), tf.uint32)


@dataclasses.dataclass(frozen=True)
class TextFeature(seqio.Feature):
    """SeqIO's description of token ids, and how captions are shortened to them.

    Attributes:
      reduction: one of `text_reduction.STRATEGIES`.
    """

    reduction: str = "truncate"

    def __post_init__(self) -> None:
        text_reduction.check(self.reduction)

    def check(self) -> None:
        """Reads what the reduction needs.

        Raises:
          UserError: as `text_reduction.check`.
        """
        vocabulary: Any = self.vocabulary
        text_reduction.check(self.reduction, vocabulary)


def tokenize(
    text: tf.Tensor,
    vocabulary: vocabularies.BertVocabulary,
    length: int,
    reduction: str = "truncate",
    seeds: tf.Tensor | None = None,
) -> tf.Tensor:
    """[CLS], at most `vocabulary.room(length)` pieces, padding; no end token.

    Args:
      text: strings [...n].
      vocabulary: WordPiece vocabulary.
      length: of the result.
      reduction: how longer texts are shortened: one of `text_reduction.STRATEGIES`.
      seeds: int64 [...n, 2], what random reductions draw from; None gives every text its place.

    Returns:
      int32 [...n, length].

    Raises:
      UserError: as `text_reduction.check`, or the vocabulary's file is missing or not one.
    """
    flat = tf.reshape(text, [-1])
    rows: Any = _places(flat) if seeds is None else tf.reshape(seeds, [-1, 2])
    pieces = text_reduction.reduce(
        vocabulary.words_tf(flat),
        vocabulary.room(length),
        reduction,
        vocabulary=vocabulary,
        seeds=rows,
    )
    ids = pieces.to_tensor(vocabulary.pad_id, shape=[None, length - 1])
    first = tf.fill([tf.shape(ids)[0], 1], tf.constant(vocabulary.cls_id, ids.dtype))
    ids = tf.cast(tf.concat([first, ids], axis=1), tf.int32)
    return tf.reshape(ids, tf.concat([tf.shape(text), [length]], axis=0))


def _places(values: tf.Tensor) -> tf.Tensor:
    """A seed for each of [n] values, int64 [n, 2]: (0, where it stands)."""
    places = tf.range(tf.shape(values, tf.int64)[0])
    return tf.stack([tf.zeros_like(places), places], axis=1)


def tokenize_captions(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.utils.Feature],
    *,
    max_captions: int | None = None,
) -> tf.data.Dataset:
    """SeqIO preprocessor: 'text' of 'caption', many captions at a time.

    With `max_captions`, 'texts', int32 [max_captions, length], of the lines of 'caption'; rows of
    zeros, which no caption has, follow the last.

    Takes examples or batches of them, and returns batches: `decode_images` takes them apart.
    """
    name = "text" if max_captions is None else "texts"
    feature: Any = output_features.get(name)
    if feature is None:
        return dataset
    length = sequence_length["text"]

    def convert(examples: Example) -> dict[str, tf.Tensor]:
        texts, seeds = examples["caption"], examples["seed"]
        if max_captions is not None:
            texts, seeds = _captions(texts, seeds, max_captions)
        ids = tokenize(texts, feature.vocabulary, length, feature.reduction, seeds)
        if max_captions is not None:
            ids = tf.where(tf.expand_dims(tf.equal(texts, ""), -1), 0, ids)
        return {**examples, name: tf.ensure_shape(ids, [*texts.shape, length])}

    batches = dataset if _is_batched(dataset) else dataset.batch(_TOKENIZED_TOGETHER)
    return batches.map(as_written(convert), num_parallel_calls=2, deterministic=True)


def _captions(lines: tf.Tensor, seeds: tf.Tensor, most: int) -> tuple[tf.Tensor, tf.Tensor]:
    """(captions [n, most], '' after the last of each row, their seeds) of texts [n], one a line."""
    texts = tf.strings.split(lines, "\n").to_tensor("", shape=[None, most])
    places = tf.range(most, dtype=tf.int64)
    own = seeds[:, 1:] * most + places
    return texts, tf.stack([tf.zeros_like(own) + seeds[:, :1], own], axis=2)


def _is_batched(dataset: tf.data.Dataset) -> bool:
    spec: Any = dataset.element_spec
    return spec["encoded_image"].shape.rank == 1


def decode_images(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    *,
    image_preprocessor: Any,
) -> tf.data.Dataset:
    """SeqIO preprocessor: 'images', uint8 [size, size, 3] each, of 'encoded_image'.

    Takes examples or batches of them, and returns examples.
    """
    size = sequence_length["images"]
    plan = getattr(image_preprocessor, "plan", None)

    def look_ahead(examples: Example) -> dict[str, tf.Tensor]:
        image = (examples["encoded_image"], examples["image_size"], size, examples["seed"])
        return {**examples, "plan": plan(*image)}  # pyright: ignore[reportOptionalCall]

    def convert(example: Example) -> dict[str, tf.Tensor]:
        if plan is not None:
            image = image_preprocessor.pixels(example["encoded_image"], example["plan"], size)
        else:
            image = image_preprocessor(
                example["encoded_image"], example["image_size"], size, example["seed"]
            )
        passed = {k: v for k, v in example.items() if k not in _USED_UP}
        return {**passed, "images": tf.ensure_shape(image, [size, size, 3])}

    if plan is not None:
        batches = dataset if _is_batched(dataset) else dataset.batch(_TOKENIZED_TOGETHER)
        dataset = batches.map(as_written(look_ahead), num_parallel_calls=2, deterministic=True)
    examples = dataset.unbatch() if _is_batched(dataset) else dataset
    return examples.map(
        as_written(convert), num_parallel_calls=NUM_PARALLEL_CALLS, deterministic=True
    )


def image_text_preprocessors(
    image_preprocessor: ImagePreprocessor, max_captions: int | None = None
) -> Sequence[Callable[..., tf.data.Dataset]]:
    """The steps of an image-text task, in order.

    `sequence_length` carries a stage's resolution and text length, T5X's way:
    {'images': pixels, 'text': tokens}.
    """
    return (
        functools.partial(tokenize_captions, max_captions=max_captions),
        functools.partial(decode_images, image_preprocessor=image_preprocessor),
    )
