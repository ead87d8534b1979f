"""Upstream T5X as the engine: this package's model, optimizer, data and evaluators as T5X has them.

`gin/t5x/engine/train.gin` binds what is here into `t5x/train.py`, so that an experiment runs on T5X
with its files as they are. The same recipe and seed give the same parameters, batches and random
keys as on the built-in engine. Signatures are those of T5X at commit `T5X_COMMIT`.
"""

import contextlib
import functools
import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags, logging
from etils import epath
from flax.linen import partitioning as flax_partitioning

from clipa_t5x import (
    checkpoints,
    evaluation,
    folders,
    gin_macros,
    gin_utils,
    microbatching,
    models,
    optimizers,
    partitioning,
    preemption,
    stage_handover,
)
from clipa_t5x import train as train_lib
from clipa_t5x import trainer as trainer_lib
from clipa_t5x.data import host_iterators, input_pipeline
from clipa_t5x.errors import UserError
from clipa_t5x.evaluators import evaluator

T5X_COMMIT = "cc342d419ec3e3e9c4bf1df33c82330cafdc1e16"
# What T5X itself asks for would put the newest commits of flax, optax and others in the place of
# those that this package is tested with; two that it needs are nowhere but at GitHub.
_GIT = {
    "google-research/t5x": T5X_COMMIT,
    "google/airio": "69897df7d9a427b947a9f7bb4164c7782b43e601",
    "google-research/jestimator": "326824a477feef6d92e6f44175000907a72899ca",
}
INSTALL = (
    "pip install --no-deps "
    + " ".join(f"'git+https://github.com/{name}@{commit}'" for name, commit in _GIT.items())
    + " && pip install cached_property fiddle grain portpicker"
)

try:
    import clu.metrics
    import seqio
    import t5x.checkpoints  # pyright: ignore[reportMissingImports]
    import t5x.models  # pyright: ignore[reportMissingImports]
    import t5x.optimizers  # pyright: ignore[reportMissingImports]
    import t5x.partitioning  # pyright: ignore[reportMissingImports]
    import t5x.trainer  # pyright: ignore[reportMissingImports]
    import t5x.utils  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise UserError(
        f"this engine is upstream T5X, which cannot be imported ({error}): {INSTALL}; or leave "
        "gin/t5x out of --gin_search_paths for the built-in engine, and give eval and export the "
        "experiment's file, not T5X's config.gin."
    ) from error


def refuse_what_t5x_has_not(**options: Any) -> None:
    """Refuses options, by macro name, that T5X's trainer would not honour, and misspelt ones.

    Raises:
      UserError: the first that is set; or a macro that nothing reads.
    """
    if _is_script_of_t5x():
        sys.excepthook = print_error
        paths = [*flags.FLAGS.gin_search_paths, os.path.dirname(t5x.__path__[0])]
        gin_macros.refuse_unread(flags.FLAGS.gin_bindings, flags.FLAGS.gin_file or (), paths)
    for name, value in options.items():
        if value not in (None, False, 0):
            raise UserError(
                f"{name} is {value!r}, which T5X's engine cannot honour: leave it out, or train "
                "with the built-in engine (python -m clipa_t5x.train)."
            )


def _is_script_of_t5x() -> bool:
    return flags.FLAGS.is_parsed() and "gin_bindings" in flags.FLAGS


def print_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Python's `excepthook`: a user's mistake in one line, as the doors here print it."""
    if isinstance(error, UserError):
        print(f"error: {gin_utils.message(error)}", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


def refuse_schedule(stages: Sequence[str], model_dir: str) -> None:
    """Raises a `UserError` that says how a schedule's stages are run."""
    if _is_script_of_t5x():
        sys.excepthook = print_error
    raise UserError(
        f"T5X's train.py runs one stage, and this is a schedule of {len(stages)}: give it "
        f"{', '.join(stages)} one after the other, each with a MODEL_DIR under {model_dir} and "
        "INITIAL_CHECKPOINT_PATH set to that of the stage before."
    )


