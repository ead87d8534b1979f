"""The training loop: `python -m clipa_t5x.train --gin_file=gin/bigG14_stage1.gin`.

A *step* is one update; "after step n" means n updates are done. The order within a step is law:
update, log, evaluate, save. Evaluation comes before saving, so that a run killed in between repeats
the evaluation rather than lose it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging
from etils import epath

from clipa_t5x import (
    checkpoints,
    metrics,
    model_info,
    models,
    optimizers,
    partitioning,
    stage_handover,
    stage_info,
    train_state,
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
    eval_period: int,
    stats_period: int,
    random_seed: int,
    summarize_config_fn: Callable[..., None],
    trainer_cls: Callable[..., trainer_lib.Trainer] = trainer_lib.Trainer,
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
      eval_period: steps between evaluations.
      stats_period: steps between lines of metrics; each is the mean over these steps.
      random_seed: of parameters and of masks.
      summarize_config_fn: called as (model_dir, clu writer, step); writes the configuration that
        made these arguments into `model_dir`.
      trainer_cls: makes the trainer from model, optimizer, partitioner, batch spec and mesh.

    Returns:
      The final state.

    Raises:
      UserError: something given does not fit together; see its message.
    """
    counts = {"TRAIN_STEPS": total_steps, "EVAL_PERIOD": eval_period, "LOG_PERIOD": stats_period}
    check_arguments(model_dir, counts, checkpoint_cfg.save, random_seed)
    batch_spec = train_dataset_cfg.batch_spec()
    trainer = trainer_cls(
        model=model, optimizer=optimizer, partitioner=partitioner, batch_spec=batch_spec
    )
    layout = input_pipeline.BatchLayout(partitioner.batch_sharding())
    check_data(model, train_dataset_cfg, train_eval_dataset_cfg, evaluators)
    checkpointer = checkpoints.Checkpointer(model_dir, checkpoint_cfg.save)
    info = stage_info.StageInfo.collect(
        model, trainer.abstract_state.params, train_dataset_cfg, checkpoint_cfg, total_steps
    )
    state, position = starting_state(
        trainer, checkpointer, checkpoint_cfg.restore, train_dataset_cfg, random_seed
    )
    if int(state.step) >= total_steps:
        return finished(state, total_steps, model_dir, info)
    writer = metrics.MetricsWriter(model_dir)
    # Only now: a start that is refused leaves what an earlier one wrote.
    summarize_config_fn(model_dir, writer.group(metrics.GROUP_TRAIN), 0)
    write_model_info(model_dir, trainer, partitioner, batch_spec, info)
    steps = range(int(state.step) + 1, total_steps + 1)
    logging.info("Training steps %d to %d in %s.", steps[0], total_steps, model_dir)
    train_step = compile_train_step(trainer)

    evaluate = Evaluation(trainer, layout, train_eval_dataset_cfg, evaluators, writer, model_dir)
    progress = Progress(writer, info, steps[0] - 1)
    batches = input_pipeline.TrainIterator(train_dataset_cfg, layout, position)
    updates = training_steps(state, train_step, batches, progress.clock, steps)
    with contextlib.closing(batches), contextlib.closing(progress.clock):
        for step, state, step_metrics in updates:
            progress.add(step_metrics)
            if step % stats_period == 0 or step == total_steps:
                progress.log(step, batches.statistics())
            if step % eval_period == 0 or step == total_steps:
                progress.timer.pause(evaluate(step, state.params, step == total_steps))
            if checkpointer.is_due(step, total_steps):
                progress.check_finite(step)
                checkpointer.save(step, state, batches.state())
    checkpointer.close()
    writer.close()
    info.write(model_dir, completed=True)
    return state


class Batches(Protocol):
    """An endless iterator of global batches that tells how long the last one took to come."""

    waited_seconds: float

    def __next__(self) -> Mapping[str, jax.Array]: ...


def training_steps(
    state: train_state.TrainState,
    train_step: Callable[..., Any],
    batches: Batches,
    clock: metrics.StepClock,
    steps: Iterable[int],
) -> Iterator[tuple[int, train_state.TrainState, trainer_lib.Metrics]]:
    """Fetches and updates, once for each of `steps`.

    Nothing here waits for the device: a step is dispatched as soon as its batch is there.

    Yields:
      (step, state after it, its metrics); the state before is donated, and gone.
    """
    for step in steps:
        batch = next(batches)
        clock.before_dispatch(batches.waited_seconds)
        state, step_metrics = train_step(state, batch)
        clock.dispatched(step_metrics)
        yield step, state, step_metrics


