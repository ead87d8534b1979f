import pytest

from clipa_t5x.weights import architecture
from clipa_t5x.weights.architecture import CLIPA, OPEN_CLIP, OURS

SHAPES = {
    OURS: {
        "image_tower/patch_embedding/kernel": (14, 14, 3, 32),
        "image_tower/encoder/layers/mlp/fc1/bias": (5, 64),
        "image_tower/encoder/layers/attention/query/bias": (5, 4, 8),
        "image_tower/head/kernel": (32, 16),
        "text_tower/token_embedding/embedding": (100, 24),
        "text_tower/position_embedding": (7, 24),
        "text_tower/encoder/layers_0/mlp/fc1/bias": (48,),
        "text_tower/encoder/layers_1/mlp/fc1/bias": (48,),
    },
    CLIPA: {
        "img/embedding/kernel": (14, 14, 3, 32),
        **{f"img/Transformer/encoderblock_{i}/MlpBlock_0/Dense_0/bias": (64,) for i in range(5)},
        "img/Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/bias": (4, 8),
        "img/head/kernel": (32, 16),
        "txt/Embed_0/embedding": (100, 24),
        "txt/pos_embedding": (1, 7, 24),
        **{f"txt/Transformer/encoderblock_{i}/MlpBlock_0/Dense_0/bias": (48,) for i in range(2)},
    },
    OPEN_CLIP: {
        "visual.conv1.weight": (32, 3, 14, 14),
        **{f"visual.transformer.resblocks.{i}.mlp.c_fc.bias": (64,) for i in range(5)},
        "visual.proj": (32, 16),
        "token_embedding.weight": (100, 24),
        "positional_embedding": (7, 24),
        **{f"transformer.resblocks.{i}.mlp.c_fc.bias": (48,) for i in range(2)},
    },
}
EXPECTED = {
    "VisionTransformer.width": 32,
    "VisionTransformer.patch_size": 14,
    "VisionTransformer.mlp_dim": 64,
    "VisionTransformer.depth": 5,
    "VisionTransformer.out_dim": 16,
    "VisionTransformer.pre_norm": False,
    "TextTransformer.vocab_size": 100,
    "TextTransformer.width": 24,
    "TextTransformer.mlp_dim": 48,
    "TextTransformer.depth": 2,
    architecture.TEXT_LENGTH: 7,
}


@pytest.mark.parametrize("layout", SHAPES)
def test_options_of_every_layout(layout):
    assert architecture.layout_of(SHAPES[layout]) == layout
    found = architecture.options(SHAPES[layout])
    assert {name: found[name] for name in EXPECTED} == EXPECTED
    if layout == OPEN_CLIP:  # Which does not tell heads.
        assert "VisionTransformer.num_heads" not in found
    else:
        assert found["VisionTransformer.num_heads"] == 4
        assert found["VisionTransformer.position_embedding"] == "fixed"
        assert found["TextTransformer.position_embedding"] == "learned"


def test_layouts_are_compared_with_each_other():
    ours, clipa = (architecture.options(SHAPES[each]) for each in (OURS, CLIPA))
    assert architecture.compare(clipa, ours) == ""
    assert architecture.compare(architecture.options(SHAPES[OPEN_CLIP]), ours) == ""
    other = architecture.options({**SHAPES[CLIPA], "img/head/kernel": (32, 99)})
    assert architecture.compare(other, ours) == "VisionTransformer.out_dim is 99 there and 16 here"


def test_what_is_of_no_layout_tells_nothing():
    assert architecture.options({"w": (3,)}) == {}
    assert architecture.layout_of({"w": 1}) is None


def test_a_depth_that_is_only_stated_costs_nothing():
    found = architecture.options({"image_tower/encoder/layers/mlp/fc1/bias": (2**62, 0)})
    assert found["VisionTransformer.depth"] == 2**62
