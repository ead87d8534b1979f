import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clipa_t5x import (
    augmentation,
    errors,
    models,
    optimizers,
    partitioning,
    schedules,
    train_state,
    trainer,
)

STEPS = 3
FSDP = partitioning.standard_logical_axis_rules(1, 2)
BOTH_SPLIT = partitioning.standard_logical_axis_rules(2, 2)
TWO_SLICES = {"num_partitions": 2, "num_replicas": 2}
PARTITIONERS = {
    "one device": {"num_devices": 1},
    "data=8, fsdp": {"logical_axis_rules": FSDP},
    "data=2,model=4, data parallel": {"num_partitions": 4},
    "replica=2,data=2,model=2, fsdp": {**TWO_SLICES, "logical_axis_rules": FSDP},
    "replica=2,data=2,model=2, 4 microbatches": {**TWO_SLICES, "num_microbatches": 4},
}
MORE_PARTITIONERS = {
    "data=8, data parallel": {},
    "data=2,model=4, fsdp": {"num_partitions": 4, "logical_axis_rules": FSDP},
    "replica=2,data=2,model=2, data parallel": TWO_SLICES,
    # Without replicas: with them, where `data` is as large as `model` and a device holds no more
    # tokens than width / data, jaxlib 0.10.2 partitions products by these rules wrongly.
    "data=4,model=2, both split": {"num_partitions": 2, "logical_axis_rules": BOTH_SPLIT},
}


def _optimizer(**kwargs):
    # A large eps: where a gradient is zero but for rounding (a key's bias), Adam would turn its
    # sign, which is noise, into a whole update.
    return optimizers.adamw(schedules.warmup_cosine(0.05, 10), eps=0.1, **kwargs)


def _batch_spec(batch):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


def _make_trainer(
    batch, model, optimizer=None, num_devices=8, num_microbatches=1, augment=None, **partitioner
):
    return trainer.Trainer(
        model=model,
        optimizer=optimizer or _optimizer(),
        partitioner=partitioning.PjitPartitioner(
            devices=jax.devices()[:num_devices], **partitioner
        ),
        batch_spec=_batch_spec(batch),
        num_microbatches=num_microbatches,
        augment=augment,
    )


@pytest.fixture(scope="module")
def model(tiny_model):
    """A model with masks and dropped paths."""
    tower = {"drop_path_rate": 0.3}
    return tiny_model(image={**tower, "mask_ratio": 0.5}, text=tower)


@pytest.fixture(scope="module")
def trainers(model, tiny_batch):
    """Returns a function that makes the trainer of a name; what is compiled once stays so."""

    @functools.cache
    def get(name):
        return _make_trainer(tiny_batch(), model, **{**PARTITIONERS, **MORE_PARTITIONERS}[name])

    return get


@pytest.fixture(scope="module")
def sharded(trainers):
    return trainers("data=8, fsdp")


@pytest.fixture(scope="module")
def expected(trainers, model, tiny_batch):
    """States (with the first) and metrics of a plain loop, without trainer and mesh."""
    optimizer = _optimizer()

    @jax.jit
    def step(state, batch):
        def loss(params):
            return models.training_loss(model, params, batch, state.step_rng())

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.transformation.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["learning_rate"] = optimizer.learning_rate_fn(state.step)
        trees = {"grad_norm": grads, "param_norm": state.params, "update_norm": updates}
        for name, tree in trees.items():
            metrics[name] = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))
        return train_state.TrainState(state.step + 1, params, opt_state, state.rng), metrics

    states, all_metrics = [jax.device_get(trainers("one device").init_state(seed=0))], []
    for i in range(STEPS):
        state, metrics = jax.device_get(step(states[-1], tiny_batch(seed=i)))
        states.append(state)
        all_metrics.append(metrics)
    return states, all_metrics


def _on_mesh(subject, batch):
    return jax.device_put(batch, NamedSharding(subject.mesh, P(("replica", "data"))))


def _assert_close(tree, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerance), jax.device_get(tree), expected
    )


def _assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tree), expected)


def _check_layout(subject, state):
    """Every array of the state lies as announced, and no device holds more than its part."""

    def check(path, array, sharding, abstract):
        assert array.sharding.is_equivalent_to(sharding, array.ndim), path
        assert (array.shape, array.dtype) == (abstract.shape, abstract.dtype), path
        parts = {shard.data.shape for shard in array.addressable_shards}
        assert parts == {sharding.shard_shape(array.shape)}, path

    jax.tree_util.tree_map_with_path(check, state, subject.state_shardings, subject.abstract_state)


def _adam(opt_state):
    def is_adam(x):
        return isinstance(x, optax.ScaleByAdamState)

    (adam,) = [x for x in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(x)]
    return adam


def _fc1(tree):
    return tree["image_tower"]["encoder"]["layers"]["mlp"]["fc1"]["kernel"]