def absolute_model_dir(model_dir: str) -> str:
    """MODEL_DIR as T5X needs it: its checkpoints cannot be written to a relative path.

    Raises:
      UserError: as `folders.check_model_dir`.
    """
    folders.check_model_dir(model_dir, "name the folder that everything is written to")
    return model_dir if "://" in model_dir else os.path.abspath(model_dir)


def common_period(eval_period: int | None, checkpoint_period: int | None) -> int:
    """What T5X's `gc_period` must be for periods of which neither divides the other; else 0.

    T5X trains in pieces of the shortest period and refuses others that are no multiples of it; the
    third period, that of collecting garbage, may be the one that divides both.
    """
    if not eval_period or not checkpoint_period:
        return 0
    common = math.gcd(eval_period, checkpoint_period)
    return 0 if common in (eval_period, checkpoint_period) else common


class Partitioner(t5x.partitioning.PjitPartitioner):
    """T5X's partitioner with this package's mesh (replica, data, model) and rules.

    T5X's own has no mesh for chips after v4, and on CPU ignores the number of partitions.
    """

    def __init__(self, partitioner: partitioning.PjitPartitioner):
        super().__init__(num_partitions=1, logical_axis_rules=partitioner.logical_axis_rules)
        self.spec = partitioner

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh; see `partitioning.PjitPartitioner.mesh`."""
        return self.spec.mesh

    def get_data_layout(self, batch_size: int | None = None, host_index: int | None = None) -> Any:
        """As T5X's; a `UserError` where the mesh cannot split the batch evenly."""
        if batch_size is not None:
            self.spec.check_batch_size(batch_size)
        return super().get_data_layout(batch_size, host_index)

    def get_mesh_axes(self, train_state: Any) -> Any:
        """As T5X's.

        Raises:
          UserError: a parameter's axis has no rule, where T5X would silently replicate it, or does
            not divide.
        """
        axes = flax_partitioning.get_axis_names(train_state.params_axes)
        boxed = jax.tree.map(
            lambda x, names: nn.LogicallyPartitioned(x, tuple(names)), train_state.params, axes
        )
        self.spec.param_shardings(boxed)
        return super().get_mesh_axes(train_state)


