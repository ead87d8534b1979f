import pytest

from clipa_t5x import models
from clipa_t5x.errors import UserError
from clipa_t5x.weights import open_clip_config, open_clip_options


def clip(tiny_model, image=None, text=None, **kwargs):
    return open_clip_config.config(tiny_model(image=image, text=text, **kwargs), 16, 8, "squash")


def test_all_that_open_clip_would_take_for_something_else_is_said(tiny_model):
    found = clip(tiny_model)
    vision, text = found["model_cfg"]["vision_cfg"], found["model_cfg"]["text_cfg"]
    for tower in (vision, text):
        assert tower["act_kwargs"] == {"approximate": "tanh"}
        assert tower["norm_kwargs"] == {"eps": 1e-6}
    assert vision["no_ln_pre"] and vision["final_ln_after_pool"] and vision["pool_type"] == "avg"
    assert text["no_causal_mask"] and text["pool_type"] == "last" and text["context_length"] == 8
    assert text["tokenizer_kwargs"] == {"strip_sep_token": True}
    assert found["preprocess_cfg"]["mean"] == [0.485, 0.456, 0.406]
    assert found["preprocess_cfg"]["std"] == [0.229, 0.224, 0.225]


def test_openai_s_model(tiny_model):
    own = {"activation": "gelu_quick", "layer_norm_epsilon": 1e-5}
    found = clip(
        tiny_model,
        {**own, "pre_norm": True, "pooling": "tok"},
        {**own, "causal": True, "pooling": "argmax"},
    )["model_cfg"]
    assert found["quick_gelu"] and not found["vision_cfg"]["no_ln_pre"]
    assert found["vision_cfg"]["pool_type"] == "tok" and "act_kwargs" not in found["vision_cfg"]
    assert not found["vision_cfg"]["final_ln_after_pool"]
    assert not found["text_cfg"]["no_causal_mask"] and found["text_cfg"]["pool_type"] == "argmax"


@pytest.mark.parametrize(
    ("width", "mlp_dim"), [(1664, 8192), (1408, 6144), (48, 100), (1280, 5120)]
)
def test_the_ratio_gives_the_width_back(tiny_model, width, mlp_dim):
    found = clip(tiny_model, {"width": width, "mlp_dim": mlp_dim, "num_heads": 16})
    assert int(width * found["model_cfg"]["vision_cfg"]["mlp_ratio"]) == mlp_dim


def test_what_is_written_is_read_as_the_same_options(tiny_model, tmp_path):
    model = tiny_model(
        image={"pre_norm": True, "pooling": "tok", "activation": "gelu_exact"},
        text={"causal": True, "layer_norm_epsilon": 1e-5},
        init_logit_bias=-10.0,
    )
    found = open_clip_config.config(model, 16, 8, "shortest")
    options = open_clip_options.options(found).values
    for tower, module in (("Vision", model.image_tower), ("Text", model.text_tower)):
        for name in ("width", "depth", "mlp_dim", "num_heads", "pooling", "activation",
                     "layer_norm_epsilon"):  # fmt: skip
            assert options[f"{tower}Transformer.{name}"] == getattr(module, name), (tower, name)


@pytest.mark.parametrize(
    ("image", "text", "option"),
    [
        ({"pooling": "map"}, {}, "VisionTransformer.pooling is 'map'"),
        ({}, {"pooling": "gap"}, "TextTransformer.pooling is 'gap'"),
        ({"out_dim": None}, {}, "VisionTransformer.out_dim is None"),
        ({}, {"activation": "gelu_quick"}, "quick_gelu is for both"),
    ],
)
def test_what_has_no_place_is_named(tiny_model, image, text, option):
    with pytest.raises(UserError, match=option):
        clip(tiny_model, image, text)


def test_another_tower_is_named(tiny_model):
    model = models.ClipModel(image_tower=object(), text_tower=tiny_model().text_tower)
    with pytest.raises(UserError, match="no tower like object"):
        open_clip_config.config(model, 16, 8, "squash")
