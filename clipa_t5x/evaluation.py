"""All evaluations of a run: the loss on held-out data, and every evaluator."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from absl import logging

from clipa_t5x import metrics, models, partitioning, run_history
from clipa_t5x import trainer as trainer_lib
from clipa_t5x.data import input_pipeline
from clipa_t5x.errors import UserError
from clipa_t5x.evaluators import evaluator


def check(
    model: models.ClipModel,
    partitioner: partitioning.PjitPartitioner,
    vocabulary_cfg: input_pipeline.DatasetConfig,
    eval_cfg: input_pipeline.DatasetConfig | None,
    evaluators: Mapping[str, evaluator.Evaluator],
) -> None:
    """Refuses, before anything is compiled or loaded, what could not be evaluated.

    Args:
      model: to be evaluated.
      partitioner: whose mesh splits batches.
      vocabulary_cfg: data whose texts have the model's vocabulary; none of them are read.
      eval_cfg: data for the loss, or None.
      evaluators: by name.

    Raises:
      UserError: data or a file are missing or damaged, a batch cannot be split, or the vocabulary
        has more ids than the token table has rows, which jax would clamp.
    """
    for each in (eval_cfg, *evaluators.values()):
        if each is not None:
            each.check(partitioner.num_batch_parts())
    rows = getattr(model.text_tower, "vocab_size", None)
    size = input_pipeline.vocabulary_size(vocabulary_cfg)
    if rows is not None and size is not None and size > rows:
        raise UserError(
            f"the vocabulary has {size} pieces and TextTransformer.vocab_size is {rows}: set "
            f"vocab_size to at least {size}, or VOCABULARY_PATH to a smaller vocabulary."
        )


@dataclasses.dataclass
class Evaluation:
    """All evaluations of a run, in one call.

    Attributes:
      trainer: of the run.
      layout: where the rows of batches go.
      train_eval_dataset_cfg: data for the loss, or None.
      evaluators: by name.
      writer: where the values go.
      model_dir: where evaluators leave what is not a number, after the last step.
      before_batch: called before every batch, in the same order on all processes; what it raises
        ends the evaluation, and nothing of the evaluator that was at work is written.
    """

    trainer: trainer_lib.Trainer
    layout: input_pipeline.BatchLayout
    train_eval_dataset_cfg: input_pipeline.DatasetConfig | None
    evaluators: Mapping[str, evaluator.Evaluator]
    writer: metrics.MetricsWriter
    model_dir: str
    before_batch: Callable[[], None] = lambda: None

    def __call__(self, step: int, params: Any, last: bool) -> dict[str, float]:
        """Evaluates, writes, and returns every value as 'group/value'."""
        results = self.run(step, params, last)
        return {
            f"{g}/{key}": float(v) for g, values in results.items() for key, v in values.items()
        }

    def groups(self) -> list[str]:
        """What is evaluated: 'training_eval/<task>' for the loss, 'inference_eval/<evaluator>'."""
        cfg = self.train_eval_dataset_cfg
        loss = [] if cfg is None else [f"{run_history.TRAINING_EVAL}{cfg.mixture_or_task_name}"]
        return [*loss, *(f"{run_history.INFERENCE_EVAL}{name}" for name in self.evaluators)]

    def run(
        self, step: int, params: Any, last: bool, groups: Collection[str] | None = None
    ) -> dict[str, Mapping[str, float]]:
        """Evaluates what `groups` names, by default all; writes and returns values by group."""
        embed = embed_functions(self.trainer, self.layout, self.before_batch)
        results: dict[str, Mapping[str, float]] = {}
        for group in self.groups():
            if groups is not None and group not in groups:
                continue
            cfg = self.train_eval_dataset_cfg
            if cfg is not None and group.startswith(run_history.TRAINING_EVAL):
                name = "of the loss"
                values = eval_loss(self.trainer, self.layout, cfg, params, self.before_batch)
            else:
                name = group.removeprefix(run_history.INFERENCE_EVAL)
                item = self.evaluators[name]
                values = item.evaluate(params, embed, self.model_dir if last else None)
            results[group] = values
            self.writer.write(step, group, values)
            text = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            logging.info("Evaluation %s after step %d: %s", name, step, text)
        return results


def embed_functions(
    trainer: trainer_lib.Trainer,
    layout: input_pipeline.BatchLayout,
    before_batch: Callable[[], None] = lambda: None,
) -> evaluator.EmbedFunctions:
    """What evaluators may see of the model."""

    def announced(embed: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def call(params: Any, inputs: jax.Array) -> jax.Array:
            before_batch()
            return embed(params, inputs)

        return call

    return evaluator.EmbedFunctions(
        announced(trainer.embed_images), announced(trainer.embed_text), layout
    )


def eval_loss(
    trainer: trainer_lib.Trainer,
    layout: input_pipeline.BatchLayout,
    cfg: input_pipeline.DatasetConfig,
    params: Any,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean loss and in-batch accuracy over one pass, batches weighted by their examples."""
    sums: dict[str, float] = {"loss": 0.0, "accuracy": 0.0}
    total = 0.0
    for _, batch in input_pipeline.eval_batches(cfg, layout):
        before_batch()
        examples = float(batch["weights"].sum())
        values = jax.device_get(trainer.eval_step(params, batch))
        sums = {name: sums[name] + float(values[name]) * examples for name in sums}
        total += examples
    return {name: value / max(total, 1.0) for name, value in sums.items()}
