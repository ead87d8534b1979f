import math

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from clipa_t5x import checkpoints, models
from clipa_t5x.errors import UserError
from clipa_t5x.towers import text_transformer, vision_transformer
from clipa_t5x.weights import layouts

TEXT_LENGTH, PIXELS = 32, 224
# width, depth, mlp_dim, heads of both towers; embedding; keys and parameters that OpenCLIP has;
# leaves and parameters that CLIPA has.
SIZES = {
    "L-14": ((1024, 24, 4096, 16), (768, 12, 3072, 12), 768, 444, 414_210_561, 587, 413_947_393),
    "H-14": ((1280, 32, 5120, 16), (1024, 24, 4096, 16), 1024, 684, 968_235_009, 907, 967_906_049),
    "bigG-14": (
        *((1664, 48, 8192, 16), (1280, 32, 5120, 20), 1280, 972, 2_517_223_937),
        *(1291, 2_516_796_289),
    ),
}


def model_of(image, text, out_dim, **image_options):
    names = ("width", "depth", "mlp_dim", "num_heads")
    return models.ClipModel(
        image_tower=vision_transformer.VisionTransformer(
            **dict(zip(names, image, strict=True)), patch_size=14, out_dim=out_dim, **image_options
        ),
        text_tower=text_transformer.TextTransformer(
            **dict(zip(names, text, strict=True)), out_dim=out_dim
        ),
    )


def shapes_of(model, pixels=PIXELS, length=TEXT_LENGTH):
    batch = {
        "images": jax.ShapeDtypeStruct((1, pixels, pixels, 3), np.uint8),
        "text": jax.ShapeDtypeStruct((1, length), np.int32),
    }
    params = jax.eval_shape(lambda b: models.init_params(model, jax.random.key(0), b), batch)
    return {k: v.shape for k, v in checkpoints.flatten(nn.unbox(params)).items()}


def small_shapes(**image_options):
    return layouts.unstacked(
        shapes_of(model_of((32, 2, 64, 4), (24, 3, 48, 2), 16, **image_options), 28, 5)
    )


def with_table(shapes):
    return {**shapes, layouts.IMAGE_POSITIONS: (5, 32)}


@pytest.mark.parametrize("name", SIZES)
def test_the_published_sizes(name):
    image, text, out_dim, num_keys, num_open_clip, num_leaves, num_clipa = SIZES[name]
    shapes = layouts.unstacked(shapes_of(model_of(image, text, out_dim)))
    theirs = {t.name: t.shapes[0] for t in layouts.clipa(shapes)}
    assert (len(theirs), sum(map(math.prod, theirs.values()))) == (num_leaves, num_clipa)
    width, _, mlp_dim, heads = image
    block = f"img/Transformer/encoderblock_{image[1] - 1}"
    assert theirs[f"{block}/MultiHeadDotProductAttention_0/key/kernel"] == (
        width, heads, width // heads,
    )  # fmt: skip
    assert theirs[f"{block}/MlpBlock_0/Dense_1/kernel"] == (mlp_dim, width)
    assert theirs["img/cls"] == (1, 1, width)
    assert theirs["t"] == (1,)
    assert theirs["txt/pos_embedding"] == (1, TEXT_LENGTH, text[0])
    shapes[layouts.IMAGE_POSITIONS] = (257, width)
    theirs = {t.name: t.shapes[0] for t in layouts.open_clip(shapes)}
    assert (len(theirs), sum(map(math.prod, theirs.values()))) == (num_keys, num_open_clip)
    assert theirs["visual.conv1.weight"] == (width, 3, 14, 14)
    block = f"visual.transformer.resblocks.{image[1] - 1}"
    assert theirs[f"{block}.attn.in_proj_weight"] == (3 * width, width)
    assert theirs[f"{block}.mlp.c_fc.weight"] == (mlp_dim, width)
    assert theirs["logit_scale"] == ()
    assert theirs["text_projection"] == (text[0], out_dim)


def layout(kind, shapes):
    return layouts.clipa(shapes) if kind == "clipa" else layouts.open_clip(with_table(shapes))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", ["clipa", "open_clip"])
def test_there_and_back_are_the_same_bytes(kind, dtype):
    rng = np.random.default_rng(0)
    shapes = small_shapes()
    tensors = layout(kind, shapes)
    ours = with_table(shapes) if kind == "open_clip" else shapes
    assert sorted(part for t in tensors for part in t.parts) == sorted(ours)
    for tensor in tensors:
        for shape in tensor.shapes:
            theirs = rng.normal(size=shape).astype(dtype)
            parts = tensor.split(theirs)
            assert [p.shape for p in parts] == [ours[name] for name in tensor.parts]
            again = tensor.join(parts)
            assert (again.dtype, again.shape) == (dtype, tensor.shapes[0])
            assert again.flags.c_contiguous
            assert again.tobytes() == theirs.tobytes()
            assert all(p.dtype == dtype for p in tensor.split(again))


