"""SeqIO tasks over image-text records: registered by name when a configuration names them."""

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from clipa_t5x.data import (
    image_files,
    mixtures,
    preprocessors,
    shard_formats,
    sources,
    tfds_datasets,
    vocabularies,
)
from clipa_t5x.errors import UserError, check_number


def image_text_task(
    name: str,
    data_dir: str,
    vocabulary: vocabularies.BertVocabulary | None = None,
    image_preprocessor: preprocessors.ImagePreprocessor | None = None,
    shard_format: shard_formats.ShardFormat | None = None,
    splits: Mapping[str, str] | None = None,
    index_dir: str | None = None,
    image_key: str = "jpg",
    caption_key: str | Mapping[str, float] = "txt",
    label_key: str | None = None,
    labels_key: str | None = None,
    max_captions: int | None = None,
    text_reduction: str = "truncate",
    window_bytes: int = sources.DEFAULT_WINDOW_BYTES,
    max_pixels: int = image_files.MAX_PIXELS,
) -> str:
    """Registers a SeqIO task over shards of images and captions, and returns its name.

    In gin: `MIXTURE_OR_TASK_NAME = @tasks.image_text_task()`. A second call with the same name
    replaces the task. No file is read before the task's first use.

    Args:
      name: of the task.
      data_dir: folder of the shards, local or gs://.
      vocabulary: tokeniser of the captions; None makes a task of images (and labels) alone.
      image_preprocessor: function of (encoded image, its size, size, seed), see `preprocessors`;
        None for `preprocessors.InceptionCrop()`.
      shard_format: how records lie in files; None for what the files' names say.
      splits: split name -> glob pattern under `data_dir`; default: the format's usual ones.
      index_dir: where the record index is kept; default beside the data.
      image_key: name of the records' field with the encoded image; of several, separated by ';',
        the first that a record has.
      caption_key: name of the field with the caption, or names with how likely each is taken.
      label_key: name of the field with the label, an int64; None where there is none.
      labels_key: name of a field with any number of labels of an image, for evaluation; see
        `labels.several`.
      max_captions: for evaluation, take so many captions of each image, the first ones, instead of
        one of them: examples then have 'texts', int32 [max_captions, length], instead of 'text'.
      text_reduction: how captions are shortened to the text's length, one of
        `clipa_t5x.data.text_reduction.STRATEGIES`.
      window_bytes: size of the shuffle window in bytes of records as stored.
      max_pixels: height times width above which an image is refused undecoded.

    Raises:
      UserError: there is no such strategy, or a number is none or too small.
    """
    captions = _caption_rates(vocabulary, caption_key)
    fields = _record_fields(image_key, captions, label_key, labels_key, max_captions, max_pixels)
    check_number("SHUFFLE_WINDOW_BYTES", window_bytes, minimum=1, whole=True)
    _check_splits(splits)
    source = sources.ImageTextSource(
        data_dir, shard_format, fields, splits, index_dir, window_bytes
    )
    return _register(name, source, vocabulary, image_preprocessor, text_reduction, max_captions)


def tfds_task(
    name: str,
    tfds_name: str | None,
    data_dir: str,
    vocabulary: vocabularies.BertVocabulary | None = None,
    image_preprocessor: preprocessors.ImagePreprocessor | None = None,
    splits: Mapping[str, str] | None = None,
    index_dir: str | None = None,
    image_key: str = "image",
    caption_key: str | Mapping[str, float] = "caption",
    label_key: str | None = "label",
    labels_key: str | None = None,
    max_captions: int | None = None,
    text_reduction: str = "truncate",
    window_bytes: int = sources.DEFAULT_WINDOW_BYTES,
    max_pixels: int = image_files.MAX_PIXELS,
) -> str:
    """Registers a task over a data set that TFDS has prepared, and returns its name.

    Arguments that are not named here are those of `image_text_task`.

    Args:
      name: of the task.
      tfds_name: 'name', 'name/config' or 'name/config:version'; None where `data_dir` is the folder
        of the version itself.
      data_dir: where TFDS prepared it.
      vocabulary: tokeniser of the captions; None makes a task of images and labels.
      image_preprocessor: as above.
      splits: name of a split here -> its name in TFDS; by default 'train', 'validation' and 'test'
        are what they are called there.
      index_dir: as above.
      image_key: name of the feature with the image.
      caption_key: name of the feature with the caption, or names with how likely each is taken.
      label_key: name of the feature with the label; None where there is none.
      labels_key: as above.
      max_captions: as above.
      text_reduction: as above.
      window_bytes: as above.
      max_pixels: as above.

    Raises:
      UserError: as `image_text_task`.
    """
    captions = _caption_rates(vocabulary, caption_key)
    fields = _record_fields(image_key, captions, label_key, labels_key, max_captions, max_pixels)
    check_number("SHUFFLE_WINDOW_BYTES", window_bytes, minimum=1, whole=True)
    _check_splits(splits)
    source = tfds_datasets.TFDSSource(tfds_name, data_dir, fields, splits, index_dir, window_bytes)
    return _register(name, source, vocabulary, image_preprocessor, text_reduction, max_captions)


def _caption_rates(
    vocabulary: vocabularies.BertVocabulary | None, caption_key: str | Mapping[str, float]
) -> dict[str, float]:
    """How likely each caption field is taken; none if there is no vocabulary for them."""
    rates = {caption_key: 1.0} if isinstance(caption_key, str) else caption_key
    _check_rates(rates)
    return {} if vocabulary is None else dict(rates)


