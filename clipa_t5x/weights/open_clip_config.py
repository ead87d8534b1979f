"""OpenCLIP's `open_clip_config.json` of a model here: its own loader builds the same from it."""

from typing import Any

import numpy as np

from clipa_t5x.errors import UserError
from clipa_t5x.towers import text_transformer, vision_transformer

# What its functions do that differ from those here in nothing but the name.
_ACTIVATIONS = {
    "gelu_tanh": {"act_kwargs": {"approximate": "tanh"}},
    "gelu_exact": {},
    "gelu_quick": {},
}
_IMAGE_POOLING = {
    "gap": {"pool_type": "avg", "final_ln_after_pool": True},
    "tok": {"pool_type": "tok", "final_ln_after_pool": False},
}
_TEXT_POOLING = {"last": "last", "first": "first", "argmax": "argmax"}
RESIZE_MODES = {"squash": "squash", "center_crop": "shortest"}


def config(model: Any, image_size: int, text_length: int, resize_mode: str) -> dict[str, Any]:
    """The configuration of a `ClipModel`, as JSON has it.

    Args:
      model: of a `VisionTransformer` and a `TextTransformer`.
      image_size: pixels; position tables are of this size.
      text_length: tokens.
      resize_mode: a value of `RESIZE_MODES`, what evaluation does to images.

    Raises:
      UserError: OpenCLIP has nothing for an option of the model's; names it.
    """
    image, text = model.image_tower, model.text_tower
    _refuse_unknown(image, text)
    quick = {tower.activation == "gelu_quick" for tower in (image, text)}
    if len(quick) > 1:
        raise UserError(
            "OpenCLIP's quick_gelu is for both towers, and activation='gelu_quick' is one's only: "
            "train both with it, or none."
        )
    # A name has it look for a tokenizer of Hugging Face's; of a local folder, in that folder.
    tokens = {
        "hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True},
    }  # fmt: skip
    return {
        "model_cfg": {
            "embed_dim": image.out_dim,
            "init_logit_scale": float(np.log(model.init_logit_scale)),
            "init_logit_bias": model.init_logit_bias,
            "quick_gelu": quick == {True},
            "vision_cfg": _vision(image, image_size),
            "text_cfg": {**_text(text, text_length), **tokens},
        },
        "preprocess_cfg": {
            "size": [image_size, image_size],
            "mode": "RGB",
            "mean": _unit(model.image_mean),
            "std": _unit(model.image_std),
            "interpolation": "bilinear",
            "resize_mode": resize_mode,
            "fill_color": 0,
        },
    }


def _refuse_unknown(image: Any, text: Any) -> None:
    for tower, kind in (
        (image, vision_transformer.VisionTransformer),
        (text, text_transformer.TextTransformer),
    ):
        if not isinstance(tower, kind):
            raise UserError(
                f"OpenCLIP has no tower like {type(tower).__name__}: export {kind.__name__}s."
            )
    known = (
        ("VisionTransformer.pooling", image.pooling, tuple(_IMAGE_POOLING)),
        ("TextTransformer.pooling", text.pooling, tuple(_TEXT_POOLING)),
        ("TextTransformer.mask_padding", text.mask_padding, (False,)),
        ("VisionTransformer.out_dim", image.out_dim, (text.out_dim,)),
    )
    for option, value, values in known:
        if value not in values or value is None:
            raise UserError(
                f"{option} is {value!r}, which OpenCLIP's towers do not have (they have "
                f"{', '.join(map(repr, values))}): export with --format=stablehlo or clipa."
            )


def _vision(tower: vision_transformer.VisionTransformer, image_size: int) -> dict[str, Any]:
    return {
        "image_size": image_size,
        "patch_size": tower.patch_size,
        "layers": tower.depth,
        "width": tower.width,
        "head_width": _head_width("VisionTransformer", tower.width, tower.num_heads),
        "mlp_ratio": _mlp_ratio(tower.width, tower.mlp_dim),
        "no_ln_pre": not tower.pre_norm,
        **_IMAGE_POOLING[tower.pooling],
        **_functions(tower),
    }


def _text(tower: text_transformer.TextTransformer, text_length: int) -> dict[str, Any]:
    return {
        "context_length": text_length,
        "vocab_size": tower.vocab_size,
        "width": tower.width,
        "heads": tower.num_heads,
        "layers": tower.depth,
        "mlp_ratio": _mlp_ratio(tower.width, tower.mlp_dim),
        "no_causal_mask": not tower.causal,
        "pool_type": _TEXT_POOLING[tower.pooling],
        **_functions(tower),
    }


def _functions(tower: Any) -> dict[str, Any]:
    """GELU and the norms' epsilon: those of OpenCLIP are others where nothing is said."""
    return {
        **_ACTIVATIONS[tower.activation],
        "norm_kwargs": {"eps": tower.layer_norm_epsilon},
    }


def _head_width(tower: str, width: int, num_heads: int) -> int:
    if width % num_heads:
        raise UserError(f"{tower}.width {width} is not a multiple of num_heads {num_heads}.")
    return width // num_heads


def _mlp_ratio(width: int, mlp_dim: int) -> float:
    """A ratio from which `int(width * ratio)` is exactly the MLP's width."""
    ratio = mlp_dim / width
    while int(width * ratio) < mlp_dim:
        ratio = float(np.nextafter(ratio, np.inf))
    return ratio


def _unit(values: Any) -> list[float]:
    """From the scale of bytes to that of [0, 1], to the digits that were meant."""
    return [round(float(value) / 255, 6) for value in values]
