import re

import numpy as np
import pytest
import tensorflow as tf

from clipa_t5x.data import feature_converters

LENGTHS = {"images": 16, "text": 8}


def dataset(unknown_shapes=False, **changes):
    """One example; `changes` replace its features or, with None, take them away."""
    example = {
        "images": np.arange(16 * 16 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8),
        "text": np.arange(8, dtype=np.int32),
        "index": np.int64(2**40),
        "label": np.int32(3),
        "caption": np.array(b"a cat", object),
        "seed": np.array([1, 2], np.int64),
        **changes,
    }
    example = {k: tf.constant(v) for k, v in example.items() if v is not None}
    ds = tf.data.Dataset.from_tensors(example)
    if not unknown_shapes:
        return ds
    spec = {k: tf.TensorSpec([None] * v.shape.rank, v.dtype) for k, v in example.items()}
    return tf.data.Dataset.from_generator(lambda: iter([example]), output_signature=spec)


def convert(ds, lengths=LENGTHS):
    converted, converter_cls = feature_converters.convert(ds, lengths)
    return next(converted.as_numpy_iterator()), converter_cls


def test_what_is_known_passes_through():
    example, converter_cls = convert(dataset())
    assert converter_cls is feature_converters.ImageTextFeatureConverter
    expected = next(dataset().as_numpy_iterator())
    assert example.keys() == {"images", "text", "index", "label", "caption"}
    for key, value in example.items():
        np.testing.assert_array_equal(value, expected[key])
        assert np.asarray(value).dtype == np.asarray(expected[key]).dtype


def test_what_is_absent_stays_absent():
    example, _ = convert(dataset(label=None, caption=None, index=None))
    assert example.keys() == {"images", "text"}


def test_images_alone():
    example, converter_cls = convert(dataset(text=None))
    assert converter_cls is feature_converters.ImageFeatureConverter
    assert example.keys() == {"images", "index", "label", "caption"}


def test_what_is_known_to_fit_is_left_alone():
    exact = dataset(seed=None)
    assert feature_converters.convert(exact, LENGTHS)[0] is exact
    for other in (dataset(), dataset(seed=None, unknown_shapes=True)):
        assert feature_converters.convert(other, LENGTHS)[0] is not other


def test_lengths_are_known_to_what_follows():
    converted, _ = feature_converters.convert(dataset(unknown_shapes=True), LENGTHS)
    assert converted.element_spec["images"].shape == (16, 16, 3)


@pytest.mark.parametrize("changes, message", [
    ({"images": None}, "missing an expected feature during input_validation validation: 'images'"),
    ({"images": np.zeros((16, 16, 3), np.float32)},
     "type for feature 'images' during input_validation .*Got float32, expected uint8"),
    ({"images": np.zeros((16, 16), np.uint8)},
     "incorrect rank for feature 'images' during input_validation .*Got 2, expected 3"),
    ({"text": np.zeros(8, np.int64)},
     "incorrect type for feature 'text' during input_validation .*Got int64, expected int32"),
    ({"text": np.zeros((8, 1), np.int32)}, "incorrect rank for feature 'text'"),
    ({"label": np.int64(1)}, "incorrect type for feature 'label'"),
    ({"label": np.zeros(1, np.int32)}, "incorrect rank for feature 'label'"),
    ({"caption": np.array([b"a", b"b"], object)}, "incorrect rank for feature 'caption'"),
])  # fmt: skip
def test_wrong_features_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        feature_converters.convert(dataset(**changes), LENGTHS)


@pytest.mark.parametrize("unknown_shapes", [False, True])
@pytest.mark.parametrize("changes, message", [
    ({"images": np.zeros((17, 16, 3), np.uint8)}, "[17"),
    ({"images": np.zeros((16, 17, 3), np.uint8)}, "[16,17,3]"),
    ({"images": np.zeros((16, 16, 1), np.uint8)}, "[16,16,1]"),
    ({"images": np.zeros((15, 15, 3), np.uint8)}, "[15,15,3]"),
    ({"text": np.zeros(9, np.int32)},
     "'text' has length not less than or equal to the expected length of 8 during input"),
    ({"text": np.zeros(7, np.int32)},
     "'text' has length not equal to the expected length of 8 during output"),
])  # fmt: skip
def test_wrong_sizes_are_refused(changes, message, unknown_shapes):
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)) as caught:
        convert(dataset(unknown_shapes, **changes))
    assert message.replace(" ", "") in re.sub(r"[ \\]", "", str(caught.value))


def test_packing_is_refused():
    with pytest.raises(ValueError, match="PACKING_FEATURE_DTYPES"):
        feature_converters.ImageTextFeatureConverter(pack=True)


def test_an_unnamed_length_is_refused():
    converter = feature_converters.ImageTextFeatureConverter(pack=False)
    with pytest.raises(ValueError, match="missing features specified .*text"):
        converter(dataset(), {"images": 16})
