"""The embedded data sets: small ones that are made, not downloaded, laid out as img2dataset would.

A small data set and a web crawl are so read along one path:

    <output_dir>/<split>/00000.tfrecord    tf.Examples of key, jpg, txt, width, height and labels
    <output_dir>/vocab.txt                 WordPiece vocabulary, one token per line
    <output_dir>/vocab.tags.json           its nouns, adjectives and verbs
    <output_dir>/classes/<name>.txt        class names, the line number is the label
    <output_dir>/templates/<name>.txt      zero-shot prompt templates
    <output_dir>/manifest.json             arguments, and records and SHA-256 of every shard

The data set appears at once, when it is complete: it is written beside its place, then renamed.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from clipa_t5x.data import digits, manifests, record_writer, shapes, word_classes, wordpiece
from clipa_t5x.data import progress as progress_lib
from clipa_t5x.errors import UserError

# Raised whenever the same arguments give other bytes than before.
GENERATOR_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is to be built.

    Attributes:
      name: the data set's name.
      arguments: everything that the data depends on, as the manifest tells it.
      splits: by name, the number of records and a function that yields their features.
      class_lists: class names by the name of the list.
      template_lists: prompt templates by the name of the list.
      phrases: texts that hold every word of the captions.
      words: the captions' words by the name of their class, see `word_classes.NAMES`.
    """

    name: str
    arguments: Mapping[str, int]
    splits: Mapping[str, tuple[int, Callable[[], Iterator[record_writer.Features]]]]
    class_lists: Mapping[str, Sequence[str]]
    template_lists: Mapping[str, Sequence[str]]
    phrases: Sequence[str]
    words: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