def check_arguments(
    model_dir: str,
    counts: Mapping[str, int],
    save_cfg: checkpoints.SaveCheckpointConfig,
    random_seed: int,
) -> None:
    """Refuses what cannot be trained with.

    Raises:
      UserError: a missing model_dir, or a number that is none or too small.
    """
    if not model_dir:
        raise UserError("MODEL_DIR is empty: add --gin.MODEL_DIR=\"'runs/mine'\" to the command.")
    if epath.Path(model_dir).is_file():
        raise UserError(f"MODEL_DIR {model_dir} is a file: name a folder, existing or not.")
    for name, value in counts.items():
        check_number(name, value, minimum=1, whole=True)
    save_cfg.check()
    check_number("RANDOM_SEED", random_seed, minimum=0, whole=True)


def compile_train_step(trainer: trainer_lib.Trainer) -> Callable[..., Any]:
    """Compiles, tells how long it took, and waits until every process is as far."""
    start = time.perf_counter()
    train_step = trainer.compiled_train_step
    logging.info("Compiled the train step in %.1f s.", time.perf_counter() - start)
    checkpoints.wait_for_all_processes("train_step_compiled")
    return train_step


def finished(
    state: train_state.TrainState, total_steps: int, model_dir: str, info: stage_info.StageInfo
) -> train_state.TrainState:
    """Ends a run that has all its steps.

    Raises:
      UserError: it has more than are asked for.
    """
    if int(state.step) > total_steps:
        raise UserError(
            f"TRAIN_STEPS is {total_steps}, and the newest checkpoint in {model_dir} is of step "
            f"{state.step}. TRAIN_STEPS counts all of a run's steps: raise it, or change MODEL_DIR."
        )
    logging.info("%s has all its %d steps: nothing to do.", model_dir, total_steps)
    info.write(model_dir, completed=True)
    return state


def check_data(
    model: models.ClipModel,
    cfg: input_pipeline.DatasetConfig,
    eval_cfg: input_pipeline.DatasetConfig | None,
    evaluators: Mapping[str, evaluator.Evaluator],
) -> None:
    """Refuses, before anything is compiled, shards and vocabularies that cannot be trained with.

    Raises:
      UserError: a shard is missing, empty or damaged; an evaluator lacks what it needs; or the
        vocabulary has more ids than the token table has rows, which jax would clamp.
    """
    for each in filter(None, (cfg, eval_cfg)):
        each.check()
    for item in evaluators.values():
        item.check()
    rows = getattr(model.text_tower, "vocab_size", None)
    size = input_pipeline.vocabulary_size(cfg)
    if rows is not None and size is not None and size > rows:
        raise UserError(
            f"the vocabulary has {size} pieces and TextTransformer.vocab_size is {rows}: set "
            f"vocab_size to at least {size}, or VOCABULARY_PATH to a smaller vocabulary."
        )


def starting_state(
    trainer: trainer_lib.Trainer,
    checkpointer: checkpoints.Checkpointer,
    cfg: checkpoints.RestoreCheckpointConfig,
    dataset_cfg: input_pipeline.DatasetConfig,
    seed: int,
) -> tuple[train_state.TrainState, int]:
    """(state, position in the data): the newest checkpoint's, else an earlier stage's, else new."""
    if restored := checkpointer.restore(trainer.abstract_state):
        logging.info("Resuming after step %d.", restored.step)
        return restored.state, input_pipeline.resume_position(dataset_cfg, restored.data_state)
    if cfg.path:
        loaded = stage_handover.load_params(cfg.path, trainer.abstract_state.params, cfg.resized)
        stage_handover.log_notes(cfg.path, loaded.notes)
        return trainer.init_state(seed, loaded.params), 0
    return trainer.init_state(seed), 0


