"""Evaluation of any checkpoint: `python -m clipa_t5x.eval --gin_file=MODEL_DIR/config.gin`."""

from collections.abc import Mapping
from typing import Any

from absl import logging

from clipa_t5x import (
    checkpoints,
    evaluation,
    metrics,
    models,
    optimizers,
    partitioning,
    stage_handover,
)
from clipa_t5x import trainer as trainer_lib
from clipa_t5x.data import input_pipeline
from clipa_t5x.evaluators import evaluator


def evaluate(
    *,
    model: models.ClipModel,
    optimizer: optimizers.Optimizer,
    partitioner: partitioning.PjitPartitioner,
    train_dataset_cfg: input_pipeline.DatasetConfig,
    evaluators: Mapping[str, evaluator.Evaluator],
    model_dir: str,
    checkpoint: str | None = None,
    **_: Any,
) -> dict[str, Mapping[str, float]]:
    """Runs a configuration's evaluators on a checkpoint.

    Args:
      model: as for `train.train`.
      optimizer: as for `train.train`.
      partitioner: as for `train.train`.
      train_dataset_cfg: as for `train.train`.
      evaluators: as for `train.train`.
      model_dir: of the run.
      checkpoint: a MODEL_DIR, one checkpoint's folder, or a file of parameters; None takes the
        newest in `model_dir`. Results are written (`metrics.jsonl`, TensorBoard) to the MODEL_DIR
        that holds it, those of a file to `model_dir`, as of step 0.
      **_: the other arguments of `train.train`, which are not used.

    Returns:
      Each evaluator's metrics, by its name.

    Raises:
      UserError: there is no complete checkpoint, or it is of another model.
    """
    trainer = trainer_lib.Trainer(
        model=model,
        optimizer=optimizer,
        partitioner=partitioner,
        batch_spec=train_dataset_cfg.batch_spec(),
    )
    layout = input_pipeline.BatchLayout(partitioner.batch_sharding())
    loaded = stage_handover.load_params(
        checkpoint or model_dir, trainer.abstract_state.params, model=model
    )
    source, step = loaded.model_dir or model_dir, loaded.step
    logging.info("Evaluating %s after step %d.", source, step)
    writer = metrics.MetricsWriter(source)
    # The gallery is the run's last word: an earlier checkpoint leaves it.
    gallery_dir = source if step == max(checkpoints.all_steps(source), default=0) else None
    embed = evaluation.embed_functions(trainer, layout)
    results = evaluation.run_evaluators(evaluators, loaded.params, embed, writer, step, gallery_dir)
    writer.close()
    return results


if __name__ == "__main__":
    from clipa_t5x import main

    main.run("eval")
