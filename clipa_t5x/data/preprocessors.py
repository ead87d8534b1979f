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

# One call per core. Left to tf.data's autotuning, an iterator is deleted only when its tuning
# thread next wakes, which after a minute of training takes as long again.
NUM_PARALLEL_CALLS = os.cpu_count() or 1

# For functions that datasets map: autograph would read the source of all they call, seconds at
# every start, to find no Python loop or branch over tensors in it.
as_written = tf.autograph.experimental.do_not_convert

Example = Mapping[str, tf.Tensor]
# (encoded image, int32 [height, width], pixels of each side of the result, int64 [2] seed) to
# uint8 [size, size, 3].
ImagePreprocessor = Callable[[tf.Tensor, tf.Tensor, int, tf.Tensor], tf.Tensor]

# libjpeg decodes at these fractions of the size at less cost: it leaves out the finer waves.
_RATIOS = (1, 2, 4, 8)
# Captions are tokenised so many at a time, seven times faster than one by one.
_TOKENIZED_TOGETHER = 256
# What no one needs of an example once its image is decoded.
_USED_UP = ("encoded_image", "image_size", "seed")


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
    ratio = tf.reduce_sum(tf.cast(tf.reduce_min(box[2:]) >= np.array(_RATIOS[1:]) * size, tf.int32))
    is_jpeg = tf.equal(tf.strings.substr(encoded, 0, 3), image_files.JPEG_START)
    branch = tf.where(is_jpeg, ratio, len(_RATIOS))

    def jpeg_at(ratio: int) -> Callable[[], tf.Tensor]:
        def read() -> tf.Tensor:
            # The nearest whole pixels: at a half, a crop is moved by no more than one of its own.
            first, last = (box[:2] + ratio // 2) // ratio, (box[:2] + box[2:]) // ratio
            window = tf.concat([first, last - first], axis=0)
            return tf.image.decode_and_crop_jpeg(encoded, window, channels=3, ratio=ratio)

        return read

    def other() -> tf.Tensor:
        image = tf.image.decode_png(encoded, channels=3)
        return tf.slice(image, tf.pad(box[:2], [[0, 1]]), tf.concat([box[2:], [3]], axis=0))

    part = tf.switch_case(branch, [*map(jpeg_at, _RATIOS), other])
    resized = tf.raw_ops.ResizeArea(images=part[tf.newaxis], size=[size, size])
    return tf.cast(resized[0], tf.uint8)


def inception_crop(
    encoded: tf.Tensor,
    image_size: tf.Tensor,
    size: int,
    seed: tf.Tensor,
    min_area: float = 0.4,
    max_area: float = 1.0,
    min_aspect: float = 3 / 4,
    max_aspect: float = 4 / 3,
    decode_fn: Callable[[tf.Tensor, tf.Tensor, int], tf.Tensor] = scaled_decode,
) -> tf.Tensor:
    """A random crop of some share of the area, squashed to size x size (Szegedy et al., 2015).

    Args:
      encoded: scalar string, the image file.
      image_size: int32 [height, width] of it.
      size: pixels of each side of the result.
      seed: int64 [2].
      min_area: least share of the area that the crop takes.
      max_area: greatest share.
      min_aspect: least width / height of the crop.
      max_aspect: greatest width / height.
      decode_fn: `scaled_decode`, or `full_decode` as CLIPA does it, which takes thrice as long.

    Returns:
      uint8 [size, size, 3].
    """
    begin, crop, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.pad(image_size, [[0, 1]], constant_values=3),
        tf.zeros([0, 0, 4], tf.float32),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=(min_aspect, max_aspect),
        area_range=(min_area, max_area),
        max_attempts=100,
        use_image_if_no_bounding_boxes=True,
    )
    return decode_fn(encoded, tf.concat([begin[:2], crop[:2]], axis=0), size)


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
    """[CLS], at most length - 1 pieces, padding; no end token.

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
        vocabulary.words_tf(flat), length - 1, reduction, vocabulary=vocabulary, seeds=rows
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
) -> tf.data.Dataset:
    """SeqIO preprocessor: 'text' of 'caption', many captions at a time.

    Takes examples or batches of them, and returns batches: `decode_images` takes them apart.
    """
    feature: Any = output_features.get("text")
    if feature is None:
        return dataset
    length = sequence_length["text"]

    def convert(examples: Example) -> dict[str, tf.Tensor]:
        text = tokenize(
            examples["caption"], feature.vocabulary, length, feature.reduction, examples["seed"]
        )
        return {**examples, "text": tf.ensure_shape(text, [None, length])}

    batches = dataset if _is_batched(dataset) else dataset.batch(_TOKENIZED_TOGETHER)
    return batches.map(as_written(convert), num_parallel_calls=2, deterministic=True)


def _is_batched(dataset: tf.data.Dataset) -> bool:
    spec: Any = dataset.element_spec
    return spec["encoded_image"].shape.rank == 1


def decode_images(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    *,
    image_preprocessor: ImagePreprocessor,
) -> tf.data.Dataset:
    """SeqIO preprocessor: 'images', uint8 [size, size, 3] each, of 'encoded_image'.

    Takes examples or batches of them, and returns examples.
    """
    size = sequence_length["images"]
    examples = dataset.unbatch() if _is_batched(dataset) else dataset

    def convert(example: Example) -> dict[str, tf.Tensor]:
        image = image_preprocessor(
            example["encoded_image"], example["image_size"], size, example["seed"]
        )
        passed = {k: v for k, v in example.items() if k not in _USED_UP}
        return {**passed, "images": tf.ensure_shape(image, [size, size, 3])}

    return examples.map(
        as_written(convert), num_parallel_calls=NUM_PARALLEL_CALLS, deterministic=True
    )


def image_text_preprocessors(
    image_preprocessor: ImagePreprocessor,
) -> Sequence[Callable[..., tf.data.Dataset]]:
    """The steps of an image-text task, in order.

    `sequence_length` carries a stage's resolution and text length, T5X's way:
    {'images': pixels, 'text': tokens}.
    """
    return (
        tokenize_captions,
        functools.partial(decode_images, image_preprocessor=image_preprocessor),
    )
