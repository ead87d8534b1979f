"""Training: `python -m clipa_t5x.train --gin_file=gin/bigG14_stage1.gin`.

`train` checks and builds what a run needs; the loop itself is `train_loop`.
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from clipa_t5x import (
    checkpoints,
    evaluation,
    folders,
    metrics,
    mfu,
    model_info,
    models,
    optimizers,
    partitioning,
    run_history,
    run_tables,
    stage_handover,
    stage_info,
    supervision,
    train_loop,
    train_state,
    watchdog,
)
from clipa_t5x import trainer as trainer_lib
from clipa_t5x.data import input_pipeline
from clipa_t5x.errors import UserError, check_number
from clipa_t5x.evaluators import evaluator


def train(
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
    eval_period: int | None,
    stats_period: int,
    random_seed: int,
    summarize_config_fn: Callable[..., None],
    watchdog_cfg: watchdog.Watchdog,
    trainer_cls: Callable[..., trainer_lib.Trainer] = trainer_lib.Trainer,
    peak_flops: float | str | None = None,
) -> train_state.TrainState:
    """Trains until `total_steps` updates are done, from the newest checkpoint in `model_dir`.

    Args:
      model: the model.
      optimizer: the update rule.
      partitioner: mesh and logical axis rules.
      train_dataset_cfg: training data; its batch size and feature lengths are the model's inputs.
      train_eval_dataset_cfg: data for loss and in-batch accuracy without training, or None.
      evaluators: by name, run every `eval_period` steps and after the last.
      checkpoint_cfg: when to save, and where a fresh run takes its parameters from.
      model_dir: where everything is written.
      total_steps: absolute, those of earlier starts included.
      eval_period: steps between evaluations; None leaves all of them to `eval --watch`.
      stats_period: steps between lines of metrics; each is the mean over these steps.
      random_seed: of parameters and of masks.
      summarize_config_fn: called as (model_dir, clu writer, step); writes the configuration that
        made these arguments into `model_dir`.
      watchdog_cfg: what becomes of a run in which nothing gets done.
      trainer_cls: makes the trainer from model, optimizer, partitioner, batch spec and mesh.
      peak_flops: of a device, for the MFU; see `mfu.peak_flops`.

    Returns:
      The final state.

    Raises:
      UserError: something given does not fit together; see its message.
      PreemptedError: the run was asked to stop; everything is saved.
    """
    periods = train_loop.Periods(total_steps, eval_period, stats_period)
    check_arguments(model_dir, checkpoint_cfg.save, random_seed)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "partitioner": partitioner}
    trainer = trainer_cls(**parts, batch_spec=train_dataset_cfg.batch_spec())
    check_data(model, partitioner, train_dataset_cfg, train_eval_dataset_cfg, evaluators)
    info = stage_info.StageInfo.collect(
        model, trainer.abstract_state.params, train_dataset_cfg, checkpoint_cfg, total_steps
    )
    peak = mfu.peak_flops(peak_flops, getattr(model.image_tower, "dtype", "float32"))
    with supervision.supervised(model_dir, watchdog_cfg) as supervisor:
        checkpointer = checkpoints.Checkpointer(model_dir, checkpoint_cfg.save)
        start_over = functools.partial(
            starting_point, trainer, checkpointer, checkpoint_cfg.restore, train_dataset_cfg,
            random_seed,
        )  # fmt: skip
        start = start_over()
        if is_finished(start, total_steps, info, model_dir):
            return start.state
        checkpointer.check_space(trainer.abstract_state, start.step, total_steps)
        writer = start_writing(model_dir, summarize_config_fn, trainer, partitioner, info)
        layout = input_pipeline.BatchLayout(partitioner.batch_sharding())
        evaluate = evaluation.Evaluation(
            trainer, layout, train_eval_dataset_cfg, evaluators, writer, model_dir,
            supervisor.before_batch,
        )  # fmt: skip
        loop = train_loop.TrainLoop(
            train_step=compile_train_step(trainer, start, supervisor),
            dataset_cfg=train_dataset_cfg,
            layout=layout,
            checkpointer=checkpointer,
            evaluate=evaluate,
            progress=train_loop.Progress(writer, info, supervisor, trainer.bad_numbers, peak),
            supervisor=supervisor,
            start_over=start_over,
            periods=periods,
            rows_at_once=trainer.rows_at_once,
        )  # fmt: skip
        with contextlib.closing(writer):
            state = loop.run(start)
        info.write(model_dir, completed=True)
    return state


def check_arguments(
    model_dir: str,
    save_cfg: checkpoints.SaveCheckpointConfig,
    random_seed: int,
) -> None:
    """Refuses what cannot be trained with.

    Raises:
      UserError: a missing model_dir, or a number that is none or too small.
    """
    remedy = "add --gin.MODEL_DIR=\"'runs/mine'\" to the command"
    folders.check_model_dir(model_dir, remedy)
    save_cfg.check()
    check_number("RANDOM_SEED", random_seed, minimum=0, whole=True)


def compile_train_step(
    trainer: trainer_lib.Trainer, start: train_loop.Start, supervisor: supervision.Supervisor
) -> Callable[..., Any]:
    """Compiles, tells how long it took, and waits until every process is as far."""
    supervisor.watchdog.beat("finding where to go on")
    absorb_lost_devices(trainer, start)
    begun = time.perf_counter()
    with supervisor.recorder.phase("compile"):
        train_step = trainer.compiled_train_step
        logging.info("Compiled the train step in %.1f s.", time.perf_counter() - begun)
        checkpoints.wait_for_all_processes("train_step_compiled")
    supervisor.watchdog.beat("compiling the train step")
    return train_step


def is_finished(
    start: train_loop.Start, total_steps: int, info: stage_info.StageInfo, model_dir: str
) -> bool:
    """Whether a run has all its steps, and all that comes after them; writes it down if so.

    Raises:
      UserError: it has more steps than are asked for.
    """
    if start.step > total_steps:
        raise UserError(
            f"TRAIN_STEPS is {total_steps}, and the newest checkpoint in {model_dir} is of step "
            f"{start.step}. TRAIN_STEPS counts all of a run's steps: raise it (with "
            "--accept_recipe_changes), or change MODEL_DIR."
        )
    # A checkpoint goes on saying that its evaluation is due, after it was made up for.
    evaluated = not start.evaluation_due or stage_info.is_completed(model_dir)
    if start.step < total_steps or not evaluated:
        return False
    logging.info("%s has all its %d steps: nothing to do.", model_dir, total_steps)
    info.write(model_dir, completed=True)
    return True


def absorb_lost_devices(trainer: trainer_lib.Trainer, start: train_loop.Start) -> None:
    """Runs the batch in more parts where fewer devices than before have to hold its activations."""
    if start.rows_at_once is None or trainer.rows_at_once <= start.rows_at_once:
        return
    rows = trainer.rows_at_once
    trainer.limit_rows_at_once(start.rows_at_once)
    logging.warning(
        "A device's share of the batch is %d rows at a time, and was %d in the run so far: it is "
        "taken in %d microbatches, with the same result.",
        rows, start.rows_at_once, trainer.num_microbatches,
    )  # fmt: skip


def check_data(
    model: models.ClipModel,
    partitioner: partitioning.PjitPartitioner,
    cfg: input_pipeline.DatasetConfig,
    eval_cfg: input_pipeline.DatasetConfig | None,
    evaluators: Mapping[str, evaluator.Evaluator],
) -> None:
    """Refuses, before anything is compiled, shards and vocabularies that cannot be trained with.

    Raises:
      UserError: a shard is missing, empty or damaged, or as `evaluation.check`.
    """
    cfg.check()
    evaluation.check(model, partitioner, cfg, eval_cfg, evaluators)


def starting_point(
    trainer: trainer_lib.Trainer,
    checkpointer: checkpoints.Checkpointer,
    cfg: checkpoints.RestoreCheckpointConfig,
    dataset_cfg: input_pipeline.DatasetConfig,
    seed: int,
) -> train_loop.Start:
    """Where to go on: the newest whole checkpoint, else an earlier stage's parameters, else new."""
    if restored := checkpointer.restore(trainer.abstract_state):
        logging.info("Resuming after step %d.", restored.step)
        position = input_pipeline.resume_position(dataset_cfg, restored.data_state)
        return train_loop.Start.restored(restored, position)
    if cfg.path:
        loaded = stage_handover.load_params(
            cfg.path, trainer.abstract_state.params, cfg.resized, trainer.model
        )
        stage_handover.log_notes(cfg.path, loaded.notes)
        return train_loop.Start(trainer.init_state(seed, loaded.params))
    return train_loop.Start(trainer.init_state(seed))