class Progress:
    """Gathers the metrics of steps and, when asked, writes their means and a console line."""

    def __init__(self, writer: metrics.MetricsWriter, info: stage_info.StageInfo, first_step: int):
        """Begins after `first_step` updates."""
        self._writer, self._info = writer, info
        self._pending: list[trainer_lib.Metrics] = []
        self.clock = metrics.StepClock()
        self.timer = metrics.StepTimer(first_step, info.total_steps, info.batch_size)

    def add(self, step_metrics: trainer_lib.Metrics) -> None:
        """Keeps a step's metrics, on the device, until the next `log`."""
        self._pending.append(step_metrics)

    def check_finite(self, step: int) -> dict[str, float]:
        """The means over the steps since the last `log`; waits for the device.

        Where an update's norms are finite, so are the parameters after it: they may be saved.

        Raises:
          UserError: the loss or a norm is not a finite number.
        """
        means = metrics.mean(self._pending) if self._pending else {}
        bad = {name: value for name, value in means.items() if not np.isfinite(value)}
        if bad:
            name, value = next((n, bad[n]) for n in ("loss", *bad) if n in bad)
            raise UserError(
                f"the {name} is {value} at step {step}: training has diverged. Lower LEARNING_RATE "
                "or lengthen WARMUP_STEPS, and start again from the last checkpoint."
            )
        return means

    def log(self, step: int, data_statistics: Mapping[str, float]) -> None:
        """Writes the means over the steps since the last call, and what the input pipeline says.

        Raises:
          UserError: as `check_finite`.
        """
        means = self.check_finite(step)
        self._pending.clear()
        rates = self.timer.lap(step, self.clock.stalled_seconds)
        values = {**means, **rates, **data_statistics}
        metrics.log_progress(self._info.resolution, step, self._info.total_steps, values)
        del values["seconds_left"]
        values["samples"] = step * self._info.batch_size
        self._writer.write(step, metrics.GROUP_TRAIN, values)


@dataclasses.dataclass
class Evaluation:
    """All evaluations of a run, in one call."""

    trainer: trainer_lib.Trainer
    layout: input_pipeline.BatchLayout
    train_eval_dataset_cfg: input_pipeline.DatasetConfig | None
    evaluators: Mapping[str, evaluator.Evaluator]
    writer: metrics.MetricsWriter
    model_dir: str

    def __call__(self, step: int, params: Any, last: bool) -> float:
        """Evaluates and writes; returns the seconds it took."""
        start = time.perf_counter()
        if self.train_eval_dataset_cfg is not None:
            values = eval_loss(self.trainer, self.layout, self.train_eval_dataset_cfg, params)
            name = self.train_eval_dataset_cfg.mixture_or_task_name
            self.writer.write(step, f"training_eval/{name}", values)
        run_evaluators(
            self.evaluators,
            params,
            embed_functions(self.trainer, self.layout),
            self.writer,
            step,
            self.model_dir if last else None,
        )
        return time.perf_counter() - start


def embed_functions(
    trainer: trainer_lib.Trainer, layout: input_pipeline.BatchLayout
) -> evaluator.EmbedFunctions:
    """What evaluators may see of the model."""
    return evaluator.EmbedFunctions(trainer.embed_images, trainer.embed_text, layout)


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
) -> dict[str, float]:
    """Mean loss and in-batch accuracy over one pass, batches weighted by their examples."""
    sums: dict[str, float] = {"loss": 0.0, "accuracy": 0.0}
    total = 0.0
    for _, batch in input_pipeline.eval_batches(cfg, layout):
        examples = float(batch["weights"].sum())
        values = jax.device_get(trainer.eval_step(params, batch))
        sums = {name: sums[name] + float(values[name]) * examples for name in sums}
        total += examples
    return {name: value / max(total, 1.0) for name, value in sums.items()}


def write_model_info(
    model_dir: str,
    trainer: trainer_lib.Trainer,
    partitioner: partitioning.PjitPartitioner,
    batch_spec: Mapping[str, jax.ShapeDtypeStruct],
    info: stage_info.StageInfo,
) -> None:
    """Writes `model-info.txt` and `stage.json`; process 0 only."""
    info.write(model_dir, completed=False)
    if jax.process_index() == 0:
        text = model_info.describe(
            trainer.abstract_state,
            partitioner.logical_axes(trainer.boxed_params),
            batch_spec,
            partitioner,
            trainer.mesh,
        )
        (epath.Path(model_dir) / "model-info.txt").write_text(text)
        logging.info("Model: %s parameters; see %s/model-info.txt.", f"{info.num_params:,}",
                     model_dir)  # fmt: skip


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
