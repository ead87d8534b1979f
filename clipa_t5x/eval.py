"""Evaluation of any checkpoint: `python -m clipa_t5x.eval --gin_file=MODEL_DIR/config.gin`.

With `--watch`, of every checkpoint of a run, beside training.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from clipa_t5x import (
    checkpoints,
    evaluation,
    evaluation_watch,
    folders,
    lease,
    metrics,
    models,
    optimizers,
    partitioning,
    preemption,
    stage_handover,
    supervision,
)
from clipa_t5x import trainer as trainer_lib
from clipa_t5x.data import input_pipeline
from clipa_t5x.errors import UserError
from clipa_t5x.evaluators import evaluator


def evaluate(
    *,
    model: models.ClipModel,
    optimizer: optimizers.Optimizer,
    partitioner: partitioning.PjitPartitioner,
    train_dataset_cfg: input_pipeline.DatasetConfig,
    train_eval_dataset_cfg: input_pipeline.DatasetConfig | None,
    evaluators: Mapping[str, evaluator.Evaluator],
    model_dir: str,
    checkpoint: str | None = None,
    **_: Any,
) -> dict[str, Mapping[str, float]]:
    """Evaluates a checkpoint: the loss on held-out data, and every evaluator.

    Args:
      model: as for `train.train`.
      optimizer: as for `train.train`.
      partitioner: as for `train.train`.
      train_dataset_cfg: as for `train.train`; none of the data are read.
      train_eval_dataset_cfg: as for `train.train`.
      evaluators: as for `train.train`.
      model_dir: of the run.
      checkpoint: a MODEL_DIR, one checkpoint's folder, or a file of parameters; None takes the
        newest in `model_dir`. Results are written (`metrics.jsonl`, TensorBoard) to the MODEL_DIR
        that holds it, those of a file to `model_dir`, made if it is missing, as of step 0, and
        those of T5X's checkpoint there, too, as of its step.
      **_: the other arguments of `train.train`, which are not used.

    Returns:
      Values by group, as in `metrics.jsonl`.

    Raises:
      UserError: there is no complete checkpoint, or it is of another model; there is nothing to
        evaluate, or as `evaluation.check`.
    """
    folders.check_model_dir(model_dir, "name that of the run to evaluate")
    trainer, layout = _bind(model, optimizer, partitioner, train_dataset_cfg)
    _check(model, partitioner, train_dataset_cfg, train_eval_dataset_cfg, evaluators)
    loaded = stage_handover.load_params(
        checkpoint or model_dir, trainer.abstract_state.params, model=model
    )
    source, step = loaded.model_dir or model_dir, loaded.step
    logging.info("Evaluating %s after step %d.", source, step)
    if jax.process_index() == 0:  # Before there is something to write, which may take hours.
        folders.make(source, "MODEL_DIR", "name a folder that can, for the results")
    with contextlib.closing(metrics.MetricsWriter(source)) as writer:
        run_all = evaluation.Evaluation(
            trainer, layout, train_eval_dataset_cfg, evaluators, writer, source
        )
        # The gallery is the run's last word: an earlier checkpoint leaves it.
        last = step >= max(checkpoints.all_steps(source), default=0)
        return run_all.run(step, loaded.params, last)


def watch(
    *,
    model: models.ClipModel,
    optimizer: optimizers.Optimizer,
    partitioner: partitioning.PjitPartitioner,
    train_dataset_cfg: input_pipeline.DatasetConfig,
    train_eval_dataset_cfg: input_pipeline.DatasetConfig | None,
    evaluators: Mapping[str, evaluator.Evaluator],
    checkpoint_cfg: checkpoints.CheckpointConfig,
    model_dir: str,
    total_steps: int,
    patience: evaluation_watch.Patience,
    **_: Any,
) -> None:
    """Evaluates every complete checkpoint of a run once, as training would, until it is completed.

    Of each, what neither training nor an earlier watch, with other evaluators, has evaluated.
    Results are in `MODEL_DIR/evaluations/<step>.json`, see `evaluation_records`, and TensorBoard's.

    Args:
      model: as for `train.train`.
      optimizer: as for `train.train`.
      partitioner: as for `train.train`.
      train_dataset_cfg: as for `train.train`.
      train_eval_dataset_cfg: as for `train.train`.
      evaluators: as for `train.train`.
      checkpoint_cfg: as for `train.train`.
      model_dir: of the run, which need not have begun.
      total_steps: as for `train.train`; after the last, evaluators leave what is not a number.
      patience: how to wait.
      **_: the other arguments of `train.train`, which are not used.

    Raises:
      RestartError: it was asked to stop, or nothing new came for too long.
      UserError: another watch is on this MODEL_DIR, or as `evaluate` and
        `evaluation_watch.Watch.run`.
    """
    folders.check_model_dir(model_dir, "name that of the run to evaluate")
    trainer, layout = _bind(model, optimizer, partitioner, train_dataset_cfg)
    _check(model, partitioner, train_dataset_cfg, train_eval_dataset_cfg, evaluators)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(preemption.stop_requests())
        folder = evaluation_watch.lease_folder(model_dir)
        check_lease = stack.enter_context(lease.held(folder, owner="watch"))
        writer = stack.enter_context(contextlib.closing(evaluation_watch.RecordWriter(model_dir)))

        def before_batch() -> None:
            if stop.requested():
                raise supervision.StopRequestedError

        # One for all checkpoints: their programs are compiled once.
        run_all = evaluation.Evaluation(
            trainer, layout, train_eval_dataset_cfg, evaluators, writer, model_dir, before_batch
        )
        logging.info("Watching %s for checkpoints.", model_dir)
        evaluation_watch.Watch(
            model_dir,
            trainer.abstract_state.params,
            run_all.groups(),
            lambda step, params, groups: run_all.run(step, params, step == total_steps, groups),
            writer,
            stop,
            check_lease,
            checkpoint_cfg.save.period,
        ).run(patience)


def _check(
    model: models.ClipModel,
    partitioner: partitioning.PjitPartitioner,
    cfg: input_pipeline.DatasetConfig,
    eval_cfg: input_pipeline.DatasetConfig | None,
    evaluators: Mapping[str, evaluator.Evaluator],
) -> None:
    """Refuses what could not be evaluated, before anything is loaded; see `evaluation.check`."""
    if eval_cfg is None and not evaluators:
        raise UserError(
            "there is nothing to evaluate: EVALUATORS is {} and TRAIN_EVAL_DATASET is None; add a "
            "file of gin/evals, such as --gin_file=gin/evals/imagenet.gin."
        )
    evaluation.check(model, partitioner, cfg, eval_cfg, evaluators)


def _bind(
    model: models.ClipModel,
    optimizer: optimizers.Optimizer,
    partitioner: partitioning.PjitPartitioner,
    cfg: input_pipeline.DatasetConfig,
) -> tuple[trainer_lib.Trainer, input_pipeline.BatchLayout]:
    """What embeds, and where the rows of its batches go."""
    trainer = trainer_lib.Trainer(
        model=model, optimizer=optimizer, partitioner=partitioner, batch_spec=cfg.batch_spec()
    )
    return trainer, input_pipeline.BatchLayout(partitioner.batch_sharding())


if __name__ == "__main__":
    from clipa_t5x import main

    main.run("eval")
