"""Small states and trainers, saved and restored: for tests of checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipa_t5x import checkpoints, optimizers, partitioning, schedules, train_state
from clipa_t5x import trainer as trainer_lib
from clipa_t5x.errors import UserError

DATA = {"next_sample": 48, "seed": 7, "shuffle": True, "split": "train", "num_examples": 13}


def make_trainer(
    tiny_model,
    *,
    devices=8,
    partitions=1,
    length=8,
    pixels=16,
    optimizer=None,
    image=None,
    text=None,
):
    """A trainer of a very small model on some devices, in some layout."""
    sizes = {"width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 4}
    model = tiny_model(image={**sizes, **(image or {})}, text={**sizes, **(text or {})})
    # Fully sharded, so that every kernel is cut into pieces.
    partitioner = partitioning.PjitPartitioner(
        num_partitions=partitions,
        logical_axis_rules=partitioning.standard_logical_axis_rules(1, 2),
    )
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:devices]).reshape(1, devices // partitions, partitions),
        partitioning.MESH_AXES,
    )
    partitioner.__dict__["mesh"] = mesh
    return trainer_lib.Trainer(
        model=model,
        optimizer=optimizer or optimizers.adamw(schedules.warmup_cosine(1e-3, 10)),
        partitioner=partitioner,
        batch_spec={
            "images": jax.ShapeDtypeStruct((8, pixels, pixels, 3), np.uint8),
            "text": jax.ShapeDtypeStruct((8, length), np.int32),
        },
    )


def filled(trainer, seed=0, step=6):
    """A state of random numbers, laid out as the trainer's; nothing is compiled."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            values = rng.integers(1, 1000, leaf.shape).astype(leaf.dtype)
        else:
            values = rng.normal(size=leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    state = jax.tree.map(fill, trainer.abstract_state)
    sharding = trainer.abstract_state.step.sharding
    return state.replace(step=jax.device_put(np.int32(step), sharding))


def small_state(seed=0, step=6):
    """A state of two arrays, where it does not matter what is saved."""
    values = np.random.default_rng(seed).normal(size=(4, 2)).astype(np.float32)
    return train_state.TrainState(
        step=jnp.int32(step),
        params={"kernel": jnp.asarray(values)},
        opt_state={},
        rng=jnp.zeros(2, jnp.uint32),
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(model_dir, state, *steps, data=DATA, **cfg):
    checkpointer = checkpoints.Checkpointer(str(model_dir), checkpoints.SaveCheckpointConfig(**cfg))
    for step in steps:
        checkpointer.save(step, state, data)
    checkpointer.close()


def restore(model_dir, abstract_state):
    checkpointer = checkpoints.Checkpointer(str(model_dir), checkpoints.SaveCheckpointConfig())
    restored = checkpointer.restore(abstract_state)
    checkpointer.close()
    return restored


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def one_line_error(function, *parts):
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    return message