class ClipModel(t5x.models.BaseModel):
    """A `models.ClipModel` with its optimizer, as T5X's trainer and inference call it."""

    # Batches come as the model takes them: there is nothing to pack or to shift.
    FEATURE_CONVERTER_CLS = seqio.PassThroughFeatureConverter

    def __init__(
        self,
        model: models.ClipModel,
        optimizer: optimizers.Optimizer,
        num_microbatches: int = 1,
        augment: trainer_lib.Augment | None = None,
        options: Any = None,
    ):
        """Of a recipe's model and optimizer; the rest is as for `trainer.Trainer`.

        `options` is what `refuse_what_t5x_has_not` gives.
        """
        del options
        super().__init__(t5x.optimizers.OptaxWrapper(optimizer.transformation))
        self.clip, self.optimizer = model, optimizer
        self.num_microbatches, self._augment = num_microbatches, augment

    def get_initial_variables(
        self, rng: jax.Array, input_shapes: Mapping[str, Any], input_types: Any = None
    ) -> Mapping[str, Any]:
        """Fresh 'params', and their axes' names as T5X wants them: 'params_axes', '<name>_axes'."""
        known = {"images": jnp.uint8, "text": jnp.int32, "augment_keys": jnp.uint32}
        types = {name: (input_types or known).get(name, jnp.float32) for name in input_shapes}
        batch = {k: jnp.zeros((1, *shape[1:]), types[k]) for k, shape in input_shapes.items()}
        boxed = models.init_params(self.clip, rng, batch)
        axes: Any = flax.traverse_util.flatten_dict(nn.get_partition_spec(boxed))
        params: Any = flax.traverse_util.flatten_dict(nn.unbox(boxed))
        named = {
            (*path[:-1], f"{path[-1]}_axes"): flax_partitioning.AxisMetadata(
                tuple(axes[path]) + (None,) * (leaf.ndim - len(axes[path]))
            )
            for path, leaf in params.items()
        }
        unflatten = flax.traverse_util.unflatten_dict
        return {"params": unflatten(params), "params_axes": unflatten(named)}

    def loss_fn(self, params: Any, batch: models.Batch, dropout_rng: jax.Array) -> Any:
        """(loss of a training step, clu metrics), differentiable with respect to `params`."""
        if self._augment is not None:
            images = self._augment(batch["images"], batch["augment_keys"])
            batch = {**batch, "images": images}
        if self.num_microbatches == 1:
            loss, metrics = models.training_loss(self.clip, params, batch, dropout_rng)
        else:
            parts = self.num_microbatches
            loss, metrics = _in_microbatches(self.clip, parts, batch, dropout_rng)(params)
        return loss, _averages(metrics, jnp.ones(()))

    def eval_fn(self, params: Any, batch: models.Batch) -> Any:
        """(loss, clu metrics) of a batch without masking, weighted by its examples."""
        outputs: Any = self.clip.apply({"params": params}, batch, train=False)
        loss, metrics = outputs
        return loss, _averages(metrics, batch["weights"].sum())

    def predict_batch(self, params: Any, batch: models.Batch, rng: Any = None) -> Any:
        """Unit embeddings, float32 [batch, joint], of 'images', or where there are none of 'text'.

        Of both it is a dictionary.
        """
        del rng
        methods = {"images": models.ClipModel.embed_images, "text": models.ClipModel.embed_text}
        found = {
            name: self.clip.apply({"params": params}, batch[name], method=method)  # pyright: ignore
            for name, method in methods.items()
            if name in batch
        }
        return found if len(found) == 2 else next(iter(found.values()))

    def predict_batch_with_aux(self, params: Any, batch: models.Batch, rng: Any = None) -> Any:
        """(`predict_batch`, nothing else)."""
        return self.predict_batch(params, batch, rng), {}

    def score_batch(
        self, params: Any, batch: models.Batch, return_intermediates: bool = False
    ) -> Any:
        """Cosine similarity of each image with its text, float32 [batch]."""
        images, text = self.clip.apply({"params": params}, batch, method="embed")  # pyright: ignore
        scores = jnp.sum(images * text, axis=-1)
        return (scores, {}) if return_intermediates else scores


def _in_microbatches(model: models.ClipModel, parts: int, batch: models.Batch, rng: jax.Array):
    """From params to (loss, metrics), whose gradient comes of `microbatching.value_and_grad`.

    T5X's own microbatches would contrast each part with itself alone.
    """

    @jax.custom_vjp
    def loss_of(params: Any) -> Any:
        return microbatching.value_and_grad(model, params, batch, rng, parts)[0]

    def forward(params: Any) -> Any:
        return microbatching.value_and_grad(model, params, batch, rng, parts)

    def backward(grads: Any, cotangents: Any) -> Any:
        return (jax.tree.map(lambda grad: grad * cotangents[0], grads),)

    loss_of.defvjp(forward, backward)
    return loss_of


def _averages(metrics: Mapping[str, jax.Array], weight: jax.Array) -> dict[str, Any]:
    """Scalars as clu metrics, which merge to means by `weight`."""
    weight = weight.astype(jnp.float32)
    average: Any = clu.metrics.Average
    return {name: average(total=value * weight, count=weight) for name, value in metrics.items()}


class TrainStateInitializer(t5x.utils.TrainStateInitializer):
    """Begins as the built-in engine does: from the recipe's seed, or from an earlier stage."""

    def __init__(
        self, *args: Any, random_seed: int, path: str | None, resized: Sequence[str], **kwargs: Any
    ):
        """As T5X's; `random_seed` makes parameters, or `path` (INITIAL_CHECKPOINT_PATH) has them.

        See `checkpoints.RestoreCheckpointConfig` for `path` and `resized`.
        """
        super().__init__(*args, **kwargs)
        self._seed, self._path, self._resized = random_seed, path, resized
        self._clip = kwargs["init_fn"].__self__.clip

    def from_scratch(self, init_rng: Any) -> Any:
        """A fresh state, at step 0; its parameters are those at `path` where there is one.

        Raises:
          UserError: nothing is there, or names or shapes differ beyond those that are resized.
        """
        del init_rng  # T5X's makes other parameters of the same seed.
        key, _ = jax.random.split(jax.random.key(self._seed))
        state = super().from_scratch(jax.random.key_data(key))
        if not self._path:
            return state
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params
        )
        loaded = stage_handover.load_params(
            self._path, flax.core.unfreeze(abstract), self._resized, self._clip
        )
        stage_handover.log_notes(self._path, loaded.notes)
        return state.replace_params(flax.core.freeze(loaded.params))


