import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipa_t5x.towers import layers, position_embeddings, vision_transformer

WIDTH, HEADS, OUT = 16, 2, 6


def _tower(**kwargs):
    sizes = {"width": WIDTH, "depth": 1, "mlp_dim": 32, "num_heads": HEADS, "patch_size": 4}
    return vision_transformer.VisionTransformer(**{**sizes, "out_dim": OUT, **kwargs})


def _images(batch=2, size=16, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, size, size, 3))


def _run(tower, params, images, **kwargs):
    """Outputs of the tower, and the tokens that enter and leave its encoder."""
    seen = {}

    def spy(call, args, kwargs, context):
        outputs = call(*args, **kwargs)
        if isinstance(context.module, layers.Encoder) and context.method_name == "__call__":
            seen["entering"], seen["leaving"] = args[0], outputs
        return outputs

    def apply(params, images):
        with nn.intercept_methods(spy):
            outputs = tower.apply({"params": params}, images, **kwargs)
        return outputs, dict(seen)

    return jax.tree.map(np.asarray, jax.jit(apply)(params, images))


@pytest.mark.parametrize("size", [(16, 12), (19, 13)])
def test_patch_embedding_is_a_convolution_that_drops_what_is_left_over(size):
    images = jax.random.normal(jax.random.key(0), (2, *size, 3))
    kernel = jax.random.normal(jax.random.key(1), (4, 4, 3, WIDTH))
    embedding = vision_transformer.PatchEmbedding(WIDTH, 4, "float32")
    expected = jax.lax.conv_general_dilated(
        images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    outputs = embedding.apply({"params": {"kernel": kernel}}, images)
    assert outputs.shape == (2, 4, 3, WIDTH)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


def test_images_smaller_than_a_patch_are_refused():
    with pytest.raises(ValueError, match="image size 3 x 16 is smaller than one patch of 4 pixels"):
        vision_transformer.patch_grid(3, 16, 4)


def test_tokens_are_the_class_token_and_patches_plus_their_positions(random_params):
    tower, images = _tower(), _images()
    params = random_params(tower, images)
    table = position_embeddings.sincos_2d(4, 4, WIDTH)
    patches = vision_transformer.PatchEmbedding(WIDTH, 4, "float32").apply(
        {"params": params["patch_embedding"]}, images
    )
    _, seen = _run(tower, params, images)
    np.testing.assert_array_equal(seen["entering"][:, 0], [params["class_token"]] * 2)
    expected = np.asarray(patches).reshape(2, 16, WIDTH) + table[1:]
    np.testing.assert_allclose(seen["entering"][:, 1:], expected, rtol=1e-5, atol=1e-5)


def test_sincos_positions_are_no_parameter_and_fit_every_resolution(random_params):
    tower = _tower()
    params = random_params(tower, _images())
    assert "position_embedding" not in params
    outputs, seen = _run(tower, params, _images(size=24))
    assert outputs.shape == (2, OUT) and seen["entering"].shape == (2, 1 + 36, WIDTH)


def test_learned_positions_have_a_row_per_token(random_params):
    tower, images = _tower(position_embedding="learned"), _images()
    params = random_params(tower, images)
    table = np.asarray(params["position_embedding"])
    assert table.shape == (1 + 16, WIDTH)
    _, seen = _run(tower, params, images)
    moved = {**params, "position_embedding": params["position_embedding"].at[3].add(1.0)}
    _, other = _run(tower, moved, images)
    changed = np.abs(other["entering"] - seen["entering"]).max(axis=(0, 2)) > 0.5
    assert list(np.flatnonzero(changed)) == [3]


@pytest.mark.parametrize("strategy", ["random", "grid", "block"])
def test_positions_travel_with_kept_patches(random_params, strategy):
    # All patches look alike: only its position tells one token from another.
    tower = _tower(mask_ratio=0.5, mask_strategy=strategy)
    images = jnp.ones((8, 16, 16, 3))
    params = random_params(tower, images)
    _, whole = _run(tower, params, images)
    _, masked = _run(tower, params, images, train=True, rngs={"patch_mask": jax.random.key(0)})
    assert masked["entering"].shape == (8, 1 + 8, WIDTH)
    np.testing.assert_array_equal(masked["entering"][:, 0], whole["entering"][:, 0])
    tokens = whole["entering"][0, 1:]
    distances = np.abs(masked["entering"][:, 1:, None] - tokens).max(axis=-1)
    assert np.all(distances.min(axis=-1) < 1e-6)
    places = distances.argmin(axis=-1)
    assert np.all(np.diff(places, axis=1) > 0)
    # Samples have masks of their own; a block of half of these patches has but six places.
    assert len({tuple(row) for row in places}) >= (8 if strategy != "block" else 3)


def test_evaluation_never_masks(random_params):
    images = _images()
    params = random_params(_tower(), images)
    plain, _ = _run(_tower(), params, images)
    outputs, seen = _run(_tower(mask_ratio=0.5, drop_path_rate=0.5), params, images)
    assert seen["entering"].shape == (2, 1 + 16, WIDTH)
    np.testing.assert_array_equal(outputs, plain)


def test_training_without_masks_is_evaluation_and_takes_no_random_key(random_params):
    images = _images()
    params = random_params(_tower(), images)
    plain, _ = _run(_tower(), params, images)
    np.testing.assert_array_equal(
        _run(_tower(mask_ratio=0.0), params, images, train=True)[0], plain
    )


def _norm(x, params, epsilon=1e-6):
    x = x.astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * np.asarray(params["scale"]) + np.asarray(params["bias"])


@pytest.mark.parametrize("pooling", ["gap", "tok", "none"])
def test_pooling_by_hand(random_params, pooling):
    tower, images = _tower(pooling=pooling), _images()
    params = random_params(tower, images)
    outputs, seen = _run(tower, params, images)
    tokens = seen["leaving"]
    by_hand = {
        "gap": lambda: _norm(tokens[:, 1:].mean(axis=1), params["encoder_norm"]),
        "tok": lambda: _norm(tokens, params["encoder_norm"])[:, 0],
        "none": lambda: tokens[:, 0],
    }
    expected = by_hand[pooling]() @ np.asarray(params["head"]["kernel"])
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
    assert ("encoder_norm" in params) == (pooling != "none")


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_pre_norm_is_of_every_token_that_enters(random_params, ratio):
    options = {"layer_norm_epsilon": 0.1, "mask_ratio": ratio}
    normed, plain = _tower(pre_norm=True, **options), _tower(**options)
    images, rngs = _images(), {"patch_mask": jax.random.key(0)}
    params = random_params(normed, images)
    scale = params["pre_norm"]
    _, seen = _run(normed, params, images, train=True, rngs=rngs)
    without = {k: v for k, v in params.items() if k != "pre_norm"}
    _, before = _run(plain, without, images, train=True, rngs=rngs)
    np.testing.assert_allclose(
        seen["entering"], _norm(before["entering"], scale, 0.1), rtol=1e-4, atol=1e-4
    )


def test_attention_pooling_by_hand(random_params):
    tower, images = _tower(pooling="map", out_dim=None), _images()
    params = random_params(tower, images)
    outputs, seen = _run(tower, params, images)
    assert "encoder_norm" not in params and "head" not in params
    tokens = seen["leaving"]
    params = jax.tree.map(np.asarray, params["attention_pooling"])
    weights = params["attention"]

    def project(name, x):
        return np.einsum("bld,dhk->bhlk", x, weights[name]["kernel"]) + np.expand_dims(
            weights[name]["bias"], 1
        )

    probe = np.broadcast_to(params["probe"], (2, 1, WIDTH))
    scores = project("query", probe) @ project("key", tokens).swapaxes(-1, -2)
    scores = np.exp(scores / np.sqrt(WIDTH // HEADS))
    attended = scores / scores.sum(-1, keepdims=True) @ project("value", tokens)
    x = np.einsum("bhlk,hkd->bld", attended, weights["out"]["kernel"]) + weights["out"]["bias"]
    fc1, fc2 = params["mlp"]["fc1"], params["mlp"]["fc2"]
    hidden = _norm(x, params["norm"]) @ fc1["kernel"] + fc1["bias"]
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    expected = (x + hidden @ fc2["kernel"] + fc2["bias"])[:, 0]
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


def test_layer_norm_epsilon_reaches_the_tower(random_params):
    images = _images()
    params = random_params(_tower(), images)
    tokens = _run(_tower(), params, images)[1]["leaving"]
    head = np.asarray(params["head"]["kernel"])
    outputs, seen = _run(_tower(layer_norm_epsilon=1.0), params, images)
    expected = _norm(seen["leaving"][:, 1:].mean(axis=1), params["encoder_norm"], 1.0) @ head
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(seen["leaving"] - tokens).max() > 1e-3


def test_bfloat16_is_for_activations_only(random_params):
    images = _images()
    tower = _tower(dtype="bfloat16")
    params = random_params(tower, images)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    outputs, seen = _run(tower, params, images)
    assert outputs.dtype == jnp.bfloat16
    assert {x.dtype for x in seen.values()} == {jnp.dtype("bfloat16")}
    exact, _ = _run(_tower(), params, images)
    np.testing.assert_allclose(outputs.astype(np.float32), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"pooling": "mean"}, r"pooling is 'mean'; .*\['gap', 'map', 'none', 'tok'\]"),
        ({"position_embedding": "rope"}, r"is 'rope'; .*\['learned', 'sincos2d'\]"),
        (
            {"activation": "relu"},
            r"activation is 'relu'; .*\['gelu_exact', 'gelu_quick', 'gelu_tanh'\]",
        ),
    ],
)
def test_unknown_options_are_refused_with_a_list(setting, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(_tower(**setting).init, jax.random.key(0), _images())
