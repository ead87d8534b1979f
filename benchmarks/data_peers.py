"""The peers of `benchmarks/data.py`: CLIPA's preprocessing in tf.data, and WebDataset with Pillow.

Written from descriptions: CLIPA's of its configurations (jitter on the host, a tokeniser for every
example), OpenCLIP's of its loader (Pillow, bicubic, normalised float32).
"""

import io
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from clipa_t5x.data import preprocessors

MEAN = np.asarray([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.asarray([0.26862954, 0.26130258, 0.27577711], np.float32)


def clipa(directory, size, vocabulary, length, batch_size, shuffle_buffer=1000):
    """Batches as CLIPA's H/14 configuration makes them: decoded, shuffled, cropped, jittered."""

    def decode(record):
        fields = {key: tf.io.FixedLenFeature([], tf.string) for key in ("jpg", "txt")}
        parsed = tf.io.parse_single_example(record, fields)
        return tf.io.decode_jpeg(parsed["jpg"], channels=3), parsed["txt"]

    def preprocess(image, caption):
        text = preprocessors.tokenize(caption, vocabulary, length, "syntax")
        return {"images": _jitter(_crop(image, size)), "text": text}

    ds = _records(directory).repeat().map(decode, num_parallel_calls=100)
    ds = ds.shuffle(shuffle_buffer).map(preprocess, num_parallel_calls=100)
    ds = ds.batch(batch_size, drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 48
    options.threading.max_intra_op_parallelism = 1
    return ds.with_options(options).as_numpy_iterator()


def plain_shuffle(directory, size, task, lengths, batch_size, shuffle_buffer=1000):
    """Our own preprocessing behind tf.data's shuffle of encoded records: no order to speak of."""

    def parse(record, number):
        fields = {key: tf.io.FixedLenFeature([], tf.string) for key in ("jpg", "txt")}
        parsed = tf.io.parse_single_example(record, fields)
        seed = tf.stack([tf.constant(0, tf.int64), number])
        return {
            "encoded_image": parsed["jpg"], "caption": parsed["txt"], "seed": seed, "index": number,
            "image_size": tf.io.extract_jpeg_shape(parsed["jpg"])[:2], "valid": True,
        }  # fmt: skip

    ds = _records(directory).repeat().shuffle(shuffle_buffer).enumerate()
    ds = ds.map(lambda number, record: parse(record, number), num_parallel_calls=2)
    ds = task.preprocess_postcache(ds.batch(256), lengths).batch(batch_size)
    options = tf.data.Options()
    options.autotune.enabled = False
    return ds.with_options(options).as_numpy_iterator()


def _records(directory):
    shards = sorted(tf.io.gfile.glob(f"{directory}/tfrecord/train/*"))
    ds = tf.data.Dataset.from_tensor_slices(shards).shuffle(len(shards))
    return ds.interleave(tf.data.TFRecordDataset, cycle_length=len(shards), num_parallel_calls=2)


def _crop(image, size):
    begin, part, _ = tf.image.sample_distorted_bounding_box(
        tf.shape(image), tf.zeros([0, 0, 4], tf.float32), area_range=(0.4, 1.0),
        min_object_covered=0.0, use_image_if_no_bounding_boxes=True,
    )  # fmt: skip
    resized = tf.image.resize(tf.slice(image, begin, part), [size, size], antialias=True)
    return tf.cast(resized, tf.uint8)


def _jitter(image, strength=0.4):
    image = tf.cast(image, tf.float32) / 255.0
    low, high = 1 - 0.8 * strength, 1 + 0.8 * strength
    steps = (
        lambda x: x * tf.random.uniform([], low, high),
        lambda x: tf.image.random_contrast(x, low, high),
        lambda x: tf.image.random_saturation(x, low, high),
        lambda x: tf.image.random_hue(x, 0.2 * strength),
    )

    def recolored():
        result, order = image, tf.random.shuffle(tf.range(4))
        for turn in range(4):
            here = result
            branches = [lambda step=step, here=here: step(here) for step in steps]
            result = tf.clip_by_value(tf.switch_case(order[turn], branches), 0.0, 1.0)
        return result

    def gray():
        return tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(result))

    result = tf.cond(tf.random.uniform([]) < 0.8, recolored, lambda: image)
    result = tf.cond(tf.random.uniform([]) < 0.2, gray, lambda: result)
    return tf.cast(tf.clip_by_value(result * 255.0, 0.0, 255.0), tf.uint8)


def webdataset_pillow(directory, size, vocabulary, length, batch_size, shuffle_buffer=1000):
    """Batches as OpenCLIP's loader makes them, in this process."""
    from webdataset import WebDataset  # pyright: ignore

    rng = np.random.default_rng(0)
    # Its tokeniser is another one: looking whole words up is as little as any takes.
    ids = {piece: i for i, piece in enumerate(vocabulary.pieces)}

    def preprocess(sample):
        image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        left, top, width, height = _crop_box(rng, *image.size)
        box = (left, top, left + width, top + height)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        pixels = (np.asarray(image, np.float32) / 255.0 - MEAN) / STD
        words = sample["txt"].decode().split()[: length - 1]
        text = [ids.get(word, vocabulary.unk_id) for word in words]
        return pixels.transpose(2, 0, 1), np.pad(
            np.asarray(text, np.int32), (1, length - 1 - len(text))
        )

    shards = sorted(tf.io.gfile.glob(f"{directory}/tar/train/*.tar"))
    ds: Any = WebDataset(shards, shardshuffle=len(shards), empty_check=False).repeat()
    ds = ds.shuffle(shuffle_buffer).map(preprocess).batched(batch_size, partial=False)
    return iter(ds)


def _crop_box(rng, width, height):
    for _ in range(10):
        area = rng.uniform(0.4, 1.0) * width * height
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, width - w + 1), rng.integers(0, height - h + 1), w, h
    return 0, 0, width, height