class StoppedError(t5x.trainer.PreemptionError, SystemExit):
    """T5X saves, and the process ends with the status for 'start the same command again'."""

    code = preemption.RESTART_STATUS


class Trainer(t5x.trainer.Trainer):
    """T5X's trainer, which is asked to stop by signals, and runs this package's evaluators.

    A state that does not fit the model is refused: T5X restores shapes and dtypes unchecked.
    """

    def __init__(
        self,
        *,
        model: ClipModel,
        train_state: Any,
        partitioner: Partitioner,
        evaluators: Mapping[str, evaluator.Evaluator],
        random_seed: int,
        dataset_cfg: input_pipeline.DatasetConfig,
        total_steps: int,
        eval_dataset_cfg: input_pipeline.DatasetConfig | None = None,
        num_microbatches: int | None = None,
        **kwargs: Any,
    ):
        """As T5X's; `random_seed` is of the steps' keys, `dataset_cfg` of the training data.

        Evaluators run after each of T5X's training evaluations; see `train.train` for the rest.

        Raises:
          UserError: T5X's own microbatches are asked for; the state is not of this model; or data
            are not there.
        """
        if num_microbatches not in (None, 1):
            raise UserError(
                f"trainer.Trainer.num_microbatches is {num_microbatches}: T5X's microbatches "
                "contrast each part of the batch with itself alone. Set NUM_MICROBATCHES instead."
            )
        schedule = model.optimizer.learning_rate_fn
        super().__init__(
            model=model, train_state=train_state, partitioner=partitioner,
            learning_rate_fn=schedule, num_microbatches=None, **kwargs,
        )  # fmt: skip
        self._bound = trainer_lib.Trainer(
            model=model.clip, optimizer=model.optimizer, partitioner=partitioner.spec,
            batch_spec=dataset_cfg.batch_spec(), num_microbatches=model.num_microbatches,
        )  # fmt: skip
        _check_state(train_state, self._bound.abstract_state)
        train_lib.check_data(
            model.clip, partitioner.spec, dataset_cfg, eval_dataset_cfg, evaluators
        )
        self._evaluators, self._total_steps = evaluators, total_steps
        self._model_dir = kwargs["summary_dir"]
        self._writers = {
            name: t5x.trainer.MetricsManager(f"inference_eval/{name}", self._model_dir)
            for name in evaluators
        }
        _, self._train_rng = jax.random.split(jax.random.key(random_seed))
        self._signals = contextlib.ExitStack()
        self._stop = self._signals.enter_context(preemption.stop_requests())

    def _get_step_rng(self, step: int) -> jax.Array:
        """The built-in engine's key of the coming step."""
        return jax.random.fold_in(self._train_rng, step)

    def compile_train(self, batch: Any) -> None:
        """As T5X's; the state is kept after every step, for T5X to save when asked to stop."""
        super().compile_train(batch)
        compiled: Any = self._compiled_train_step

        def train_step(state: Any, batch: Any) -> Any:
            self.train_state, metrics = compiled(state, batch)
            return self.train_state, metrics

        self._compiled_train_step = train_step

    def train(self, batch_iter: Any, num_steps: int, start_step: int | None = None) -> Any:
        """As T5X's; raises `StoppedError`, on which T5X saves, when any process is told to stop."""
        first = int(self.train_state.step if start_step is None else start_step)
        return super().train(self._until_asked_to_stop(batch_iter, first), num_steps, first)

    def _until_asked_to_stop(self, batch_iter: Any, first: int) -> Iterator[Any]:
        for step in itertools.count(first):
            # T5X would save again what it has saved just now, and fail.
            if self._stop.requested() and newest_step(self._model_dir) != step:
                logging.info("Asked to stop: stopped after step %d.", step)
                raise StoppedError
            yield next(batch_iter)

    def eval(self, batch_iters: Mapping[str, Any]) -> Mapping[str, Any]:
        """T5X's training evaluation, then every evaluator; values by task and by evaluator."""
        found = dict(super().eval(batch_iters))
        step = int(self.train_state.step)
        params = flax.core.unfreeze(self.train_state.params)
        layout = input_pipeline.BatchLayout(self._partitioner.spec.batch_sharding())
        embed = evaluation.embed_functions(self._bound, layout)
        output_dir = self._model_dir if step >= self._total_steps else None
        for name, item in self._evaluators.items():
            found[name] = item.evaluate(params, embed, output_dir)
            for key, value in found[name].items():
                self._writers[name].write_scalar(key, value, step)
            logging.info("Evaluation %s after step %d: %s", name, step, dict(found[name]))
        return found or {"": {}}  # T5X takes nothing at all for a mistake.

    def close(self) -> None:
        """As T5X's."""
        super().close()
        self._signals.close()
        for writer in self._writers.values():
            writer.close()


