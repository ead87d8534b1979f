import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipa_t5x.towers import layers

WIDTH, DEPTH, LENGTH = 16, 3, 5


def _encoder(**kwargs):
    return layers.Encoder(**{"depth": DEPTH, "num_heads": 2, "mlp_dim": 32, **kwargs})


def _apply(encoder, params, inputs, **kwargs):
    return jax.jit(lambda p, x: encoder.apply({"params": p}, x, **kwargs))(params, inputs)


def _inputs(batch=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, LENGTH, WIDTH))


@pytest.fixture(scope="module")
def params(random_params):
    """Parameters of a scanned encoder."""
    return random_params(_encoder(), _inputs())


def _loss(**kwargs):
    """A function of parameters whose gradient reaches each of them."""
    encoder = _encoder(**kwargs)
    return lambda params: jnp.mean(encoder.apply({"params": params}, _inputs()) ** 2)


@pytest.fixture(scope="module")
def loss_and_grads(params):
    """Those of scanned layers, nothing recomputed."""
    return jax.jit(jax.value_and_grad(_loss()))(params)


def _assert_close(tree, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), tree, expected
    )


def test_choose_lists_what_there_is():
    with pytest.raises(ValueError, match=r"pooling is 'mean'; it must be one of \['gap', 'tok'\]"):
        layers.choose("pooling", "mean", {"tok": 0, "gap": 1})


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        (
            "gelu_tanh",
            lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        ),
        ("gelu_exact", lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
        ("gelu_quick", lambda x: x / (1 + math.exp(-1.702 * x))),
    ],
)
def test_gelu_is_what_its_name_says(name, reference):
    x = np.linspace(-4, 4, 81, dtype=np.float32)
    expected = np.array([reference(float(value)) for value in x])
    np.testing.assert_allclose(layers.GELU[name](jnp.asarray(x)), expected, atol=1e-6)
    for other in layers.GELU.keys() - {name}:
        assert np.abs(np.asarray(layers.GELU[other](jnp.asarray(x))) - expected).max() > 1e-4


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
def test_layer_norm_adds_its_epsilon_to_the_variance(epsilon):
    x = 1e-3 * np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    norm = layers.layer_norm(epsilon=epsilon, dtype="float32", name="norm")
    outputs = norm.apply(norm.init(jax.random.key(0), x), x)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_layer_norm_takes_statistics_in_float32():
    x = (100 + np.random.default_rng(0).normal(size=(4, 256))).astype(jnp.bfloat16)
    norm = layers.layer_norm(epsilon=1e-6, dtype="bfloat16", name="norm")
    outputs = norm.apply(norm.init(jax.random.key(0), x), x)
    assert outputs.dtype == jnp.bfloat16
    x = x.astype(np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(outputs.astype(np.float32), expected, rtol=1e-2, atol=1e-2)


def _softmax(x):
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_textbooks(params, masked):
    attention = layers.MultiHeadAttention(2, "float32", layers.kernel_inits("xavier_uniform", 1, 1))
    weights = jax.tree.map(lambda p: np.asarray(p[0]), params["layers"]["attention"])
    queries, keys = _inputs()[:, :3], _inputs(seed=3)
    mask = np.arange(LENGTH) <= np.arange(3)[:, None] if masked else np.ones((3, LENGTH), bool)
    outputs = attention.apply({"params": weights}, queries, keys, jnp.asarray(mask)[None, None])

    def project(name, x):
        return np.einsum("bld,dhk->bhlk", x, weights[name]["kernel"]) + np.expand_dims(
            weights[name]["bias"], 1
        )

    scores = project("query", queries) @ project("key", keys).swapaxes(-1, -2) / np.sqrt(WIDTH // 2)
    attended = _softmax(np.where(mask, scores, -np.inf)) @ project("value", keys)
    expected = np.einsum("bhlk,hkd->bld", attended, weights["out"]["kernel"])
    np.testing.assert_allclose(outputs, expected + weights["out"]["bias"], rtol=1e-5, atol=1e-5)


def test_attention_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="width 16 is not a multiple of num_heads 3"):
        jax.eval_shape(_encoder(num_heads=3).init, jax.random.key(0), _inputs())


def test_width_scaled_kernels_have_clipas_deviations():
    width = 128
    inits = layers.kernel_inits("width_scaled", width, init_depth=12)
    residual = width**-0.5 * 24**-0.5
    expected = {
        "qkv": width**-0.5,
        "attention_out": residual,
        "fc1": (2 * width) ** -0.5,
        "fc2": residual,
    }
    for i, (name, deviation) in enumerate(expected.items()):
        kernel = np.asarray(inits[name](jax.random.key(i), (width, width)))
        assert kernel.std() == pytest.approx(deviation, rel=0.03), name
        assert abs(kernel.mean()) < 0.03 * deviation, name


def test_xavier_kernels_fill_their_bounds_of_the_flattened_matrix():
    inits = layers.kernel_inits("xavier_uniform", 64, init_depth=12)
    shapes = {
        "qkv": (64, 4, 16),
        "attention_out": (4, 16, 64),
        "fc1": (64, 64),
        "fc2": (64, 64),
    }
    bound = math.sqrt(6 / (64 + 64))
    for i, (name, shape) in enumerate(shapes.items()):
        kernel = np.abs(np.asarray(inits[name](jax.random.key(i), shape)))
        assert 0.98 * bound < kernel.max() <= bound, name


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"activation": "relu"},
            r"activation is 'relu'; .*\['gelu_exact', 'gelu_quick', 'gelu_tanh'\]",
        ),
        ({"init_style": "zeros"}, r"init_style is 'zeros'; .*\['width_scaled', 'xavier_uniform'\]"),
        (
            {"remat_policy": "all"},
            r"remat_policy is 'all'; .*\['full', 'minimal', 'none', 'save_qkv', 'save_qkv_mlp'\]",
        ),
    ],
)
def test_unknown_options_are_refused_with_a_list(setting, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(_encoder(**setting).init, jax.random.key(0), _inputs())


def test_scanned_layers_equal_unrolled_ones(params, loss_and_grads):
    unrolled = {
        f"layers_{i}": jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(DEPTH)
    }
    restacked = layers.stack_layers(unrolled, DEPTH)
    jax.tree.map(np.testing.assert_array_equal, restacked, params)
    loss, grads = loss_and_grads
    other, other_grads = jax.jit(
        jax.value_and_grad(_loss(scan_layers=False, remat_policy="save_qkv"))
    )(unrolled)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    _assert_close(layers.stack_layers(other_grads, DEPTH), grads)


def test_every_layer_begins_with_weights_of_its_own():
    kernels = nn.unbox(jax.jit(_encoder().init)(jax.random.key(0), _inputs()))["params"]["layers"]
    fc1 = np.asarray(kernels["mlp"]["fc1"]["kernel"])
    assert fc1.shape == (DEPTH, WIDTH, 32)
    assert not np.allclose(fc1[0], fc1[1]) and not np.allclose(fc1[1], fc1[2])


def test_remat_changes_neither_loss_nor_gradients(params, loss_and_grads):
    loss, grads = loss_and_grads
    for policy in layers.REMAT_POLICIES:
        other, other_grads = jax.jit(jax.value_and_grad(_loss(remat_policy=policy)))(params)
        np.testing.assert_allclose(other, loss, rtol=1e-6)
        _assert_close(other_grads, grads)


def test_remat_policies_keep_what_they_say(params):
    def kept(policy):
        residuals = jax.eval_shape(lambda p: jax.vjp(_loss(remat_policy=policy), p)[1], params)
        return sum(math.prod(x.shape) for x in jax.tree.leaves(residuals))

    # An activation that is kept stands in for the bias that recomputing it would take.
    tokens = 2 * LENGTH - 1
    full = kept("full")
    assert kept("save_qkv") - full == DEPTH * tokens * 3 * WIDTH
    assert kept("save_qkv_mlp") - full == DEPTH * tokens * (3 * WIDTH + 32)
    assert kept("save_qkv_mlp") < kept("minimal") < kept("none")


def test_drop_path_of_rate_zero_is_the_branch_itself():
    branch = _inputs()
    kept = layers.drop_path(branch, 0.0, lambda: jax.random.key(0))
    np.testing.assert_array_equal(kept, branch)


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    samples, rate = 4000, 0.3
    outputs = np.asarray(
        layers.drop_path(jnp.ones((samples, 2, 3)), rate, lambda: jax.random.key(0))
    )
    per_sample = outputs.reshape(samples, -1)
    assert np.all(per_sample == per_sample[:, :1])
    values = per_sample[:, 0]
    np.testing.assert_allclose(values[values > 0], 1 / (1 - rate), rtol=1e-6)
    deviation = math.sqrt(rate / (1 - rate) / samples)
    assert abs(values.mean() - 1) < 4 * deviation


def test_drop_path_is_for_training_only_and_spares_the_first_block(params):
    dropping = _encoder(drop_path_rate=0.999, depth=2)
    inputs = _inputs(batch=8)
    two = jax.tree.map(lambda p: p[:2], params)
    plain = _apply(_encoder(depth=2), two, inputs)
    np.testing.assert_array_equal(_apply(dropping, two, inputs), plain)
    # Rates grow linearly from 0: of two blocks at (0, 0.999) only the first is left.
    rngs = {"drop_path": jax.random.key(0)}
    trained = _apply(dropping, two, inputs, train=True, rngs=rngs)
    one = _apply(_encoder(depth=1), jax.tree.map(lambda p: p[:1], params), inputs)
    np.testing.assert_allclose(trained, one, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(trained - plain)).max() > 0.1


def test_drop_path_rate_zero_needs_no_random_key_in_training(params):
    plain, trained = (_apply(_encoder(), params, _inputs(), train=train) for train in (False, True))
    np.testing.assert_array_equal(plain, trained)
