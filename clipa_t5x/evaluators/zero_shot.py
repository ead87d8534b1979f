"""Zero-shot classification by prompts (Radford et al., 2021, section 3.1)."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from clipa_t5x import models
from clipa_t5x.data import input_pipeline, prompts, text_reduction, vocabularies
from clipa_t5x.errors import UserError, check_number
from clipa_t5x.evaluators import classification_metrics, evaluator


def class_embeddings(prompt_embeddings: np.ndarray, num_templates: int) -> np.ndarray:
    """Each class's mean prompt embedding, scaled to unit length.

    Args:
      prompt_embeddings: float32 [classes x templates, joint], a class's prompts side by side.
      num_templates: prompts of each class.

    Returns:
      float32 [classes, joint].
    """
    means = prompt_embeddings.reshape(-1, num_templates, prompt_embeddings.shape[-1]).mean(axis=1)
    return np.asarray(models.l2_normalize(jnp.asarray(means)))


def embed_prompts(
    params: Any, embed: evaluator.EmbedFunctions, ids: np.ndarray, batch_size: int
) -> np.ndarray:
    """Embeddings [prompts, joint] of token ids [prompts, length], in padded batches."""
    rows = embed.layout.local_rows(batch_size)
    parts = []
    for start in range(0, len(ids), batch_size):
        padded = ids[np.minimum(start + rows, len(ids) - 1)]
        batch = embed.layout.to_global({"text": padded}, batch_size)
        embeddings = embed.embed_text(params, batch["text"])
        parts.append(evaluator.gather(embeddings, embed.layout))
    return np.concatenate(parts)[: len(ids)]


@functools.partial(jax.jit, static_argnames="k")
def _classify(images: jax.Array, classes: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """(the k classes of highest score, best first, of equal ones the earlier; all scores)."""
    scores = jnp.matmul(images, classes.T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(scores, k)[1], scores


@dataclasses.dataclass(frozen=True)
class _Classes:
    """What is classified, and what labels mean.

    Attributes:
      names: of the classes among which to choose.
      targets: int32 [labels, most classes a label], places in `names`, -1 after a label's last.
      label_names: by label.
      path: of the file that says how many labels there are.
    """

    names: Sequence[str]
    targets: np.ndarray
    label_names: Sequence[str]
    path: str

    def of(self, labels: np.ndarray) -> np.ndarray:
        """Places in `names`, -1 for none, of labels [n, labels]: int32 [n, more]."""
        found = np.where(labels[..., None] < 0, -1, self.targets[labels])
        return found.reshape(len(labels), -1)


@dataclasses.dataclass
class _Found:
    """What the model says of all examples, and what is true.

    Attributes:
      predictions: int [n, k] classes, best first.
      labels: int [n, labels], -1 after the last.
      weights: [n], 0 for padding and bad records.
      scores: float [n, classes], of data with several labels; None of others.
    """

    predictions: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    scores: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class ZeroShotClassification:
    """Accuracy of classifying images by the text embeddings of their class names.

    Data have one 'label' an image, or 'labels', any number of them: then each of them is right, and
    images without one count for nothing but 'mean_average_precision'.

    Attributes:
      dataset_cfg: images with labels; the batch size also serves the prompts.
      class_names_path: text file, one class name a line; a label is a line number from 0.
      templates_path: text file, one prompt a line with {} (or {c}) in the place of the class name.
      vocabulary: tokeniser of the prompts.
      text_reduction: how long prompts are shortened, one of `text_reduction.STRATEGIES`.
      keep_class_name: whether prompts that are too long lose pieces of the template before pieces
        of the class name; see `prompts.tokenize_around_names`.
      label_map_path: text file for data whose labels are not the lines of the class list: line i
        says which lines (from 0) label i stands for, '-' says none. Only classes that it names are
        chosen among, and images with labels of no class are left out.
      num_classes: how many labels the data have, where they do not say so themselves; a list or
        map of another length is refused.
    """

    dataset_cfg: input_pipeline.DatasetConfig
    class_names_path: str
    templates_path: str
    vocabulary: vocabularies.BertVocabulary
    text_reduction: str = "truncate"
    keep_class_name: bool = False
    label_map_path: str | None = None
    num_classes: int | None = None

    def check(self, num_parts: int = 1) -> None:
        """Reads the names, templates and map, the data's index and what the reduction needs.

        Raises:
          UserError: one of them is missing or not what it should be, or they do not fit together.
        """
        self._read()
        self.dataset_cfg.check(num_parts)
        self._check_number(self._read()[0])
        text_reduction.check(self.text_reduction, self.vocabulary)

    def evaluate(
        self, params: Any, embed: evaluator.EmbedFunctions, output_dir: str | None
    ) -> Mapping[str, float]:
        """Metrics in [0, 1] and how many examples they are of; padding never counts.

        'accuracy', 'accuracy_top5' (where there are 5 classes), 'mean_per_class_recall',
        'num_examples', and of data with several labels 'mean_average_precision'. At the end of a
        run, `confusion_<task>.json` tells of the classes with the lowest accuracy.

        Raises:
          UserError: a data file is missing, the data have no labels, or a label lies outside the
            class list or label map.
        """
        classes, templates = self._read()
        self._check_number(classes)
        ids = self._tokenize(classes.names, templates)
        embeddings = class_embeddings(
            embed_prompts(params, embed, ids, self.dataset_cfg.batch_size), len(templates)
        )
        found = self._find(params, embed, embeddings, classes)
        targets = classes.of(found.labels)
        valid = found.weights > 0
        used = valid & np.any(targets >= 0, axis=1)
        if not used.any():
            raise UserError(
                f"the data set {self._name} has no image with a label that "
                f"{classes.path} gives a class: give the file that belongs to the data."
            )
        right = classification_metrics.hits(found.predictions[used], targets[used])
        self._tell_of_longer_list(classes, int(found.labels[valid].max()))
        # A label of no class is not to be found.
        known = np.any(classes.targets >= 0, axis=1)
        labels = found.labels[used]
        labels = np.where((labels >= 0) & known[labels], labels, -1)
        values = {"accuracy": float(right[:, 0].mean())}
        if len(classes.names) >= 5:
            values["accuracy_top5"] = float(right.any(axis=1).mean())
        recall = classification_metrics.mean_per_class_recall(right[:, 0], labels)
        values |= {"mean_per_class_recall": recall, "num_examples": len(right)}
        if found.scores is not None:
            values["mean_average_precision"] = classification_metrics.mean_average_precision(
                found.scores[valid], targets[valid]
            )
        if output_dir is not None and jax.process_index() == 0:
            predictions = found.predictions[used, 0]
            worst = classification_metrics.worst_classes(
                predictions, right[:, 0], labels, classes.label_names, classes.names
            )
            self._write(output_dir, values, len(classes.names), worst)
        return values

    @property
    def _name(self) -> str:
        return self.dataset_cfg.mixture_or_task_name

    def _read(self) -> tuple[_Classes, list[str]]:
        """(classes, templates) of the files."""
        names, templates = prompts.read(self.class_names_path, self.templates_path)
        if self.label_map_path is None:
            targets = np.arange(len(names), dtype=np.int32)[:, None]
            return _Classes(names, targets, names, self.class_names_path), templates
        label_map = prompts.read_label_map(self.label_map_path, len(names))
        chosen = sorted({index for indices in label_map for index in indices})
        places = {index: place for place, index in enumerate(chosen)}
        width = max(map(len, label_map))
        targets = [[places[i] for i in each] + [-1] * (width - len(each)) for each in label_map]
        return _Classes(
            [names[index] for index in chosen],
            np.asarray(targets, np.int32),
            [", ".join(names[i] for i in each) for each in label_map],
            self.label_map_path,
        ), templates

    def _check_number(self, classes: _Classes) -> None:
        """Refuses a list or map that is not as long as the data have labels, where that is known.

        Raises:
          UserError: names both numbers.
        """
        if self.num_classes is not None:
            check_number("num_classes", self.num_classes, minimum=1, whole=True)
        known = self.num_classes or input_pipeline.num_classes(self.dataset_cfg)
        if known is not None and known != len(classes.targets):
            raise UserError(
                f"the data set {self._name} has {known} classes, but {classes.path} has "
                f"{len(classes.targets)} lines: give the class list, or the label map, that "
                "belongs to the data."
            )

    def _tell_of_longer_list(self, classes: _Classes, largest: int) -> None:
        """Where only the labels tell of the data's classes, a list with more is likely another."""
        known = self.num_classes or input_pipeline.num_classes(self.dataset_cfg)
        whole = self.dataset_cfg.max_examples is None
        if known is None and whole and largest + 1 < len(classes.targets):
            logging.warning(
                "%s has %d lines, and the largest label of the data set %s is %d: see that the "
                "file belongs to the data (an evaluator with num_classes refuses another).",
                classes.path, len(classes.targets), self._name, largest,
            )  # fmt: skip

    def _tokenize(self, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        length = self.dataset_cfg.task_feature_lengths["text"]
        how = (self.vocabulary, length, self.text_reduction)
        if self.keep_class_name:
            return prompts.tokenize_around_names(names, templates, *how)
        return prompts.tokenize(prompts.prompts(names, templates), *how)

    def _find(
        self,
        params: Any,
        embed: evaluator.EmbedFunctions,
        embeddings: np.ndarray,
        classes: _Classes,
    ) -> _Found:
        """Classifies all examples."""
        found, scores = [], []
        key = None
        for host_batch, batch in input_pipeline.eval_batches(self.dataset_cfg, embed.layout):
            key = self._check_labels(host_batch, classes)
            images = embed.embed_images(params, batch["images"])
            top, all_scores = _classify(images, embeddings, min(5, len(embeddings)))
            parts = (top, batch[key], batch["weights"])
            found.append([evaluator.replicate(part, embed.layout) for part in parts])
            if key == "labels":
                scores.append(evaluator.gather(all_scores, embed.layout))
        predictions, labels, weights = map(np.concatenate, zip(*jax.device_get(found), strict=True))
        labels = labels if key == "labels" else labels[:, None]
        return _Found(predictions, labels, weights, np.concatenate(scores) if scores else None)

    def _check_labels(self, host_batch: input_pipeline.HostBatch, classes: _Classes) -> str:
        """The name of a batch's labels.

        Raises:
          UserError: it has none, or one that is beyond the class list.
        """
        key = next((name for name in ("labels", "label") if name in host_batch), None)
        if key is None:
            raise UserError(
                f"the data set {self._name} has no labels to classify by: give its "
                "image_text_task a label_key."
            )
        if (worst := int(host_batch[key].max())) >= len(classes.targets):
            raise UserError(
                f"the data set {self._name} has label {worst}, but {classes.path} lists "
                f"{len(classes.targets)} classes: give the list that belongs to the data."
            )
        return key

    def _write(
        self,
        output_dir: str,
        values: Mapping[str, float],
        num_classes: int,
        worst: Sequence[Mapping[str, Any]],
    ) -> None:
        """Writes what the report tells of the worst classes."""
        facts = {
            "name": self._name,
            "num_examples": values["num_examples"],
            "num_classes": num_classes,
            "accuracy": values["accuracy"],
            "worst": worst,
        }
        name = re.sub(r"[^\w.-]+", "_", self._name)
        path = epath.Path(output_dir) / f"confusion_{name}.json"
        path.write_text(json.dumps(facts))
