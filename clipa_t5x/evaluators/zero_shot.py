"""Zero-shot classification by prompts (Radford et al., 2021, section 3.1)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipa_t5x import models
from clipa_t5x.data import input_pipeline, prompts, text_reduction, vocabularies
from clipa_t5x.errors import UserError
from clipa_t5x.evaluators import evaluator


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


@functools.partial(jax.jit, static_argnames="sharding")
def _count_correct(
    images: jax.Array, classes: jax.Array, labels: jax.Array, weights: jax.Array, sharding: Any
) -> jax.Array:
    correct = jnp.argmax(images @ classes.T, axis=1) == labels
    return jax.lax.with_sharding_constraint(jnp.sum(correct * weights), sharding)


@dataclasses.dataclass(frozen=True)
class ZeroShotClassification:
    """Top-1 accuracy of classifying images by the text embeddings of their class names.

    Attributes:
      dataset_cfg: images with an int32 'label'; the batch size also serves the prompts.
      class_names_path: text file, one class name a line; a label is a line number from 0.
      templates_path: text file, one prompt a line with {} in the place of the class name.
      vocabulary: tokeniser of the prompts.
      text_reduction: how long prompts are shortened, one of `text_reduction.STRATEGIES`.
    """

    dataset_cfg: input_pipeline.DatasetConfig
    class_names_path: str
    templates_path: str
    vocabulary: vocabularies.BertVocabulary
    text_reduction: str = "truncate"

    def check(self) -> None:
        """Reads the class names, the templates, the data's index and what the reduction needs.

        Raises:
          UserError: one of them is missing or not what it should be.
        """
        prompts.prompts(self.class_names_path, self.templates_path)
        self.dataset_cfg.check()
        text_reduction.check(self.text_reduction, self.vocabulary)

    def evaluate(
        self, params: Any, embed: evaluator.EmbedFunctions, output_dir: str | None
    ) -> Mapping[str, float]:
        """{'accuracy': top-1 in [0, 1], 'num_examples': images}; padding never counts.

        Raises:
          UserError: a data file is missing, the data have no labels, or a label lies outside the
            class list.
        """
        del output_dir
        texts, num_templates = prompts.prompts(self.class_names_path, self.templates_path)
        length = self.dataset_cfg.task_feature_lengths["text"]
        ids = prompts.tokenize(texts, self.vocabulary, length, self.text_reduction)
        batch_size = self.dataset_cfg.batch_size
        classes = class_embeddings(embed_prompts(params, embed, ids, batch_size), num_templates)
        replicated = jax.sharding.NamedSharding(
            embed.layout.sharding.mesh, jax.sharding.PartitionSpec()
        )
        correct, count = [], input_pipeline.num_examples(self.dataset_cfg)
        for host_batch, batch in input_pipeline.eval_batches(self.dataset_cfg, embed.layout):
            if "label" not in host_batch:
                raise UserError(
                    f"the data set {self.dataset_cfg.mixture_or_task_name} has no labels to "
                    "classify by: give its image_text_task a label_key."
                )
            if (worst := int(host_batch["label"].max())) >= len(classes):
                raise UserError(
                    f"the data set {self.dataset_cfg.mixture_or_task_name} has label {worst}, but "
                    f"{self.class_names_path} lists {len(classes)} classes: give the list that "
                    "belongs to the data."
                )
            images = embed.embed_images(params, batch["images"])
            correct.append(
                _count_correct(images, classes, batch["label"], batch["weights"], replicated)
            )
        return {"accuracy": float(np.sum(jax.device_get(correct))) / count, "num_examples": count}
