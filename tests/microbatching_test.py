import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipa_t5x import errors, losses, microbatching, partitioning

LOSSES = {
    "softmax": {"loss": functools.partial(losses.softmax_contrastive, num_chunks=2)},
    "sigmoid": {"loss": losses.sigmoid_contrastive, "init_logit_bias": -2.0},
}


@pytest.fixture(scope="module")
def model_of(tiny_model):
    """Returns a function from a loss's name to a model with masks, dropped paths and remat."""

    def make(loss):
        image = {"drop_path_rate": 0.1, "mask_ratio": 0.5, "remat_policy": "full"}
        return tiny_model(image=image, text={"depth": 1}, **LOSSES[loss])

    return make


@pytest.fixture(scope="module")
def batch(tiny_batch):
    return {**tiny_batch(), "weights": jnp.arange(16) < 14}


@pytest.fixture(scope="module")
def whole(model_of, random_params, batch):
    """Returns a function of a loss's name: parameters, and what the whole batch at once gives."""

    @functools.cache
    def get(loss):
        model = model_of(loss)
        params = {**random_params(model, batch), "logit_scale": jnp.log(20.0)}
        return params, jax.device_get(_jitted(model, 1)(params, batch, jax.random.key(1)))

    return get


def _jitted(model, num_microbatches):
    return jax.jit(
        lambda params, batch, rng: microbatching.value_and_grad(
            model, params, batch, rng, num_microbatches
        )
    )


def _assert_equal_gradients(grads, expected):
    """To 1e-5 of each parameter's largest entry.

    A key's bias has no influence on attention: its gradient is noise, and held against the rest.
    """
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))

    def check(path, x, y):
        assert x.dtype == np.float32
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        scale = largest if name.endswith("key/bias") else np.abs(y).max()
        assert scale > 0, name
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * scale, err_msg=name)

    jax.tree_util.tree_map_with_path(check, grads, expected)


@pytest.mark.parametrize(
    ("loss", "num_microbatches", "num_devices"),
    [
        ("softmax", 4, 1),
        ("sigmoid", 2, 8),
        pytest.param("softmax", 2, 8, marks=pytest.mark.slow),
        pytest.param("sigmoid", 16, 1, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_the_whole_batchs(
    model_of, batch, whole, loss, num_microbatches, num_devices
):
    params, ((expected_loss, expected_metrics), expected_grads) = whole(loss)
    partitioner = partitioning.PjitPartitioner(devices=jax.devices()[:num_devices])
    on_mesh = jax.device_put(batch, partitioner.batch_sharding())
    with partitioner.activate():
        (value, metrics), grads = jax.device_get(
            _jitted(model_of(loss), num_microbatches)(params, on_mesh, jax.random.key(1))
        )
    np.testing.assert_allclose(value, expected_loss, rtol=1e-5)
    assert metrics.keys() == expected_metrics.keys()
    for name, metric in metrics.items():
        np.testing.assert_allclose(metric, expected_metrics[name], rtol=1e-5, err_msg=name)
    _assert_equal_gradients(grads, expected_grads)


@pytest.mark.slow
def test_activations_take_as_many_times_less_memory(tiny_model, random_params, tiny_batch):
    model, batch = tiny_model(), tiny_batch(512)
    args = jax.eval_shape(lambda: (random_params(model, batch), batch, jax.random.key(0)))

    def temporaries(num_microbatches):
        compiled = _jitted(model, num_microbatches).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(1) / temporaries(4) == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("number", [3, 16, 0, -2, 2.0, "2", True, None])
def test_what_does_not_divide_a_devices_rows_is_refused(number):
    with pytest.raises(errors.UserError) as caught:
        microbatching.check_num_microbatches(number, batch_size=64, num_parts=8)
    assert str(caught.value) == (
        f"NUM_MICROBATCHES is {number!r}; it must divide the 8 rows that a device holds of "
        "BATCH_SIZE 64: choose one of 1, 2, 4, 8."
    )


def test_what_divides_a_devices_rows_passes():
    for number in (1, 2, 4, 8):
        microbatching.check_num_microbatches(number, batch_size=64, num_parts=8)
    microbatching.check_num_microbatches(64, batch_size=64, num_parts=1)
