import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from clipa_t5x import losses, models
from clipa_t5x.towers import text_transformer, vision_transformer

# Variant: image (width, depth, mlp, heads), text (the same), joint, patch; then parameters in
# total, of the image tower and of the text tower, at 32 text positions.
PUBLISHED = {
    "Ti/16": (
        ((192, 12, 768, 3), (192, 12, 768, 3), 192, 16),
        (17_049_025, 5_523_264, 11_525_760),
    ),
    "S/16": (
        ((384, 12, 1536, 6), (384, 12, 1536, 6), 384, 16),
        (55_479_169, 21_737_088, 33_742_080),
    ),
    "B/16": (
        ((768, 12, 3072, 12), (512, 12, 2048, 8), 512, 16),
        (140_531_969, 86_039_808, 54_492_160),
    ),
    "L/16": (
        ((1024, 24, 4096, 16), (768, 12, 3072, 12), 768, 16),
        (414_131_713, 303_885_312, 110_246_400),
    ),
    "L/14": (
        ((1024, 24, 4096, 16), (768, 12, 3072, 12), 768, 14),
        (413_947_393, 303_700_992, 110_246_400),
    ),
    "H/14": (
        ((1280, 32, 5120, 16), (1024, 24, 4096, 16), 1024, 14),
        (967_906_049, 631_745_280, 336_160_768),
    ),
    "bigG/14": (
        ((1664, 48, 8192, 16), (1280, 32, 5120, 20), 1280, 14),
        (2_516_796_289, 1_844_476_288, 672_320_000),
    ),
}


def _is_spec(x):
    return isinstance(x, PartitionSpec)


def _count(tree):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameter_counts_are_the_published_ones(variant):
    (image, text, joint, patch), counts = PUBLISHED[variant]
    names = ("width", "depth", "mlp_dim", "num_heads")
    model = models.ClipModel(
        image_tower=vision_transformer.VisionTransformer(
            **dict(zip(names, image, strict=True)), out_dim=joint, patch_size=patch
        ),
        text_tower=text_transformer.TextTransformer(
            **dict(zip(names, text, strict=True)), out_dim=joint
        ),
    )
    batch = {
        "images": jax.ShapeDtypeStruct((1, 224, 224, 3), np.uint8),
        "text": jax.ShapeDtypeStruct((1, 32), np.int32),
    }
    params = nn.unbox(
        jax.eval_shape(lambda b: models.init_params(model, jax.random.key(0), b), batch)
    )
    assert counts == (
        _count(params),
        _count(params["image_tower"]),
        _count(params["text_tower"]),
    )


