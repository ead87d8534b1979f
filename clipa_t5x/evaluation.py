"""All evaluations of a run: the loss on held-out data, and every evaluator."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging

from clipa_t5x import metrics
from clipa_t5x import trainer as trainer_lib
from clipa_t5x.data import input_pipeline
from clipa_t5x.evaluators import evaluator


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
        results = {}
        cfg = self.train_eval_dataset_cfg
        if cfg is not None:
            group = f"training_eval/{cfg.mixture_or_task_name}"
            results[group] = eval_loss(self.trainer, self.layout, cfg, params, self.before_batch)
            self.writer.write(step, group, results[group])
        embed = embed_functions(self.trainer, self.layout, self.before_batch)
        output_dir = self.model_dir if last else None
        inferred = run_evaluators(self.evaluators, params, embed, self.writer, step, output_dir)
        results.update({f"inference_eval/{name}": values for name, values in inferred.items()})
        return {
            f"{g}/{key}": float(v) for g, values in results.items() for key, v in values.items()
        }


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


def run_evaluators(
    evaluators: Mapping[str, evaluator.Evaluator],
    params: Any,
    embed: evaluator.EmbedFunctions,
    writer: metrics.MetricsWriter,
    step: int,
    output_dir: str | None,
) -> dict[str, Mapping[str, float]]:
    """Runs each evaluator, writes its values under 'inference_eval/<name>' and returns them."""
    results = {}
    for name, item in evaluators.items():
        results[name] = item.evaluate(params, embed, output_dir)
        writer.write(step, f"inference_eval/{name}", results[name])
        text = ", ".join(f"{key} {value:.4g}" for key, value in results[name].items())
        logging.info("Evaluation %s after step %d: %s", name, step, text)
    return results


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