def test_a_fresh_state_is_the_same_on_every_mesh(trainers, expected):
    subject = trainers("replica=2,data=2,model=2, fsdp")
    state = subject.init_state(seed=0)
    _check_layout(subject, state)
    _assert_close(state, expected[0][0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name", [*PARTITIONERS, *[pytest.param(n, marks=pytest.mark.slow) for n in MORE_PARTITIONERS]]
)
def test_training_is_the_same_on_every_mesh(trainers, tiny_batch, expected, name):
    subject = trainers(name)
    states, metrics = expected
    state = subject.init_state(seed=0, params=states[0].params)
    _assert_equal(state, states[0])
    for i in range(STEPS):
        before = state
        state, step_metrics = subject.compiled_train_step(
            before, _on_mesh(subject, tiny_batch(seed=i))
        )
        assert all(x.is_deleted() for x in jax.tree.leaves(before)), "not donated"
        _check_layout(subject, state)
        assert {x.dtype for x in jax.tree.leaves(step_metrics)} == {jnp.dtype("float32")}
        _assert_close(step_metrics, metrics[i], rtol=5e-4)
        _assert_close(state, states[i + 1], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("partitioner", "part"),
    [
        ({}, (2, 32, 64)),
        ({"logical_axis_rules": FSDP}, (2, 4, 64)),
        ({"num_partitions": 4}, (2, 32, 16)),
        ({"num_partitions": 4, "logical_axis_rules": FSDP}, (2, 16, 16)),
    ],
)
def test_moments_lie_as_their_parameters(model, tiny_batch, partitioner, part):
    # With every optional piece of the optimizer: their states hold no surprises.
    optimizer = _optimizer(
        mu_dtype="bfloat16", frozen=["text_tower/.*"], max_grad_norm=1.0, max_logit_scale=100.0
    )
    state = _make_trainer(tiny_batch(), model, optimizer, **partitioner).abstract_state
    adam = _adam(state.opt_state)
    for x, dtype in [
        (_fc1(state.params), "float32"),
        (_fc1(adam.mu), "bfloat16"),
        (_fc1(adam.nu), "float32"),
    ]:
        assert x.shape == (2, 32, 64) and x.dtype == dtype
        assert x.sharding.shard_shape(x.shape) == part
    for x in (state.step, state.rng, adam.count):
        assert x.sharding.is_fully_replicated


def test_parameters_stay_float32_where_activations_are_bfloat16(tiny_model, tiny_batch):
    dtype = {"dtype": "bfloat16"}
    model, batch = tiny_model(image=dtype, text=dtype), tiny_batch()
    state = _make_trainer(batch, model).abstract_state
    step = functools.partial(trainer.train_step, model=model, optimizer=_optimizer())
    after, metrics = jax.eval_shape(step, state, _batch_spec(batch))
    for tree in (state.params, after.params, metrics):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


def test_the_seed_decides_the_state(trainers, expected):
    alone = trainers("one device")
    same, other = (jax.device_get(alone.init_state(seed=seed)) for seed in (0, 1))
    _assert_equal(same, expected[0][0])
    assert not np.allclose(_fc1(same.params), _fc1(other.params))
    assert not np.array_equal(same.rng, other.rng)


def test_given_parameters_are_taken_over_and_not_held_twice(sharded, expected):
    params = expected[0][1].params
    given = jax.device_put(params, sharded.state_shardings.params)
    state = sharded.init_state(seed=0, params=given)
    _check_layout(sharded, state)
    _assert_equal(state.params, params)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))
    # Everything else is as at the start of a run.
    _assert_equal(state.replace(params=0), expected[0][0].replace(params=0))


def test_a_step_is_a_function_of_state_and_batch(sharded, tiny_batch, expected):
    # Resuming: a state that was away from the devices goes on as one that never left.
    def step(state, i):
        return sharded.compiled_train_step(state, _on_mesh(sharded, tiny_batch(seed=i)))

    middle, _ = step(sharded.init_state(seed=0, params=expected[0][0].params), 0)
    saved = jax.device_get(middle)
    after, metrics = step(middle, 1)
    resumed, resumed_metrics = step(jax.device_put(saved, sharded.state_shardings), 1)
    _assert_equal(resumed, jax.device_get(after))
    _assert_equal(resumed_metrics, jax.device_get(metrics))


def test_training_lowers_the_loss(sharded, tiny_batch, expected):
    state, losses = sharded.init_state(seed=0, params=expected[0][0].params), []
    batch = _on_mesh(sharded, tiny_batch())
    for _ in range(10):
        state, metrics = sharded.compiled_train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]


COLLECTIVES = r"= .* (?:all|reduce|collective)-[a-z]+(?:-start)?\("


