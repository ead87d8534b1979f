"""The seam between tasks and the model: exact features, dtypes, ranks and lengths, or an error."""

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from clipa_t5x.data import preprocessors

FeatureSpec = seqio.FeatureConverter.FeatureSpec
IMAGES = FeatureSpec(dtype=tf.uint8, rank=3, sequence_dim=0)
TEXT = FeatureSpec(dtype=tf.int32, rank=1, sequence_dim=0)

# What an example may carry beside the model's features, for evaluators.
PASSTHROUGH = {
    "index": FeatureSpec(dtype=tf.int64, rank=0),
    "label": FeatureSpec(dtype=tf.int32, rank=0),
    "labels": FeatureSpec(dtype=tf.int32, rank=1),
    "texts": FeatureSpec(dtype=tf.int32, rank=2),
    "caption": FeatureSpec(dtype=tf.string, rank=0),
    "valid": FeatureSpec(dtype=tf.bool, rank=0),
}


class ImageTextFeatureConverter(seqio.FeatureConverter):
    """'images' uint8 [size, size, 3] and 'text' int32 [length], neither packed nor trimmed."""

    TASK_FEATURES: Mapping[str, FeatureSpec] = {"images": IMAGES, "text": TEXT}
    MODEL_FEATURES: Mapping[str, FeatureSpec] = {"images": IMAGES, "text": TEXT}
    PACKING_FEATURE_DTYPES: Any = None  # SeqIO then refuses to pack

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        size = task_feature_lengths["images"]
        wanted = (*self.MODEL_FEATURES, *self._passthrough_features)

        def convert(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            # SeqIO looks at one dimension of a feature; an image has three.
            images = tf.ensure_shape(example["images"], [size, size, 3])
            return {**{key: example[key] for key in wanted}, "images": images}

        return ds.map(preprocessors.as_written(convert))

    def get_model_feature_lengths(
        self, task_feature_lengths: Mapping[str, int]
    ) -> Mapping[str, int]:
        """The model's features are the task's."""
        return task_feature_lengths


class ImageFeatureConverter(ImageTextFeatureConverter):
    """'images' alone, for classification data without captions."""

    TASK_FEATURES: Mapping[str, FeatureSpec] = {"images": IMAGES}
    MODEL_FEATURES: Mapping[str, FeatureSpec] = {"images": IMAGES}


def convert(
    ds: tf.data.Dataset, feature_lengths: Mapping[str, int]
) -> tuple[tf.data.Dataset, type[seqio.FeatureConverter]]:
    """Validates and converts a task's dataset; what is known to evaluators passes through."""
    present: Any = ds.element_spec
    passthrough = {key: spec for key, spec in PASSTHROUGH.items() if key in present}
    has_text = "text" in present
    converter_cls = ImageTextFeatureConverter if has_text else ImageFeatureConverter
    lengths = {key: feature_lengths[key] for key in converter_cls.TASK_FEATURES}
    if _is_exact(present, passthrough, lengths):
        # Nothing is left to be found out by looking at every example, a tenth of the host's time.
        return ds, converter_cls
    converter = converter_cls(pack=False, passthrough_features=passthrough)
    others = {key: [*present[key].shape, 1][0] for key in passthrough}
    return converter(ds, {**lengths, **others}), converter_cls


def _is_exact(
    spec: Mapping[str, tf.TensorSpec],
    passthrough: Mapping[str, FeatureSpec],
    lengths: Mapping[str, int],
) -> bool:
    """Whether a data set is known to have the features that are wanted, and no others."""
    shapes = {"images": lambda size: [size, size, 3], "text": lambda length: [length]}
    wanted: dict[str, tuple[FeatureSpec, list[int | None]]] = {
        key: (IMAGES if key == "images" else TEXT, shapes[key](n)) for key, n in lengths.items()
    }
    wanted.update({key: (feature, [None] * feature.rank) for key, feature in passthrough.items()})
    return spec.keys() == wanted.keys() and all(
        spec[key].dtype == feature.dtype and _has_shape(spec[key], shape)
        for key, (feature, shape) in wanted.items()
    )


def _has_shape(spec: tf.TensorSpec, shape: list[int | None]) -> bool:
    """Whether a tensor is known to have a shape, whose None stands for any dimension."""
    return spec.shape.rank == len(shape) and all(
        size in (None, found) for size, found in zip(shape, spec.shape, strict=True)
    )
