"""Few-shot linear probes of image embeddings."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from clipa_t5x.data import input_pipeline
from clipa_t5x.errors import UserError, check_number
from clipa_t5x.evaluators import evaluator, ridge_regression


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Accuracy of linear classifiers that see a few images of each class.

    Attributes:
      train_cfg: images with a 'label', of which the shots are drawn.
      test_cfg: images with a 'label', to be classified.
      shots: images of each class.
      seeds: one draw of the shots each, over which accuracies are averaged. The first n images of a
        draw are its n shots, so that fewer shots are among more.
      l2: penalties to choose from, by the error on each shot of what the others give, see
        `ridge_regression.fit`.
      standardize: whether features are scaled to a standard deviation of 1.
    """

    train_cfg: input_pipeline.DatasetConfig
    test_cfg: input_pipeline.DatasetConfig
    shots: Sequence[int] = (1, 5, 10)
    seeds: Sequence[int] = (0, 1, 2)
    l2: Sequence[float] = tuple(2.0**i for i in range(-10, 20))
    standardize: bool = True

    def check(self, num_parts: int = 1) -> None:
        """Reads the data's indices.

        Raises:
          UserError: data are missing or damaged, or a number cannot be one.
        """
        for name, values, least in (("shots", self.shots, 1), ("seeds", self.seeds, 0)):
            if not isinstance(values, Sequence) or not values:
                raise UserError(
                    f"{name} of FewShot is {values!r}: give one number or more in brackets, as in "
                    "(1, 5, 10)."
                )
            for value in values:
                check_number(f"{name} of FewShot", value, minimum=least, whole=True)
        for value in self.l2 if isinstance(self.l2, Sequence) else ():
            check_number("l2 of FewShot", value, minimum=0)
        if not isinstance(self.l2, Sequence) or not self.l2 or 0 in self.l2:
            raise UserError(f"l2 of FewShot is {self.l2!r}: give penalties above 0.")
        self.train_cfg.check(num_parts)
        self.test_cfg.check(num_parts)

    def evaluate(
        self, params: Any, embed: evaluator.EmbedFunctions, output_dir: str | None
    ) -> Mapping[str, float]:
        """'accuracy_<n>_shot' in [0, 1] for each number of shots, and 'num_examples' tested.

        Raises:
          UserError: data have no labels, a class has fewer images than shots, or the test data have
            a label that the training data lack.
        """
        del output_dir
        train, train_labels = _embed(params, embed, self.train_cfg)
        test, test_labels = _embed(params, embed, self.test_cfg)
        known, train_classes, counts = np.unique(
            train_labels, return_inverse=True, return_counts=True
        )
        self._check_labels(known, counts, test_labels)
        test_classes = np.searchsorted(known, test_labels)
        values: dict[str, float] = {}
        for shots in self.shots:
            accuracies = []
            for seed in self.seeds:
                chosen = draw(train_classes, shots, seed)
                classifier = ridge_regression.fit(
                    train[chosen], train_classes[chosen], len(known), self.l2, self.standardize
                )
                accuracies.append(float(np.mean(classifier.predict(test) == test_classes)))
                logging.info("%d shots, seed %d: L2 %g.", shots, seed, classifier.l2)
            values[f"accuracy_{shots}_shot"] = float(np.mean(accuracies))
        return {**values, "num_examples": len(test)}

    def _check_labels(self, known: np.ndarray, counts: np.ndarray, tested: np.ndarray) -> None:
        """Refuses what cannot be drawn, or not be found.

        Raises:
          UserError: names the class.
        """
        train, test = self.train_cfg.mixture_or_task_name, self.test_cfg.mixture_or_task_name
        fewest = int(np.argmin(counts))
        if counts[fewest] < max(self.shots):
            raise UserError(
                f"label {known[fewest]} of {train} has {counts[fewest]} images, and shots of "
                f"FewShot are {max(self.shots)}: give fewer shots, or more data."
            )
        unknown = np.setdiff1d(tested, known)
        if len(unknown):
            raise UserError(
                f"{test} has label {unknown[0]}, of which {train} has no image: give splits of "
                "the same classes."
            )


def draw(classes: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Rows of `shots` examples of each class, drawn without replacement: int [classes x shots].

    An example's place in the draw depends on the seed and the data's order alone.
    """
    order = np.random.default_rng(seed).permutation(len(classes))
    by_class = order[np.argsort(classes[order], kind="stable")]
    starts = np.flatnonzero(np.diff(classes[by_class], prepend=-1))
    return by_class[(starts[:, None] + np.arange(shots)).ravel()]


def _embed(
    params: Any, embed: evaluator.EmbedFunctions, cfg: input_pipeline.DatasetConfig
) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [n, joint], int [n] labels) of the examples that have one."""
    found = []
    for host_batch, batch in input_pipeline.eval_batches(cfg, embed.layout):
        if "label" not in host_batch:
            raise UserError(
                f"the data set {cfg.mixture_or_task_name} has no labels to learn from: give its "
                "image_text_task a label_key."
            )
        parts = (embed.embed_images(params, batch["images"]), batch["label"], batch["weights"])
        found.append([evaluator.replicate(part, embed.layout) for part in parts])
    embeddings, labels, weights = map(np.concatenate, zip(*jax.device_get(found), strict=True))
    used = (weights > 0) & (labels >= 0)
    if not used.any():
        raise UserError(f"the data set {cfg.mixture_or_task_name} has no image with a label.")
    return embeddings[used], labels[used]
