import json

import pytest

from clipa_t5x import models
from clipa_t5x.errors import UserError
from clipa_t5x.towers import text_transformer, vision_transformer
from clipa_t5x.weights import open_clip_options

# As OpenCLIP has it for ViT-bigG-14-CLIPA.
BIG_G = {
    "embed_dim": 1280,
    "vision_cfg": {
        **{"image_size": 224, "layers": 48, "width": 1664, "head_width": 104, "mlp_ratio": 4.9231},
        **{"patch_size": 14, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    },
    "text_cfg": {
        **{"context_length": 32, "vocab_size": 32000, "hf_tokenizer_name": "bert-base-uncased"},
        **{"tokenizer_kwargs": {"strip_sep_token": True}, "width": 1280, "heads": 20},
        **{"layers": 32, "pool_type": "last", "no_causal_mask": True},
    },
}
OPENAI = {
    "embed_dim": 512,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def big_g(image=None, text=None, **kwargs):
    exact = {"activation": "gelu_exact", "layer_norm_epsilon": 1e-5, "out_dim": 1280}
    return models.ClipModel(
        image_tower=vision_transformer.VisionTransformer(
            **{**exact, "width": 1664, "depth": 48, "mlp_dim": 8192, "num_heads": 16}
            | {"patch_size": 14, **(image or {})}
        ),
        text_tower=text_transformer.TextTransformer(
            **{**exact, "width": 1280, "depth": 32, "mlp_dim": 5120, "num_heads": 20} | (text or {})
        ),
        **kwargs,
    )


def check(tmp_path, config, model):
    path = tmp_path / open_clip_options.CONFIG_FILE
    path.write_text(json.dumps(config))
    return open_clip_options.check(str(path), model)


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_clipa_s_largest():
    found = open_clip_options.options(BIG_G)
    expected = {
        **{"width": 1664, "depth": 48, "mlp_dim": 8192, "num_heads": 16, "out_dim": 1280},
        **{"patch_size": 14, "pre_norm": False, "pooling": "gap", "activation": "gelu_exact"},
        "layer_norm_epsilon": 1e-5,
    }
    for name, value in expected.items():
        assert found.values[f"VisionTransformer.{name}"] == value, name
    expected = {
        **{"width": 1280, "depth": 32, "mlp_dim": 5120, "num_heads": 20, "out_dim": 1280},
        **{"vocab_size": 32000, "pooling": "last", "causal": False, "mask_padding": False},
    }
    for name, value in expected.items():
        assert found.values[f"TextTransformer.{name}"] == value, name
    assert len(found.unsaid) == 4 and not found.unknown


def test_openai_s():
    values = open_clip_options.options({"model_cfg": OPENAI, "preprocess_cfg": IMAGENET}).values
    assert values["VisionTransformer.pre_norm"] is True
    assert values["VisionTransformer.pooling"] == "tok"
    assert values["VisionTransformer.num_heads"] == 12
    assert values["TextTransformer.causal"] is True
    assert values["TextTransformer.pooling"] == "argmax"
    assert values["TextTransformer.activation"] == "gelu_quick"
    assert values["ClipModel.image_mean"] == pytest.approx(models.IMAGENET_MEAN)


def test_what_is_said_of_gelu_and_epsilon():
    said = {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}
    config = {key: {**BIG_G[key], **said} for key in ("vision_cfg", "text_cfg")}
    found = open_clip_options.options({**BIG_G, **config})
    assert not found.unsaid
    for tower in ("VisionTransformer", "TextTransformer"):
        assert found.values[f"{tower}.activation"] == "gelu_tanh"
        assert found.values[f"{tower}.layer_norm_epsilon"] == 1e-6


def test_the_same_model_passes(tmp_path):
    config = {"model_cfg": BIG_G, "preprocess_cfg": IMAGENET}
    assert check(tmp_path, config, big_g()) == []
    assert check(tmp_path, BIG_G, big_g()) == []


def test_defaults_that_are_not_said_are_warned_of(tmp_path):
    options = {"activation": "gelu_tanh", "layer_norm_epsilon": 1e-6}
    warnings = check(tmp_path, BIG_G, big_g(options, options))
    assert len(warnings) == 4
    assert any("VisionTransformer.activation, for which OpenCLIP takes" in w for w in warnings)
    config = {**BIG_G, "text_cfg": {**BIG_G["text_cfg"], "novelty": 3}}
    (warning,) = check(tmp_path, config, big_g())
    assert "text_cfg.novelty" in warning


@pytest.mark.parametrize(
    "image, text, words",
    [
        ({"num_heads": 26}, {}, "VisionTransformer.num_heads is 16 there and 26 here"),
        ({"pre_norm": True}, {}, "VisionTransformer.pre_norm is False there and True here"),
        ({"pooling": "tok"}, {}, "VisionTransformer.pooling is 'gap' there and 'tok' here"),
        ({}, {"causal": True}, "TextTransformer.causal is False there and True here"),
        ({}, {"mask_padding": True}, "TextTransformer.mask_padding is False there and True here"),
        ({}, {"pooling": "argmax"}, "TextTransformer.pooling is 'last' there and 'argmax' here"),
        ({}, {"vocab_size": 9}, "TextTransformer.vocab_size is 32000 there and 9 here"),
        ({"mlp_dim": 6656}, {}, "VisionTransformer.mlp_dim is 8192 there and 6656 here"),
    ],
)
def test_another_model_is_refused_by_the_option(tmp_path, image, text, words):
    refused(lambda: check(tmp_path, BIG_G, big_g(image, text)), words, "--gin.NAME")


def test_other_pixels_are_refused(tmp_path):
    pixels = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.5, 0.5, 0.5]}
    config = {"model_cfg": BIG_G, "preprocess_cfg": pixels}
    refused(lambda: check(tmp_path, config, big_g()), "ClipModel.image_std", "ClipModel.image_mean")
    same = {name: tuple(255 * x for x in values) for name, values in pixels.items()}
    assert not check(tmp_path, config, big_g(image_mean=same["mean"], image_std=same["std"]))