def _record_fields(
    image_key: str,
    captions: Mapping[str, float],
    label_key: str | None,
    labels_key: str | None,
    max_captions: int | None,
    max_pixels: int,
) -> sources.RecordFields:
    """The fields of a task's records."""
    check_number("MAX_PIXELS", max_pixels, minimum=1, whole=True)
    if max_captions is not None:
        check_number("max_captions", max_captions, minimum=1, whole=True)
    return sources.RecordFields(
        image_key, captions, label_key, labels_key, max_captions, max_pixels
    )


def _check_rates(rates: object) -> None:
    """Refuses what tells no caption's rate.

    Raises:
      UserError: it is no dictionary of names and rates, or not one is above 0.
    """
    if not isinstance(rates, Mapping) or not rates or not all(isinstance(n, str) for n in rates):
        raise UserError(
            f"CAPTION_KEY is {rates!r}; it must be a field's name, or names with how likely each "
            "is taken, as in {'txt': 0.5, 'synthetic': 0.5}."
        )
    for name, rate in rates.items():
        check_number(f"the rate of {name!r} in CAPTION_KEY", rate, minimum=0)
    if not 0 < sum(rates.values()) < float("inf"):
        raise UserError(
            f"CAPTION_KEY is {rates!r}: one of its rates must be above 0, none infinite."
        )


def _check_splits(splits: object) -> None:
    if splits is not None and not isinstance(splits, Mapping):
        raise UserError(
            f"DATA_SPLITS is {splits!r}; it must be names with patterns, as in "
            "{'train': 'train/*.tar'}."
        )


def _register(
    name: str,
    source: sources.ImageTextSource,
    vocabulary: vocabularies.BertVocabulary | None,
    image_preprocessor: preprocessors.ImagePreprocessor | None,
    text_reduction: str,
    max_captions: int | None,
) -> str:
    images = seqio.ContinuousFeature(dtype=tf.uint8, rank=3)
    features: dict[str, seqio.utils.Feature] = {"images": images}
    if vocabulary is not None:
        text = preprocessors.TextFeature(
            vocabulary, add_eos=False, dtype=tf.int32, reduction=text_reduction,
            rank=1 if max_captions is None else 2,
        )  # fmt: skip
        features["text" if max_captions is None else "texts"] = text
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=preprocessors.image_text_preprocessors(
            image_preprocessor or preprocessors.InceptionCrop(), max_captions
        ),
        output_features=features,
        shuffle_buffer_size=None,
    )
    return name


def mixture(name: str, rates: Mapping[str, float]) -> str:
    """Registers a SeqIO mixture of tasks, and returns its name.

    In gin: `MIXTURE_OR_TASK_NAME = @tasks.mixture()`, with
    `tasks.mixture.rates = {@a/tasks.image_text_task(): 0.7, @b/tasks.image_text_task(): 0.3}`. Its
    samples are those of `mixtures.MixtureSource`; SeqIO's own `get_dataset` draws them otherwise.

    Args:
      name: of the mixture; a second call with the same name replaces it.
      rates: how often each task, by its name, is taken; their sum may be any.

    Raises:
      UserError: a task is unknown or cannot be read at any position, the tasks differ in their
        preprocessors or output features, or a rate is out of range.
    """
    if not rates:
        raise UserError(f"the mixture {name!r} has no tasks: give rates as {{task name: rate}}.")
    mixtures.check_alike([get_task(task) for task in rates])
    mixtures.shares(rates)
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, list(rates.items()))
    return name


def _registered(name: str) -> tuple[seqio.Task | seqio.Mixture, list[seqio.Task]]:
    """(what is registered under a name, its tasks); see `get_task`."""
    known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    if name not in known:
        raise UserError(
            f"MIXTURE_OR_TASK_NAME is {name!r}, which is not a registered SeqIO task. Registered: "
            f"{', '.join(known) or 'none'}. Set it to @tasks.image_text_task() with a data_dir."
        )
    found = seqio.get_mixture_or_task(name)
    components = found.tasks if isinstance(found, seqio.Mixture) else [found]
    if not all(isinstance(task.source, sources.PositionalSource) for task in components):
        raise UserError(
            f"{name!r} cannot be read at any position, so a run could not resume at its step: use "
            "tasks over an ImageTextSource, see clipa_t5x.data.tasks."
        )
    return found, components


def get_task(name: str) -> seqio.Task:
    """The registered task of a name; of a mixture, one of its tasks, which are alike.

    Raises:
      UserError: nothing is registered under the name, or what is cannot be read at any position.
    """
    return _registered(name)[1][0]


def get_source(name: str) -> sources.PositionalSource:
    """The data source of a registered task or mixture.

    Raises:
      UserError: as `get_task`; or a mixture's tasks differ in kind.
    """
    found, _ = _registered(name)
    source: Any = found
    return mixtures.source_of(source) if isinstance(found, seqio.Mixture) else source.source


def image_preprocessor(name: str) -> preprocessors.ImagePreprocessor:
    """What a registered task makes of images.

    Raises:
      UserError: as `get_task`.
    """
    decode_images: Any = get_task(name).preprocessors[-1]
    return decode_images.keywords["image_preprocessor"]