@pytest.mark.parametrize("pooling", ["gap", "map"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_parameter_is_float32_and_names_its_dimensions(
    tiny_model, tiny_batch, pooling, scan_layers
):
    tower = {"dtype": "bfloat16", "position_embedding": "learned", "scan_layers": scan_layers}
    model = tiny_model(image={**tower, "pooling": pooling}, text=tower)
    boxed = jax.eval_shape(lambda b: models.init_params(model, jax.random.key(0), b), tiny_batch(1))
    names = {"embed", "mlp", "heads", "kv", "vocab", "layers", "joint_embed", None}

    def check(x, spec):
        assert x.dtype == jnp.float32
        assert len(spec) == len(x.shape)
        assert set(spec) <= names

    specs = nn.get_partition_spec(boxed)
    jax.tree.map(check, nn.unbox(boxed), specs)
    stacked = [spec for spec in jax.tree.leaves(specs, is_leaf=_is_spec) if "layers" in spec]
    assert len(stacked) == (32 if scan_layers else 0)


def test_l2_normalize():
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    unit = models.l2_normalize(jnp.asarray(x))
    np.testing.assert_allclose(
        unit, x / np.linalg.norm(x, axis=1, keepdims=True), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, rtol=1e-6)


def test_l2_normalize_of_zeros_is_zeros_with_a_finite_gradient():
    x = jnp.stack([jnp.zeros(4), jnp.ones(4)])
    target = jnp.arange(8.0).reshape(2, 4)
    unit, grads = jax.value_and_grad(lambda y: jnp.sum(models.l2_normalize(y) * target))(x)
    assert np.isfinite(unit) and np.all(np.isfinite(grads))
    np.testing.assert_array_equal(models.l2_normalize(x)[0], np.zeros(4))


def test_l2_normalize_computes_in_float32():
    x = jnp.full((1, 4096), 0.01, jnp.bfloat16)
    unit = models.l2_normalize(x)
    assert unit.dtype == jnp.float32
    assert np.linalg.norm(unit) == pytest.approx(1.0, rel=1e-6)


@pytest.fixture(scope="module")
def params(random_params, tiny_model, tiny_batch):
    return random_params(tiny_model(), tiny_batch())


def test_temperature_begins_at_one_over_seven_hundredths(tiny_model, tiny_batch):
    model = tiny_model()
    boxed = jax.eval_shape(model.init, jax.random.key(0), tiny_batch(1))
    assert nn.unbox(boxed)["params"]["logit_scale"].shape == ()
    scale = model.apply({"params": {}}, method=lambda m: m.logit_scale, mutable=["params"],
                        rngs={"params": jax.random.key(0)})[0]  # fmt: skip
    assert float(scale) == pytest.approx(2.659260, abs=1e-6)


def test_uint8_images_are_normalised_by_channel(tiny_model, tiny_batch, params):
    model, images = tiny_model(), tiny_batch()["images"]
    embed = jax.jit(lambda x: model.apply({"params": params}, x, method="embed_images"))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    by_hand = ((np.asarray(images) / 255 - mean) / std).astype(np.float32)
    np.testing.assert_allclose(embed(images), embed(by_hand), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_are_float32_of_unit_length(tiny_model, tiny_batch, params, dtype):
    model, batch = tiny_model(image={"dtype": dtype}, text={"dtype": dtype}), tiny_batch()
    for method, inputs in [("embed_images", batch["images"]), ("embed_text", batch["text"])]:
        embeddings = jax.jit(
            lambda x, method=method: model.apply({"params": params}, x, method=method)
        )(inputs)
        assert embeddings.shape == (16, 16) and embeddings.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, rtol=1e-5)


def test_the_call_is_the_loss_of_both_embeddings(tiny_model, tiny_batch, params):
    model = tiny_model()
    batch = {**tiny_batch(), "weights": jnp.arange(16) < 12}

    @jax.jit
    def both(params):
        images = model.apply({"params": params}, batch["images"], method="embed_images")
        text = model.apply({"params": params}, batch["text"], method="embed_text")
        by_hand = losses.softmax_contrastive(
            images, text, jnp.exp(params["logit_scale"]), batch["weights"]
        )
        return model.apply({"params": params}, batch), by_hand

    (loss, metrics), (expected, expected_metrics) = both(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert set(metrics) == {"loss", "accuracy", "logit_scale"}
    np.testing.assert_array_equal(metrics["loss"], loss)
    np.testing.assert_array_equal(metrics["accuracy"], expected_metrics["accuracy"])
    assert metrics["logit_scale"] == pytest.approx(float(jnp.exp(params["logit_scale"])))


def test_the_sigmoid_loss_learns_its_bias(tiny_model, tiny_batch, random_params):
    model = tiny_model(loss=losses.sigmoid_contrastive, init_logit_bias=-10.0)
    batch = tiny_batch()
    params = {**random_params(model, batch), "logit_bias": jnp.asarray(-2.5)}
    loss, metrics = model.apply({"params": params}, batch)
    bound = model.bind({"params": params})
    expected, _ = losses.sigmoid_contrastive(
        bound.embed_images(batch["images"]),
        bound.embed_text(batch["text"]),
        metrics["logit_scale"],
        logit_bias=jnp.asarray(-2.5),
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    grads = jax.grad(lambda p: model.apply({"params": p}, batch)[0])(params)
    assert float(jnp.abs(grads["logit_bias"])) > 0
    fresh = nn.unbox(model.init(jax.random.key(0), batch))["params"]
    assert float(fresh["logit_bias"]) == -10.0


def test_training_loss_is_a_function_of_its_key(tiny_model, tiny_batch, params):
    model, batch = tiny_model(image={"mask_ratio": 0.5}), tiny_batch()
    loss = jax.jit(lambda key: models.training_loss(model, params, batch, key)[0])
    assert loss(jax.random.key(1)) == loss(jax.random.key(1))
    assert loss(jax.random.key(1)) != loss(jax.random.key(2))


def test_masks_and_dropped_paths_have_streams_of_their_own(tiny_model, tiny_batch, params):
    seen = {}

    class Spy(nn.Module):
        @nn.compact
        def __call__(self, inputs, *, train, part):
            for stream in models.RNG_STREAMS:
                seen.setdefault(stream, []).append(jax.random.key_data(self.make_rng(stream)))
            return jnp.ones((inputs.shape[0], 4))

    model = models.ClipModel(image_tower=Spy(), text_tower=Spy())
    models.training_loss(model, {"logit_scale": jnp.zeros(())}, tiny_batch(), jax.random.key(0))
    keys = [tuple(np.asarray(key)) for stream in seen.values() for key in stream]
    assert len(keys) == 4 and len(set(keys)) == 4


def test_one_side_is_embedded_without_the_others_tower(tiny_model, tiny_batch, params):
    model, batch = tiny_model(), tiny_batch()
    for method, inputs, tower in [
        ("embed_images", batch["images"], "image_tower"),
        ("embed_text", batch["text"], "text_tower"),
    ]:
        own = {name: params[name] for name in (tower, "logit_scale")}
        shape = jax.eval_shape(
            lambda p, x, method=method: model.apply({"params": p}, x, method=method), own, inputs
        )
        assert shape.shape == (16, 16)