@pytest.mark.parametrize(
    "section, change, words",
    [
        ("vision_cfg", {"timm_model_name": "vit"}, "vision_cfg.timm_model_name"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "vision_cfg.layers"),
        ("vision_cfg", {"ls_init_value": 0.1}, "vision_cfg.ls_init_value"),
        ("vision_cfg", {"attentional_pool": True}, "VisionTransformer has no option"),
        ("vision_cfg", {"final_ln_after_pool": False}, "avg with final_ln_after_pool False"),
        ("vision_cfg", {"pool_type": ["avg"]}, "vision_cfg.pool_type"),
        ("vision_cfg", {"width": "1024"}, "width of open_clip_config.json is '1024'"),
        ("vision_cfg", {"norm_kwargs": [1]}, "norm_kwargs"),
        ("vision_cfg", {"act_kwargs": {"approximate": "x"}}, "approximate"),
        ("text_cfg", {"hf_model_name": "roberta"}, "TextTransformer has no option"),
        ("text_cfg", {"proj_bias": True}, "text_cfg.proj_bias"),
        ("text_cfg", {"embed_cls": True}, "text_cfg.embed_cls"),
        ("text_cfg", {"pool_type": "eos"}, "text_cfg.pool_type"),
        ("text_cfg", {"qk_norm": True}, "text_cfg.qk_norm"),
    ],
)
def test_what_no_option_expresses_is_named(section, change, words):
    config = {**BIG_G, section: {**BIG_G[section], **change}}
    refused(lambda: open_clip_options.options(config), words)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{" * 100_000, '{"model_cfg": 3}', '{"preprocess_cfg": {"mean": "x"}}', "\x00"],
)
def test_damaged_files_are_refused(tmp_path, text):
    path = tmp_path / open_clip_options.CONFIG_FILE
    path.write_text(text)
    refused(lambda: open_clip_options.check(str(path), big_g()), "open_clip_config.json")


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / open_clip_options.CONFIG_FILE
    path.write_bytes(b" " * (2**20 + 1))
    refused(lambda: open_clip_options.read(str(path)), "1048576")


def test_a_folder_of_that_name_is_refused(tmp_path):
    refused(lambda: open_clip_options.read(str(tmp_path)), "cannot be read", "directory")


def test_the_configuration_of_a_folder_or_beside_a_file(tmp_path):
    assert open_clip_options.config_beside(str(tmp_path)) is None
    path = tmp_path / open_clip_options.CONFIG_FILE
    path.write_text("{}")
    for each in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        assert open_clip_options.config_beside(str(each)) == str(path)


def test_what_is_not_said_is_said_as_the_model_has_it():
    clipas = {"activation": "gelu_tanh", "layer_norm_epsilon": 1e-6}
    said, added = open_clip_options.completed(BIG_G, big_g(clipas, clipas))
    assert added == [
        "TextTransformer.activation='gelu_tanh'", "TextTransformer.layer_norm_epsilon=1e-06",
        "VisionTransformer.activation='gelu_tanh'", "VisionTransformer.layer_norm_epsilon=1e-06",
    ]  # fmt: skip
    found = open_clip_options.options(said)
    assert not found.unsaid and found.values["TextTransformer.activation"] == "gelu_tanh"
    assert "act_kwargs" not in BIG_G["vision_cfg"]
    # Whatever is said stays, and OpenCLIP's own defaults need not be.
    exact = {**BIG_G, "text_cfg": {**BIG_G["text_cfg"], "norm_kwargs": {"eps": 1e-4}}}
    assert open_clip_options.completed({"model_cfg": exact}, big_g()) == ({"model_cfg": exact}, [])
    quick = {"activation": "gelu_quick"}
    said, _ = open_clip_options.completed(BIG_G, big_g(quick, quick))
    assert said["model_cfg"]["quick_gelu"] is True


def test_the_sizes_that_a_configuration_is_for():
    assert open_clip_options.sizes(BIG_G) == (224, 32)
    model = {"vision_cfg": {"image_size": [84, 84]}, "text_cfg": {}}
    assert open_clip_options.sizes({"model_cfg": model}) == (84, 77)


def test_what_is_not_said_is_told_of_before_a_refusal(tmp_path, caplog):
    with caplog.at_level("WARNING"), pytest.raises(UserError, match="width is 1664 there"):
        check(tmp_path, BIG_G, big_g({"width": 1024, "activation": "gelu_tanh"}))
    assert "does not say VisionTransformer.activation" in caplog.text