def start_writing(
    model_dir: str,
    summarize_config_fn: Callable[..., None],
    trainer: trainer_lib.Trainer,
    partitioner: partitioning.PjitPartitioner,
    info: stage_info.StageInfo,
) -> metrics.MetricsWriter:
    """Writes what the run is, by process 0 only.

    That is the configuration, `model-info.txt`, `sharding.json` and `stage.json`. Only when nothing
    can be refused any more: such a start leaves what an earlier one wrote.
    """
    writer = metrics.MetricsWriter(model_dir)
    summarize_config_fn(model_dir, writer.group(metrics.GROUP_TRAIN), 0)
    info.write(model_dir, completed=False)
    if jax.process_index() == 0:
        text = model_info.describe(
            trainer.abstract_state,
            partitioner.logical_axes(trainer.boxed_params),
            trainer.abstract_batch,
            partitioner,
            trainer.mesh,
        )
        (epath.Path(model_dir) / run_history.MODEL_INFO_FILE).write_text(text)
        sharding = model_info.sharding_record(trainer.abstract_state.params, trainer.mesh)
        path = epath.Path(model_dir) / run_tables.SHARDING_FILE
        path.write_text(json.dumps(sharding, indent=1) + "\n")
        logging.info("Model: %s parameters; see %s/model-info.txt.", f"{info.num_params:,}",
                     model_dir)  # fmt: skip
    return writer