def build(
    dataset: Dataset,
    output_dir: str | os.PathLike[str],
    *,
    num_shards: int = 8,
    overwrite: bool = False,
    progress_stream: TextIO | None = None,
) -> dict[str, Any] | None:
    """Writes a data set.

    Args:
      dataset: what to write.
      output_dir: where; a local directory that is missing, empty, or holds a data set.
      num_shards: files per split.
      overwrite: replace another data set found there.
      progress_stream: where to report progress; standard error if None.

    Returns:
      The manifest; None if this very data set is there already.

    Raises:
      UserError: the place is taken, or is not a local directory.
    """
    # A link is followed, so that the data set lands on the disk that the link points to.
    target = pathlib.Path(os.path.realpath(output_dir))
    if "://" in os.fspath(output_dir) or (target.exists() and not target.is_dir()):
        raise UserError(
            f"--output_dir={output_dir} is not a local directory: "
            "build into one, then copy the result where it is to go"
        )
    arguments = {**dataset.arguments, "num_shards": num_shards}
    if _holds(target, dataset.name, arguments):
        return None
    _check_place(target, output_dir, overwrite)

    total = sum(num_records for num_records, _ in dataset.splits.values())
    progress = progress_lib.Progress(total, progress_stream or sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    with _removed_at_exit(unfinished):
        unfinished.mkdir()
        manifest = _write(dataset, arguments, unfinished, progress)
        _swap_in(unfinished, target)
    return manifest


def _holds(directory: pathlib.Path, name: str, arguments: Mapping[str, int]) -> bool:
    manifest = manifests.read(directory)
    if manifest is None:
        return False
    found = tuple(manifest.get(k) for k in ("name", "generator_version", "arguments"))
    if found != (name, GENERATOR_VERSION, arguments):
        return False
    return all(
        (directory / split / shard["file"]).is_file()
        for split, facts in manifest["splits"].items()
        for shard in facts["shards"]
    )


def _check_place(target: pathlib.Path, output_dir: str | os.PathLike[str], overwrite: bool) -> None:
    if not target.exists() or not any(target.iterdir()):
        return
    manifest = manifests.read(target)
    if manifest is None:
        # Replacing means deleting; what this command has not written is not its to delete.
        raise UserError(
            f"--output_dir={output_dir} holds files that are no data set of this command: "
            "choose an empty or new directory (--overwrite replaces data sets only)"
        )
    if not overwrite:
        arguments = manifests.spell(manifest.get("arguments"))
        raise UserError(
            f"--output_dir={output_dir} holds another data set ({manifest.get('name')}, version "
            f"{manifest.get('generator_version')}, {arguments}) or an "
            "incomplete one: pass --overwrite to replace it, or choose another directory"
        )


@contextlib.contextmanager
def _removed_at_exit(directory: pathlib.Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _swap_in(finished: pathlib.Path, target: pathlib.Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        finished.replace(target)
        return
    replaced = target.with_name(f"{finished.name}-replaced")
    target.replace(replaced)
    finished.replace(target)
    shutil.rmtree(replaced)


def _write(
    dataset: Dataset,
    arguments: Mapping[str, int],
    directory: pathlib.Path,
    progress: progress_lib.Progress,
) -> dict[str, Any]:
    texts = [
        *dataset.phrases,
        *(name for names in dataset.class_lists.values() for name in names),
        *(t.replace("{}", "") for lines in dataset.template_lists.values() for t in lines),
    ]
    vocabulary = wordpiece.build_vocabulary(texts)
    vocabulary_path = directory / "vocab.txt"
    wordpiece.write_vocabulary(vocabulary_path, vocabulary)
    classes = word_classes.classify_listed(vocabulary, dataset.words)
    word_classes.write(str(vocabulary_path), classes, "builtin", str(GENERATOR_VERSION))
    for folder, lists in (("classes", dataset.class_lists), ("templates", dataset.template_lists)):
        (directory / folder).mkdir()
        for name, lines in lists.items():
            text = "".join(f"{line}\n" for line in lines)
            (directory / folder / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
    splits = {
        split: _write_split(
            directory / split, make_features(), arguments["num_shards"], set(vocabulary), progress
        )
        for split, (_, make_features) in dataset.splits.items()
    }
    manifest = {
        "generator": manifests.GENERATOR,
        "generator_version": GENERATOR_VERSION,
        "name": dataset.name,
        "seed": arguments["seed"],
        "arguments": dict(arguments),
        "splits": splits,
    }
    manifests.write(directory, manifest)
    return manifest


def _write_split(
    directory: pathlib.Path,
    examples: Iterator[record_writer.Features],
    num_shards: int,
    vocabulary: set[str],
    progress: progress_lib.Progress,
) -> dict[str, Any]:
    lengths = []

    def records() -> Iterator[bytes]:
        for features in examples:
            caption = str(features["txt"])
            unknown = set(wordpiece.basic_tokenize(caption)).difference(vocabulary)
            if unknown:
                raise AssertionError(f"phrases() lacks {sorted(unknown)} of {caption!r}")
            lengths.append(len(caption.split()))
            progress.count()
            yield record_writer.serialize(features)

    shards = record_writer.write_shards(directory, records(), num_shards)
    return {
        "records": len(lengths),
        "caption_words": {
            "min": min(lengths),
            "mean": round(sum(lengths) / len(lengths), 3),
            "max": max(lengths),
        },
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }


def shapes_dataset(
    *,
    num_train: int = 16_000,
    num_validation: int = 1_000,
    num_zeroshot: int = 1_024,
    image_size: int = 64,
    seed: int = 0,
    num_workers: int = 0,
) -> Dataset:
    """Returns the data set of procedural scenes, see `shapes`.

    Args:
      num_train: scenes of the training combinations.
      num_validation: scenes that show held-out combinations.
      num_zeroshot: single objects of held-out combinations, with labels.
      image_size: the side of the images, in pixels.
      seed: the seed of everything random.
      num_workers: processes to render in; the data does not depend on it.
    """
    sizes = {"train": num_train, "validation": num_validation, "zeroshot": num_zeroshot}
    options = {"image_size": image_size, "seed": seed}
    return Dataset(
        name="shapes",
        arguments={**{f"num_{split}": size for split, size in sizes.items()}, **options},
        splits={
            split: (
                size,
                functools.partial(shapes.examples, split, size, num_workers=num_workers, **options),
            )
            for split, size in sizes.items()
        },
        class_lists=shapes.class_lists(),
        template_lists=shapes.template_lists(),
        phrases=shapes.phrases(),
        words=shapes.word_classes(),
    )


def digits_dataset(*, image_size: int = 32, seed: int = 0) -> Dataset:
    """Returns the data set of scikit-learn's handwritten digits, see `digits`.

    Args:
      image_size: the side of the images, in pixels.
      seed: chooses the captions' phrasings.
    """
    options = {"image_size": image_size, "seed": seed}
    return Dataset(
        name="digits",
        arguments=options,
        splits={
            split: (size, functools.partial(digits.examples, split, **options))
            for split, size in digits.SPLITS.items()
        },
        class_lists=digits.class_lists(),
        template_lists=digits.template_lists(),
        phrases=digits.phrases(),
        words=digits.word_classes(),
    )


MAKERS: dict[str, Callable[..., Dataset]] = {"shapes": shapes_dataset, "digits": digits_dataset}
