import jax
import numpy as np
import pytest

from clipa_t5x import flops, models, published
from clipa_t5x.errors import UserError
from clipa_t5x.towers import text_transformer, vision_transformer


def clip(width=96, **image):
    image = {"pooling": "gap", **image}
    return models.ClipModel(
        image_tower=vision_transformer.VisionTransformer(
            width=width, depth=3, mlp_dim=2 * width, num_heads=4, patch_size=8, out_dim=40, **image
        ),
        text_tower=text_transformer.TextTransformer(
            width=48, depth=2, mlp_dim=160, num_heads=4, out_dim=40, vocab_size=64
        ),
    )


def forward(model, pixels, length, train):
    """The forward pass of one sample without the loss, and abstract arguments for it."""
    batch = {
        "images": jax.ShapeDtypeStruct((1, pixels, pixels, 3), np.uint8),
        "text": jax.ShapeDtypeStruct((1, length), np.int32),
    }
    params = jax.eval_shape(lambda b: models.init_params(model, jax.random.key(0), b), batch)

    def embed(params, batch):
        def both(module):
            return (
                module.embed_images(batch["images"], train=train),
                module.embed_text(batch["text"], train=train),
            )

        rngs = {name: jax.random.key(0) for name in models.RNG_STREAMS}
        return model.apply({"params": params}, method=both, rngs=rngs)

    return embed, (params, batch)


def product_flops(jaxpr):
    """FLOPs of every matrix product in a jaxpr, those of scanned bodies times their length."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = np.prod([eqn.invars[0].aval.shape[i] for i in contracted])
            total += 2 * int(np.prod(eqn.outvars[0].aval.shape) * inner)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * product_flops(inner)
    return total


@pytest.mark.parametrize(
    "settings, train",
    [
        ({}, False),
        ({"scan_layers": False}, False),
        ({"pooling": "map"}, False),
        ({"pooling": "tok", "mask_ratio": 0.4}, True),
        ({"mask_ratio": 0.4}, False),
        ({"mask_ratio": 0.5, "mask_strategy": "block", "remat_policy": "full"}, True),
    ],
)
def test_every_matrix_product_is_counted_and_nothing_else(settings, train):
    model = clip(**settings)
    embed, arguments = forward(model, 60, 10, train)
    counted = flops.forward_flops(model, 60, 10, train=train)
    traced = product_flops(jax.make_jaxpr(embed)(*arguments).jaxpr)
    assert counted.image + counted.text == traced


def test_a_training_step_is_three_forward_passes():
    """But for the pixels, whose gradient nobody needs."""
    model = clip(scan_layers=False)
    embed, (params, batch) = forward(model, 64, 10, False)

    def objective(params, batch):
        return sum(x.sum() for x in embed(params, batch))

    traced = product_flops(jax.make_jaxpr(jax.grad(objective))(params, batch).jaxpr)
    forward_flops = flops.forward_flops(model, 64, 10)
    patches = 2 * 64 * (3 * 8 * 8) * 96
    assert traced == forward_flops.training - patches


def test_the_compilers_count_is_a_little_more():
    """XLA also counts norms, softmaxes and activations: a few percent at this width."""
    model = clip(width=384, scan_layers=False)
    embed, arguments = forward(model, 64, 10, False)
    cost = jax.jit(embed).lower(*arguments).cost_analysis()
    counted = flops.forward_flops(model, 64, 10)
    assert 1.0 < cost["flops"] / (counted.image + counted.text) < 1.03


# GFLOPs at 32 text tokens: OpenCLIP's table of released weights.
@pytest.mark.parametrize(
    "name, pixels, giga",
    [
        ("L/14", 224, 167.50),
        ("H/14", 224, 354.02),
        ("bigG/14", 224, 1007.93),
        ("L/14", 336, 387.39),
        ("H/14", 336, 800.88),
        ("bigG/14", 336, 2271.58),
    ],
)
def test_published_models_have_their_published_flops(name, pixels, giga):
    counted = flops.forward_flops(published.clip_model(name), pixels, 32)
    assert round((counted.image + counted.text) / 1e9, 2) == giga


@pytest.mark.parametrize(
    "pixels, length, mask_ratio, tokens, image, text",
    [(84, 8, 0.0, 37, 136.7, 10.1), (224, 32, 0.4, 154, 574.9, 40.4)],
)
def test_bigg14s_stages(pixels, length, mask_ratio, tokens, image, text):
    model = published.clip_model("bigG/14", mask_ratio)
    counted = flops.forward_flops(model, pixels, length)
    assert counted.image_tokens == tokens
    assert round(counted.image / 1e9, 1) == image
    assert round(counted.text / 1e9, 1) == text


def test_towers_of_other_kinds_are_refused():
    model = models.ClipModel(image_tower=clip().text_tower, text_tower=clip().text_tower)
    with pytest.raises(UserError, match="TextTransformer are not known"):
        flops.forward_flops(model, 64, 8)
    swapped = models.ClipModel(image_tower=clip().image_tower, text_tower=clip().image_tower)
    with pytest.raises(UserError, match="VisionTransformer are not known"):
        flops.forward_flops(swapped, 64, 8)