def test_every_number_goes_where_open_clip_looks_for_it():
    shapes = with_table(small_shapes())
    rng = np.random.default_rng(1)
    ours = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    theirs = {t.name: t.join([ours[p] for p in t.parts]) for t in layouts.open_clip(shapes)}
    x = rng.normal(size=32)
    here, there = "image_tower/encoder/layers_1", "visual.transformer.resblocks.1"
    # Rows of q, k and v follow each other, within each a head's rows.
    rows = theirs[f"{there}.attn.in_proj_weight"] @ x + theirs[f"{there}.attn.in_proj_bias"]
    for i, name in enumerate(("query", "key", "value")):
        kernel, bias = (ours[f"{here}/attention/{name}/{k}"] for k in ("kernel", "bias"))
        by_head = np.einsum("d,dhk->hk", x, kernel) + bias
        np.testing.assert_allclose(rows.reshape(3, 4, 8)[i], by_head)
    heads = rng.normal(size=(4, 8))
    np.testing.assert_allclose(
        theirs[f"{there}.attn.out_proj.weight"] @ heads.reshape(-1),
        np.einsum("hk,hkd->d", heads, ours[f"{here}/attention/out/kernel"]),
    )
    np.testing.assert_allclose(
        theirs[f"{there}.mlp.c_fc.weight"] @ x, x @ ours[f"{here}/mlp/fc1/kernel"]
    )
    np.testing.assert_array_equal(theirs["visual.proj"], ours["image_tower/head/kernel"])
    image = rng.normal(size=(14, 14, 3))
    np.testing.assert_allclose(
        np.einsum("ocyx,yxc->o", theirs["visual.conv1.weight"], image),
        np.einsum("yxco,yxc->o", ours["image_tower/patch_embedding/kernel"], image),
    )


def test_heads_may_be_joined_in_clipas_files():
    tensors = {t.name: t for t in layouts.clipa(small_shapes())}
    attention = "img/Transformer/encoderblock_0/MultiHeadDotProductAttention_0"
    assert tensors[f"{attention}/query/kernel"].shapes == ((32, 4, 8), (32, 32))
    assert tensors[f"{attention}/value/bias"].shapes == ((4, 8), (32,))
    assert tensors[f"{attention}/out/kernel"].shapes == ((4, 8, 32), (32, 32))
    assert tensors[f"{attention}/out/bias"].shapes == ((32,),)


def test_scanned_layers_are_taken_apart():
    shapes = {"text_tower/encoder/layers/mlp/fc1/bias": (3, 7), "logit_scale": ()}
    assert layouts.unstacked(shapes) == {
        "text_tower/encoder/layers_0/mlp/fc1/bias": (7,),
        "text_tower/encoder/layers_1/mlp/fc1/bias": (7,),
        "text_tower/encoder/layers_2/mlp/fc1/bias": (7,),
        "logit_scale": (),
    }


@pytest.mark.parametrize(
    "kind, options, more, words",
    [
        ("clipa", {"pooling": "map"}, {}, r"pooling='map'"),
        ("clipa", {}, {"logit_bias": ()}, "INIT_LOGIT_BIAS"),
        ("clipa", {}, {"image_tower/pre_norm/scale": (32,)}, r"VisionTransformer\.pre_norm"),
        ("open_clip", {"pooling": "map"}, {}, r"VisionTransformer\.pooling"),
        ("open_clip", {"pooling": "none"}, {}, r"without image_tower/encoder_norm.*pooling"),
        ("open_clip", {}, {"other/kernel": (3, 4)}, "no place for other/kernel"),
        ("open_clip", {}, {"image_tower/encoder/layers_0/gate": (3,)}, "layers_0/gate"),
        ("clipa", {}, {"image_tower/encoder/layers_0/gate": (3,)}, "layers_0/gate"),
    ],
)
def test_what_a_layout_has_no_place_for_names_the_option(kind, options, more, words):
    with pytest.raises(UserError, match=words) as caught:
        layout(kind, {**small_shapes(**options), **more})
    assert "\n" not in str(caught.value)


def test_open_clip_takes_a_bias_of_the_logits_and_an_early_norm():
    more = {"logit_bias": (), "image_tower/pre_norm/scale": (32,)}
    names = {t.name for t in layout("open_clip", {**small_shapes(), **more})}
    assert {"logit_bias", "visual.ln_pre.weight"} <= names