def test_augmented_training_is_training_on_augmented_images(sharded, model, tiny_batch, expected):
    batch = tiny_batch()
    keys = jax.random.bits(jax.random.key(1), (16, 2), "uint32")
    keyed = {**batch, "augment_keys": keys}
    augment = augmentation.simclr_jitter_gray
    subject = _make_trainer(keyed, model, augment=augment, logical_axis_rules=FSDP)
    augmented = {**batch, "images": jax.jit(augment)(batch["images"], keys)}
    assert jnp.any(augmented["images"] != batch["images"], axis=(1, 2, 3)).sum() > 8
    results = [
        jax.device_get(
            each.compiled_train_step(
                each.init_state(seed=0, params=expected[0][0].params), _on_mesh(each, given)
            )
        )
        for each, given in ((subject, keyed), (sharded, augmented))
    ]
    _assert_close(*results, rtol=1e-5, atol=1e-6)
    # Rows are augmented where they lie: devices tell each other no more than without.
    counts = {len(re.findall(COLLECTIVES, each.compiled_train_step.as_text()))
              for each in (subject, sharded)}  # fmt: skip
    assert len(counts) == 1 and counts.pop() > 0


def test_microbatches_are_parts_of_the_augmented_batch(model, tiny_batch):
    """Traced, not run: whatever the number of parts, all images are augmented, once."""
    batch = {**tiny_batch(), "augment_keys": jnp.zeros((16, 2), jnp.uint32)}
    seen = []

    def augment(images, keys):
        seen.append((images.shape, keys.shape))
        return images

    for parts in (1, 4):
        options = {"num_devices": 1, "num_microbatches": parts, "augment": augment}
        assert _make_trainer(batch, model, **options).traced_train_step
    assert seen == [((16, 16, 16, 3), (16, 2))] * 2


def test_evaluation_is_the_model_without_masks(trainers, tiny_model, tiny_batch, expected):
    subject = trainers("replica=2,data=2,model=2, fsdp")
    batch, params = tiny_batch(), expected[0][1].params
    on_mesh = _on_mesh(subject, batch)
    placed = jax.device_put(params, subject.state_shardings.params)
    metrics = subject.eval_step(placed, on_mesh)
    images = subject.embed_images(placed, on_mesh["images"])
    text = subject.embed_text(placed, on_mesh["text"])

    @jax.jit
    def by_hand(params):
        model, variables = tiny_model(), {"params": params}
        return (
            model.apply(variables, batch)[1],
            model.apply(variables, batch["images"], method="embed_images"),
            model.apply(variables, batch["text"], method="embed_text"),
        )

    _assert_close((metrics, images, text), jax.device_get(by_hand(params)), rtol=1e-4, atol=1e-5)
    for embeddings in (images, text):
        assert {shard.data.shape for shard in embeddings.addressable_shards} == {(4, 16)}


def test_an_abstract_mesh_needs_no_devices(tiny_model, tiny_batch):
    partitioner = partitioning.PjitPartitioner(logical_axis_rules=FSDP)
    subject = trainer.Trainer(
        model=tiny_model(),
        optimizer=_optimizer(),
        partitioner=partitioner,
        batch_spec=_batch_spec(tiny_batch(64)),
        mesh=partitioner.abstract_mesh({"data": 32, "model": 4}),
    )
    kernel = _fc1(subject.abstract_state.params)
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 1, 16)
    assert kernel.sharding.mesh.size == 128


def test_a_batch_that_does_not_divide_is_refused(tiny_model, tiny_batch):
    with pytest.raises(errors.UserError, match="BATCH_SIZE is 12, not a multiple of the 8 parts"):
        _make_trainer(tiny_batch(12), tiny_model())


def test_microbatches_that_do_not_divide_are_refused(tiny_model, tiny_batch):
    with pytest.raises(errors.UserError, match="NUM_MICROBATCHES is 3; it must divide the 2 rows"):
        _make_trainer(tiny_batch(16), tiny_model(), num_microbatches=3)


def test_microbatches_take_up_the_rows_of_lost_devices(tiny_batch, tiny_model):
    for num_devices, num_microbatches, most, expected in [
        (8, 1, 3, 1), (4, 1, 3, 2), (2, 1, 3, 4), (1, 1, 3, 8), (1, 4, 3, 8),
        (8, 1, 1, 3), (8, 1, 0, 3), (8, 3, 3, 3), (2, 1, 5, 3), (2, 1, 100, 1),
    ]:  # fmt: skip
        bound = _make_trainer(
            tiny_batch(24),
            tiny_model(),
            num_devices=num_devices,
            num_microbatches=num_microbatches,
        )
        bound.limit_rows_at_once(most)
        assert bound.num_microbatches == expected, (num_devices, num_microbatches, most)
        assert bound.rows_at_once == 24 // num_devices // expected