def describe(
    *,
    model: models.ClipModel,
    optimizer: optimizers.Optimizer,
    partitioner: partitioning.PjitPartitioner,
    train_dataset_cfg: input_pipeline.DatasetConfig,
    mesh_shape: Mapping[str, int] | None = None,
    trainer_cls: Callable[..., trainer_lib.Trainer] = trainer_lib.Trainer,
    **_: Any,
) -> str:
    """What `train` would run, on a mesh without devices; allocates no parameters, reads no data.

    The step is traced, so that whatever it would refuse is refused.

    Args:
      model: as for `train`.
      optimizer: as for `train`.
      partitioner: as for `train`.
      train_dataset_cfg: as for `train`.
      mesh_shape: axis sizes; the recipe's intended mesh where None.
      trainer_cls: as for `train`.
      **_: the other arguments of `train`, which only had to be constructible.
    """
    mesh = partitioner.abstract_mesh(mesh_shape)
    trainer = trainer_cls(
        model=model,
        optimizer=optimizer,
        partitioner=partitioner,
        batch_spec=train_dataset_cfg.batch_spec(),
        mesh=mesh,
    )
    _ = trainer.traced_train_step
    axes = partitioner.logical_axes(trainer.boxed_params)
    batch_spec = train_dataset_cfg.batch_spec()
    return model_info.describe(trainer.abstract_state, axes, batch_spec, partitioner, mesh)


if __name__ == "__main__":
    from clipa_t5x import main

    main.run("train")
