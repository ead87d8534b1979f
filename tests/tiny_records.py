"""Image-caption shards of a few small pictures, and tasks over them."""

import numpy as np

from clipa_t5x.data import (
    input_pipeline,
    record_writer,
    tasks,
    vocabularies,
    word_classes,
)

WORDS = ("red", "green", "blue", "cat", "dog", "big", "small", "a", "##s", ",", "of", "photo")
LENGTHS = {"images": 16, "text": 8}


def picture(i: int, height: int = 24, width: int = 32) -> np.ndarray:
    """A smooth picture, uint8 [height, width, 3], whose mean tells it from those of other i."""
    y, x = np.mgrid[:height, :width]
    base = np.stack([10 * i + x, 255 - 10 * i - x, 4 * y], axis=-1)
    return np.clip(base, 0, 255).astype(np.uint8)


def caption(i: int) -> str:
    """A caption of words in WORDS."""
    return f"photo of a {WORDS[i % 3]} {WORDS[3 + i % 2]}s"


def features(i: int, **changes) -> record_writer.Features:
    """Of example i; label i % 5."""
    own = record_writer.image_features(f"{i:05d}", picture(i), caption(i), {"label": i % 5})
    return {**own, **changes}


def records(count: int, **changes) -> list[bytes]:
    """Serialised examples."""
    return [record_writer.serialize(features(i, **changes)) for i in range(count)]


def write(directory, count: int = 13, num_shards: int = 3, split: str = "train") -> str:
    """Writes `records(count)` as a split under `directory`; returns `directory`."""
    record_writer.write_shards(directory / split, records(count), num_shards)
    return str(directory)


def vocabulary(directory) -> vocabularies.BertVocabulary:
    """A WordPiece vocabulary of 15 pieces."""
    path = directory / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", *WORDS]) + "\n")
    return vocabularies.BertVocabulary(str(path))


def write_word_classes(vocabulary: vocabularies.BertVocabulary) -> None:
    """The table beside a `vocabulary`: nouns and adjectives among WORDS."""
    words = {"noun": ("cat", "dog"), "adjective": ("red", "green", "blue", "big", "small")}
    classes = word_classes.classify_listed(vocabulary.pieces, words)
    word_classes.write(vocabulary.path, classes, "by hand", "1")


def task(name: str, directory, image_preprocessor=None, **kwargs) -> str:
    """Registers a task over the shards in `directory`."""
    kwargs = {"label_key": "label", **kwargs}
    if "vocabulary" not in kwargs:
        kwargs["vocabulary"] = vocabulary(directory)
    return tasks.image_text_task(
        name, str(directory), image_preprocessor=image_preprocessor, **kwargs
    )


def config(name: str, batch_size: int = 8, **kwargs) -> input_pipeline.DatasetConfig:
    """A dataset of that task's training split."""
    kwargs = {"task_feature_lengths": LENGTHS, "split": "train", **kwargs}
    return input_pipeline.DatasetConfig(name, batch_size=batch_size, **kwargs)
