"""From a serialised record to image and token ids: pure functions in TensorFlow.

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

from clipa_t5x.data import splitmix, text_reduction, vocabularies

# One call per core. Left to tf.data's autotuning, an iterator is deleted only when its tuning
# thread next wakes, which after a minute of training takes as long again.
NUM_PARALLEL_CALLS = os.cpu_count() or 1

# For functions that datasets map: autograph would read the source of all they call, seconds at
# every start, to find no Python loop or branch over tensors in it.
as_written = tf.autograph.experimental.do_not_convert

Example = Mapping[str, tf.Tensor]
ImagePreprocessor = Callable[[tf.Tensor, int, tf.Tensor], tf.Tensor]


def parse_record(
    example: Example, *, image_key: str, caption_key: str | None, label_key: str | None
) -> dict[str, tf.Tensor]:
    """Takes 'encoded_image', 'caption' and 'label' out of a serialised tf.train.Example.

    'index' and 'seed' pass through. A missing caption is an empty string.
    """
    wanted: dict[str, tf.io.FixedLenFeature] = {image_key: tf.io.FixedLenFeature([], tf.string)}
    if caption_key is not None:
        wanted[caption_key] = tf.io.FixedLenFeature([], tf.string, default_value="")
    if label_key is not None:
        wanted[label_key] = tf.io.FixedLenFeature([], tf.int64)
    parsed = tf.io.parse_single_example(example["record"], wanted)
    result = {"encoded_image": parsed[image_key], "index": example["index"]}
    result["seed"] = example["seed"]
    if caption_key is not None:
        result["caption"] = parsed[caption_key]
    if label_key is not None:
        result["label"] = tf.cast(parsed[label_key], tf.int32)
    return result


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


def inception_crop(
    encoded: tf.Tensor,
    size: int,
    seed: tf.Tensor,
    min_area: float = 0.4,
    max_area: float = 1.0,
    min_aspect: float = 3 / 4,
    max_aspect: float = 4 / 3,
) -> tf.Tensor:
    """A random crop of some share of the area, squashed to size x size (Szegedy et al., 2015).

    Args:
      encoded: scalar string, the image file.
      size: pixels of each side of the result.
      seed: int64 [2].
      min_area: least share of the area that the crop takes.
      max_area: greatest share.
      min_aspect: least width / height of the crop.
      max_aspect: greatest width / height.

    Returns:
      uint8 [size, size, 3].
    """
    image = decode(encoded)
    begin, crop, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        tf.zeros([0, 0, 4], tf.float32),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=(min_aspect, max_aspect),
        area_range=(min_area, max_area),
        max_attempts=100,
        use_image_if_no_bounding_boxes=True,
    )
    return resize(tf.slice(image, begin, crop), size, size)


def squash(encoded: tf.Tensor, size: int, seed: tf.Tensor) -> tf.Tensor:
    """The whole image, squashed to a square: CLIPA-v2's fine-tuned models are evaluated so."""
    del seed
    return resize(decode(encoded), size, size)


def center_crop(encoded: tf.Tensor, size: int, seed: tf.Tensor) -> tf.Tensor:
    """The short side resized to `size`, then the centre: CLIPA's pre-trained models' evaluation."""
    del seed
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


def parse_records(
    dataset: tf.data.Dataset, *, image_key: str, caption_key: str | None, label_key: str | None
) -> tf.data.Dataset:
    """SeqIO preprocessor: `parse_record` over a dataset."""
    parse = functools.partial(
        parse_record, image_key=image_key, caption_key=caption_key, label_key=label_key
    )
    return dataset.map(as_written(parse), num_parallel_calls=NUM_PARALLEL_CALLS, deterministic=True)


def to_features(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.utils.Feature],
    *,
    image_preprocessor: ImagePreprocessor,
) -> tf.data.Dataset:
    """SeqIO preprocessor: 'images' and, where there are captions, 'text'.

    `sequence_length` carries a stage's resolution and text length, T5X's way:
    {'images': pixels, 'text': tokens}.
    """
    text_feature: Any = output_features.get("text")

    def convert(example: Example) -> dict[str, tf.Tensor]:
        size = sequence_length["images"]
        images = image_preprocessor(example["encoded_image"], size, example["seed"])
        features = {"images": tf.ensure_shape(images, [size, size, 3])}
        if text_feature is not None:
            text = tokenize(
                example["caption"],
                text_feature.vocabulary,
                sequence_length["text"],
                text_feature.reduction,
                example["seed"],
            )
            features["text"] = tf.ensure_shape(text, [sequence_length["text"]])
        passed = {k: example[k] for k in ("index", "label", "caption") if k in example}
        return {**features, **passed}

    return dataset.map(
        as_written(convert), num_parallel_calls=NUM_PARALLEL_CALLS, deterministic=True
    )


def image_text_preprocessors(
    *,
    image_preprocessor: ImagePreprocessor,
    image_key: str,
    caption_key: str | None,
    label_key: str | None,
) -> Sequence[Callable[..., tf.data.Dataset]]:
    """The steps of an image-text task, in order."""
    return (
        functools.partial(
            parse_records, image_key=image_key, caption_key=caption_key, label_key=label_key
        ),
        functools.partial(to_features, image_preprocessor=image_preprocessor),
    )
