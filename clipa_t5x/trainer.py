"""The train step, and the state and functions that are jitted for one mesh.

A *step* is one update; `TrainState.step` counts updates completed.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from clipa_t5x import bad_numbers as bad_numbers_lib
from clipa_t5x import microbatching, models, optimizers, partitioning, train_state

Metrics = Mapping[str, jax.Array]

# (images uint8 [batch, height, width, 3], keys uint32 [batch, 2]) -> images; see `augmentation`.
Augment = Callable[[jax.Array, jax.Array], jax.Array]


def train_step(
    state: train_state.TrainState,
    batch: models.Batch,
    *,
    model: models.ClipModel,
    optimizer: optimizers.Optimizer,
    num_microbatches: int = 1,
    augment: Augment | None = None,
    bad_numbers: bad_numbers_lib.Policy | None = None,
) -> tuple[train_state.TrainState, Metrics]:
    """One update: a pure function.

    Args:
      state: before the update; donated when jitted by `Trainer`.
      batch: global, see `models.ClipModel.__call__`; 'augment_keys' uint32 [batch, 2], too, where
        images are augmented.
      model: the model.
      optimizer: the update rule.
      num_microbatches: see `microbatching.value_and_grad`.
      augment: makes of images and keys what the model sees; None where that is the images.
      bad_numbers: which updates are not applied; the state then has a guard. None applies all.

    Returns:
      The state after the update, and float32 scalars: the model's metrics, the learning rate of
      this update, the global norms of gradient, parameters (before) and update, and those of
      `bad_numbers.guard_update`.
    """
    if augment is not None:
        batch = {**batch, "images": augment(batch["images"], batch["augment_keys"])}
    (_, metrics), grads = microbatching.value_and_grad(
        model, state.params, batch, state.step_rng(), num_microbatches
    )
    updates, opt_state = optimizer.transformation.update(grads, state.opt_state, state.params)
    metrics = {
        **metrics,
        "learning_rate": jnp.asarray(optimizer.learning_rate_fn(state.step), jnp.float32),
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(state.params),
        "update_norm": optax.tree.norm(updates),
    }
    params: Any = optax.apply_updates(state.params, updates)
    after = state.replace(step=state.step + 1, params=params, opt_state=opt_state)  # pyright: ignore[reportAttributeAccessIssue]
    if bad_numbers is None:
        return after, metrics
    return bad_numbers_lib.guard_update(bad_numbers, state, after, metrics)


class Trainer:
    """Model, optimizer and partitioner, bound into jitted functions.

    Attributes:
      model: the model.
      state_shardings: a NamedSharding for every array of the train state.
      abstract_state: shapes, dtypes and shardings of the train state; no memory is allocated.
      num_microbatches: how many parts of the batch the train step runs one after the other.
      bad_numbers: what the train step does about bad numbers, None where it does not look.
    """

    def __init__(
        self,
        *,
        model: models.ClipModel,
        optimizer: optimizers.Optimizer,
        partitioner: partitioning.PjitPartitioner,
        batch_spec: Mapping[str, jax.ShapeDtypeStruct],
        mesh: Any = None,
        num_microbatches: int = 1,
        augment: Augment | None = None,
        bad_numbers: bad_numbers_lib.Policy | None = None,
    ):
        """Works out shapes and shardings; computes nothing.

        Args:
          model: the model.
          optimizer: the update rule.
          partitioner: mesh and rules.
          batch_spec: shapes and dtypes of a global batch.
          mesh: instead of the partitioner's own: an abstract one for a dry run, or one of described
            devices to compile for.
          num_microbatches: how many parts of the batch the train step runs one after the other, for
            less memory and with the same result; see `microbatching.value_and_grad`.
          augment: as for `train_step`; neither evaluation nor embedding knows it.
          bad_numbers: as for `train_step`.

        Raises:
          UserError: a parameter's dimension, or the batch, does not divide by the mesh, or a
            device's share of the batch by num_microbatches.
        """
        self.model, self._optimizer, self._partitioner = model, optimizer, partitioner
        self.mesh = mesh or partitioner.mesh
        batch_size = batch_spec["images"].shape[0]
        partitioner.check_batch_size(batch_size, self.mesh)
        microbatching.check_num_microbatches(
            num_microbatches, batch_size, partitioner.num_batch_parts(self.mesh)
        )
        self._batch_spec, self.num_microbatches = batch_spec, num_microbatches
        self._augment, self.bad_numbers = augment, bad_numbers
        init = functools.partial(models.init_params, model, batch=one_example(batch_spec))
        self._init_params = lambda rng: nn.unbox(init(rng))
        self.boxed_params = jax.eval_shape(init, jax.random.key(0))
        self.state_shardings = self._shardings()
        shapes = jax.eval_shape(self._fresh_state, jax.random.key_data(jax.random.key(0)))
        self.abstract_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            self.state_shardings,
        )

    @property
    def rows_at_once(self) -> int:
        """Rows of the batch whose activations a device holds at a time."""
        batch_size = self._batch_spec["images"].shape[0]
        parts = self._partitioner.num_batch_parts(self.mesh)
        return batch_size // parts // self.num_microbatches

    def limit_rows_at_once(self, most: int) -> None:
        """Takes as many microbatches more as keep `rows_at_once` at `most`; before compiling."""
        rows = self.rows_at_once * self.num_microbatches
        sizes = (n for n in range(self.num_microbatches, rows + 1) if rows % n == 0)
        self.num_microbatches = next(n for n in sizes if rows // n <= max(most, 1))

    def _fresh_state(self, seed_key: jax.Array, params: Any = None) -> train_state.TrainState:
        init_rng, train_rng = jax.random.split(jax.random.wrap_key_data(seed_key))
        params = self._init_params(init_rng) if params is None else params
        return train_state.TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self._optimizer.transformation.init(params),
            rng=jax.random.key_data(train_rng),
            guard=self._fresh_guard(),
        )

    def _fresh_guard(self) -> train_state.Guard | None:
        return bad_numbers_lib.fresh_guard() if self.bad_numbers else None

    def _shardings(self) -> train_state.TrainState:
        """Optimizer moments lie as their parameters do; everything else is replicated."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        params = self._partitioner.param_shardings(self.boxed_params, self.mesh)
        transformation = self._optimizer.transformation
        opt_state = jax.eval_shape(transformation.init, nn.unbox(self.boxed_params))
        return train_state.TrainState(
            step=replicated,  # pyright: ignore[reportArgumentType]
            params=params,
            opt_state=optax.tree_map_params(
                transformation,
                lambda _, sharding: sharding,
                opt_state,
                params,
                transform_non_params=lambda _: replicated,
            ),
            rng=replicated,  # pyright: ignore[reportArgumentType]
            guard=jax.tree.map(lambda _: replicated, jax.eval_shape(self._fresh_guard)),
        )

    def init_state(self, seed: int, params: Any = None) -> train_state.TrainState:
        """A fresh state, created already sharded; around given parameters where there are any.

        Given parameters may lie anywhere; those that lie as the state's are taken over, not copied.
        """
        key = jax.random.key_data(jax.random.key(seed))
        with self._partitioner.activate(self.mesh):
            if params is None:
                init = jax.jit(self._fresh_state, out_shardings=self.state_shardings)
                return init(key)
            init = jax.jit(
                self._fresh_state, out_shardings=self.state_shardings, donate_argnames="params"
            )
            # A donated array that lies otherwise than its result cannot be reused for it.
            return init(key, jax.device_put(params, self.state_shardings.params))

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a global batch."""
        sharding = self._partitioner.batch_sharding(self.mesh)
        return {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding)
            for k, v in self._batch_spec.items()
        }

    @functools.cached_property
    def traced_train_step(self) -> Any:
        """The train step, traced but not lowered (`jax.stages.Traced`)."""
        step = jax.jit(
            functools.partial(
                train_step,
                model=self.model,
                optimizer=self._optimizer,
                num_microbatches=self.num_microbatches,
                augment=self._augment,
                bad_numbers=self.bad_numbers,
            ),
            donate_argnums=0,
            out_shardings=(self.state_shardings, NamedSharding(self.mesh, PartitionSpec())),
        )
        with self._partitioner.activate(self.mesh):
            return step.trace(self.abstract_state, self.abstract_batch)

    def lower_train_step(self) -> Any:
        """The train step, lowered for the mesh (`jax.stages.Lowered`); donates its state."""
        with self._partitioner.activate(self.mesh):
            return self.traced_train_step.lower()

    @functools.cached_property
    def compiled_train_step(self) -> Any:
        """The train step, compiled ahead of time; its state argument is donated."""
        return self.lower_train_step().compile()

    @functools.cached_property
    def eval_step(self) -> Any:
        """Jitted (params, batch) -> metrics, without masking or dropped paths."""

        def step(params: Any, batch: models.Batch) -> Metrics:
            return self.model.apply({"params": params}, batch, train=False)[1]  # pyright: ignore

        jitted = jax.jit(step, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
        return self._within_rules(jitted)

    @functools.cached_property
    def embed_images(self) -> Any:
        """Jitted (params, images) -> unit embeddings, rows laid out as the images'."""
        return self._embed(models.ClipModel.embed_images)

    @functools.cached_property
    def embed_text(self) -> Any:
        """Jitted (params, text) -> unit embeddings, rows laid out as the text's."""
        return self._embed(models.ClipModel.embed_text)

    def _embed(self, method: Any) -> Any:
        def embed(params: Any, inputs: jax.Array) -> jax.Array:
            return self.model.apply({"params": params}, inputs, method=method)  # pyright: ignore

        sharding = self._partitioner.batch_sharding(self.mesh)
        return self._within_rules(jax.jit(embed, out_shardings=sharding))

    def _within_rules(self, fn: Any) -> Any:
        def call(*args: Any) -> Any:
            with self._partitioner.activate(self.mesh):
                return fn(*args)

        return call


def one_example(batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Zeros for one row: parameters depend on the sizes of a row, not on their number."""
    return {k: jnp.zeros((1, *v.shape[1:]), v.dtype) for k, v in batch_spec.items()}
