"""Data sets in clip_benchmark's WebDataset layout, evaluated where they lie.

<folder>/classnames.txt                             one class name a line
<folder>/zeroshot_classification_templates.txt      one prompt a line, {c} for the class name
<folder>/dataset_type.txt                           'retrieval', 'multilabel', or absent
<folder>/test/nshards.txt                           how many shards there are
<folder>/test/0.tar, 1.tar, ...                     image with .cls, .npy (multi-hot) or .txt
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from clipa_t5x.data import input_pipeline, preprocessors, prompts, tasks, vocabularies
from clipa_t5x.errors import UserError
from clipa_t5x.evaluators import evaluator, retrieval, zero_shot

_CLASS_NAMES, _TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
_NUM_SHARDS = "nshards.txt"


def evaluators(
    folders: str | Sequence[str],
    vocabulary: vocabularies.BertVocabulary,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    image_preprocessor: preprocessors.ImagePreprocessor = preprocessors.center_crop,
    text_reduction: str = "truncate",
    keep_class_name: bool = False,
    split: str = "test",
    max_captions: int = 5,
) -> dict[str, "ClipBenchmark"]:
    """An evaluator for each data set, called as its folder is.

    Args:
      folders: of data sets, or of one; one that only holds data sets' stands for them all.
      vocabulary: as of `ClipBenchmark`.
      task_feature_lengths: likewise.
      batch_size: likewise.
      image_preprocessor: likewise.
      text_reduction: likewise.
      keep_class_name: likewise.
      split: likewise.
      max_captions: likewise.

    Raises:
      UserError: no folder is named, or two are called the same.
    """
    named = [folders] if isinstance(folders, str) else folders
    if not isinstance(named, Sequence) or not named or not all(isinstance(f, str) for f in named):
        raise UserError(
            f"CLIP_BENCHMARK_DIRS is {folders!r}: give folders, as in ['data/wds_cifar10'], or "
            "CLIP_BENCHMARK_DIR one."
        )
    found: dict[str, ClipBenchmark] = {}
    for folder in [each for parent in named for each in _data_sets(parent, split)]:
        name = os.path.basename(os.path.normpath(folder))
        if name in found:
            raise UserError(
                f"{found[name].folder} and {folder} of CLIP_BENCHMARK_DIRS are both called {name}, "
                "as their results would be: rename one."
            )
        found[name] = ClipBenchmark(
            folder, vocabulary, task_feature_lengths, batch_size, image_preprocessor,
            text_reduction, keep_class_name, split, max_captions,
        )  # fmt: skip
    return found


def _data_sets(folder: str, split: str) -> list[str]:
    """A folder itself, or, where it only holds data sets, theirs, sorted by name."""
    path = epath.Path(folder)
    if (path / split).exists() or not path.is_dir():
        return [folder]
    inner = sorted(each for each in path.iterdir() if (each / split / _NUM_SHARDS).exists())
    return [os.fspath(each) for each in inner] or [folder]


@dataclasses.dataclass(frozen=True)
class ClipBenchmark:
    """Zero-shot classification or retrieval, whichever the folder is for.

    Attributes:
      folder: of the data set.
      vocabulary: tokeniser of prompts and captions.
      task_feature_lengths: {'images': pixels, 'text': tokens}.
      batch_size: global.
      image_preprocessor: of the images.
      text_reduction: how texts are shortened.
      keep_class_name: as of `zero_shot.ZeroShotClassification`.
      split: folder of the shards.
      max_captions: how many captions of an image count in retrieval, the first ones.
    """

    folder: str
    vocabulary: vocabularies.BertVocabulary
    task_feature_lengths: Mapping[str, int]
    batch_size: int
    image_preprocessor: preprocessors.ImagePreprocessor = preprocessors.center_crop
    text_reduction: str = "truncate"
    keep_class_name: bool = False
    split: str = "test"
    max_captions: int = 5

    def check(self, num_parts: int = 1) -> None:
        """Reads the folder's files and the index of its shards.

        Raises:
          UserError: the folder is of another layout, shards are missing, or as the evaluator that
            the folder is for.
        """
        self._evaluator().check(num_parts)

    def evaluate(
        self, params: Any, embed: evaluator.EmbedFunctions, output_dir: str | None
    ) -> Mapping[str, float]:
        """As `zero_shot.ZeroShotClassification` or `retrieval.Retrieval`."""
        return self._evaluator().evaluate(params, embed, output_dir)

    def _evaluator(self) -> evaluator.Evaluator:
        """What evaluates the folder; registers its task."""
        kind = self._kind()
        self._check_shards()
        name = re.sub(r"[^\w.]+", "_", os.path.basename(os.path.normpath(self.folder)))
        task = tasks.image_text_task(
            f"clip_benchmark_{name}",
            self.folder,
            vocabulary=self.vocabulary if kind == "retrieval" else None,
            image_preprocessor=self.image_preprocessor,
            splits={self.split: f"{self.split}/*.tar"},
            image_key="webp;png;jpg;jpeg",
            label_key="cls" if kind == "classification" else None,
            labels_key="npy" if kind == "multilabel" else None,
            text_reduction=self.text_reduction,
            max_captions=self.max_captions if kind == "retrieval" else None,
        )
        cfg = input_pipeline.DatasetConfig(
            task, self.task_feature_lengths, self.split, self.batch_size, shuffle=False
        )
        if kind == "retrieval":
            return retrieval.Retrieval(cfg)
        return zero_shot.ZeroShotClassification(
            cfg,
            class_names_path=os.path.join(self.folder, _CLASS_NAMES),
            templates_path=os.path.join(self.folder, _TEMPLATES),
            vocabulary=self.vocabulary,
            text_reduction=self.text_reduction,
            keep_class_name=self.keep_class_name,
        )

    def _kind(self) -> str:
        path = epath.Path(self.folder) / "dataset_type.txt"
        if path.exists():
            (kind,) = prompts.read_lines(os.fspath(path), "data set type")[:1]
            kind = kind.lower()
        else:
            named = (epath.Path(self.folder) / _CLASS_NAMES).exists()
            kind = "classification" if named else "retrieval"
        if kind not in ("classification", "multilabel", "retrieval"):
            raise UserError(
                f"{path} says {kind!r}: only classification, multilabel and retrieval can be "
                "evaluated."
            )
        return kind

    def _check_shards(self) -> None:
        """Refuses a folder of which shards are missing.

        Raises:
          UserError: its number of shards is not told, or another.
        """
        shards = epath.Path(self.folder) / self.split
        path = shards / _NUM_SHARDS
        if not path.exists():
            raise UserError(
                f"{self.folder} is not in clip_benchmark's layout: {path} does not exist. Set "
                "CLIP_BENCHMARK_DIR to a folder that clip_benchmark_export_wds wrote, or "
                "CLIP_BENCHMARK_DIRS to several, or to the folder that holds them."
            )
        stated = prompts.read_lines(os.fspath(path), "number of shards")[0]
        found = len(list(shards.glob("*.tar")))
        if stated != str(found):
            raise UserError(
                f"{path} says {stated} shards, but {found} lie beside it: copy the data set again."
            )