def _check_state(state: Any, abstract: Any) -> None:
    """Refuses a restored state whose parameters or counts are not the model's."""
    found = checkpoints.flatten(flax.core.unfreeze(state.params))
    checkpoints.check_same_parameters(
        found, checkpoints.flatten(abstract.params), "of T5X in MODEL_DIR",
        "Use another MODEL_DIR, or the recipe that made it.",
    )  # fmt: skip
    counts = [state.step, *jax.tree.leaves(state.param_states)]
    wanted = [abstract.step, *jax.tree.leaves(abstract.opt_state)]
    for has, needs in zip(counts, wanted, strict=True):
        if (has.shape, has.dtype) != (needs.shape, needs.dtype):
            raise UserError(
                f"T5X's checkpoint in MODEL_DIR has {has.dtype} {has.shape} where the optimizer "
                f"or the step has {needs.dtype} {needs.shape}: bind SaveCheckpointConfig.dtype = "
                "None, which T5X otherwise casts counts by, or use another MODEL_DIR."
            )


def train_data(
    cfg: input_pipeline.DatasetConfig, shard_id: int, num_shards: int, converter: Any = None, *,
    model_dir: str,
) -> host_iterators.TrainData:  # fmt: skip
    """T5X's `get_dataset_fn`: begins at the step of the newest checkpoint in `model_dir`."""
    del converter
    cfg.check()
    rows = host_iterators.HostRows.of(cfg, shard_id, num_shards)
    return host_iterators.TrainData(cfg, rows, newest_step(model_dir))


def newest_step(model_dir: str) -> int:
    """Of T5X's checkpoints; 0 where there is none."""
    steps = t5x.checkpoints.all_steps(model_dir) if epath.Path(model_dir).is_dir() else []
    return max(steps, default=0)


class _Datasets(dict[str, host_iterators.EvaluationData]):
    """By name. T5X evaluates where this is true: there may be evaluators alone."""

    def __bool__(self) -> bool:
        return True


def evaluation_data(
    cfgs: Sequence[input_pipeline.DatasetConfig | None], shard_id: int, num_shards: int,
    eval_steps: int, converter: Any = None,
) -> _Datasets:  # fmt: skip
    """T5X's `train_eval_get_dataset_fn`: EVAL_EXAMPLES says how many, not `eval_steps`."""
    del eval_steps, converter
    found = _Datasets()
    for cfg in filter(None, cfgs):
        cfg.check()
        rows = host_iterators.HostRows.of(cfg, shard_id, num_shards)
        found[cfg.mixture_or_task_name] = host_iterators.EvaluationData(cfg, rows)
    return found
