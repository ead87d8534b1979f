"""What an `open_clip_config.json` says of a model, in the names of our options.

OpenCLIP's weights do not tell which GELU they were trained with, where a text is pooled, or how
wide a head is: only the configuration beside them does.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from clipa_t5x.errors import UserError, storage_errors
from clipa_t5x.weights.stored_arrays import refusal

CONFIG_FILE = "open_clip_config.json"
_MAX_BYTES = 2**20

# Fields that are an option of no tower here; any value but these would be another model.
_NONE_HERE: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "vision_cfg": {
        "timm_model_name": (None, ""),
        "ls_init_value": (None,),
        "attentional_pool": (False, None, ""),
        "block_type": (None, "default"),
        **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads"), (False, None)),
        **dict.fromkeys(("scale_attn_inner", "scale_attn", "scale_fc"), (False, None)),
    },
    "text_cfg": {
        "hf_model_name": (None, ""),
        "ls_init_value": (None,),
        "embed_cls": (False, None),
        "proj_type": ("linear", None),
        "proj_bias": (False, None),
        "block_type": (None, "default"),
        **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads"), (False, None)),
        **dict.fromkeys(("scale_attn_inner", "scale_attn", "scale_fc"), (False, None)),
    },
    "model_cfg": {"multimodal_cfg": (None,)},
}
# Fields that are read below, or change no embedding, or are told by shapes.
_KNOWN = {
    "vision_cfg": {
        *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"),
        *("no_ln_pre", "final_ln_after_pool", "pool_type", "act_kwargs", "norm_kwargs"),
        *("patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "pos_embed_type"),
        *("output_tokens", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias"),
        *("timm_drop", "timm_drop_path", "input_patchnorm"),
    },
    "text_cfg": {
        *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pool_type"),
        *("no_causal_mask", "act_kwargs", "norm_kwargs", "pad_id", "eos_id"),
        *("final_ln_after_pool", "output_tokens", "hf_tokenizer_name", "tokenizer_kwargs"),
        *("tokenizer_mode", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    },
    "model_cfg": {
        *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"),
        *("init_logit_bias", "nonscalar_logit_scale", "output_dict", "cast_dtype"),
    },
}
_IMAGE_POOLINGS = {("tok", False): "tok", ("tok", True): "tok", ("avg", True): "gap"}
_TEXT_POOLINGS = ("argmax", "first", "last")
# What OpenCLIP takes where its configuration says nothing.
_EPSILON, _GELU = 1e-5, "gelu_exact"


@dataclasses.dataclass(frozen=True)
class Options:
    """A configuration in our options.

    Attributes:
      values: by option, such as 'VisionTransformer.width' or 'ClipModel.image_mean'.
      unsaid: options whose value is OpenCLIP's default for what the configuration does not say.
        CLIPA's published ones do not say its GELU and epsilon, so that a default is no proof.
      unknown: fields that are not known here, such as 'text_cfg.new_thing'.
    """

    values: Mapping[str, Any]
    unsaid: frozenset[str]
    unknown: tuple[str, ...]


def read(path: str) -> Mapping[str, Any]:
    """The configuration in a file.

    Raises:
      UserError: it is no JSON object, or too large for one of these, or cannot be read.
    """
    file = epath.Path(path)
    try:
        if file.stat().length > _MAX_BYTES:
            raise refusal(path, f"it has more than {_MAX_BYTES} bytes")
        text = file.read_bytes()
    except storage_errors() as error:
        raise refusal(path, error) from error
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal(path, f"it is no JSON ({type(error).__name__}: {error})") from error
    if not isinstance(config, dict):
        raise refusal(path, "it holds no JSON object")
    return config


def config_beside(path: str) -> str | None:
    """The configuration of a folder, or of the folder that a file of weights is in."""
    for folder in (path, os.path.dirname(path) or "."):
        if (config := epath.Path(folder) / CONFIG_FILE).exists():
            return os.fspath(config)
    return None


def options(config: Mapping[str, Any]) -> Options:
    """Turns a configuration into our options.

    Args:
      config: with 'model_cfg' and 'preprocess_cfg', or the former alone.

    Raises:
      UserError: a field has a value of the wrong kind, or one that no option here expresses.
    """
    preprocess = _section(config, "preprocess_cfg")
    model, vision, text = _models(config)
    sections = {"model_cfg": model, "vision_cfg": vision, "text_cfg": text}
    for section, fields in _NONE_HERE.items():
        for field, allowed in fields.items():
            if sections[section].get(field, allowed[0]) not in allowed:
                raise _inexpressible(section, field, sections[section][field])
    if not isinstance(vision.get("layers", 12), int):
        raise _inexpressible("vision_cfg", "layers", vision["layers"])
    quick = bool(model.get("quick_gelu", False))
    values: dict[str, Any] = {}
    unsaid: set[str] = set()
    for tower, section in (("VisionTransformer", vision), ("TextTransformer", text)):
        values |= {f"{tower}.{k}": v for k, v in _common(section, tower).items()}
        values[f"{tower}.out_dim"] = _number(model, "embed_dim", 512)
        values[f"{tower}.activation"], values[f"{tower}.layer_norm_epsilon"] = (
            _activation(section, quick),
            float(_number(_section(section, "norm_kwargs"), "eps", _EPSILON)),
        )
        if not quick and "approximate" not in _section(section, "act_kwargs"):
            unsaid.add(f"{tower}.activation")
        if "eps" not in _section(section, "norm_kwargs"):
            unsaid.add(f"{tower}.layer_norm_epsilon")
    values |= _image_options(vision) | _text_options(text) | _pixels(preprocess)
    unknown = tuple(
        f"{name}.{field}"
        for name, section in sections.items()
        for field, value in section.items()
        if value and field not in _KNOWN[name] and field not in _NONE_HERE[name]
        and not (name == "model_cfg" and section is config and field == "preprocess_cfg")
    )  # fmt: skip
    return Options(values, frozenset(unsaid), unknown)


def _models(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The sections of the model and of its two towers; a configuration may be the first alone."""
    model = _section(config, "model_cfg") if "model_cfg" in config else config
    return model, _section(model, "vision_cfg"), _section(model, "text_cfg")


def sizes(config: Mapping[str, Any]) -> tuple[Any, int]:
    """(pixels a side, or of every side where they differ; tokens) that a configuration is for."""
    _, vision, text = _models(config)
    pixels = vision.get("image_size", 224)
    if isinstance(pixels, list) and len(set(map(str, pixels))) == 1:
        pixels = pixels[0]
    return pixels, text.get("context_length", 77)


def tokenizer(path: str) -> str | None:
    """Hugging Face's tokenizer that a configuration's file names; None where it names none.

    OpenCLIP then takes OpenAI's byte-pair encoding.
    """
    _, _, text = _models(read(path))
    return text.get("hf_tokenizer_name") or None


def completed(config: Mapping[str, Any], model: Any) -> tuple[dict[str, Any], list[str]]:
    """What a configuration does not say, said as a model has it.

    Args:
      config: as for `options`.
      model: a `models.ClipModel`.

    Returns:
      (a configuration with 'model_cfg', what it says more than `config`, such as
      "TextTransformer.activation='gelu_tanh'").
    """
    said: dict[str, Any] = copy.deepcopy(dict(config))
    said = said if "model_cfg" in said else {"model_cfg": said}
    added = []
    for name in sorted(options(config).unsaid):
        owner, _, attribute = name.partition(".")
        is_image = owner == "VisionTransformer"
        value = getattr(model.image_tower if is_image else model.text_tower, attribute)
        if value in (_EPSILON, _GELU):
            continue
        if value == "gelu_quick":  # Of both towers, or of none.
            said["model_cfg"]["quick_gelu"] = True
        else:
            field = "norm_kwargs" if attribute == "layer_norm_epsilon" else "act_kwargs"
            own = {"eps": value} if field == "norm_kwargs" else {"approximate": "tanh"}
            section = said["model_cfg"]["vision_cfg" if is_image else "text_cfg"]
            section[field] = {**(section.get(field) or {}), **own}
        added.append(f"{name}={value!r}")
    return said, added


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise UserError(f"{name} of {CONFIG_FILE} is {section!r}; it must be a JSON object.")
    return section


def _number(section: Mapping[str, Any], name: str, default: float) -> Any:
    value = section.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise UserError(f"{name} of {CONFIG_FILE} is {value!r}; it must be a number above 0.")
    return value


def _inexpressible(section: str, field: str, value: Any) -> UserError:
    tower = {"vision_cfg": "VisionTransformer", "text_cfg": "TextTransformer"}
    return UserError(
        f"{section}.{field} of {CONFIG_FILE} is {value!r}, for which "
        f"{tower.get(section, 'ClipModel')} has no option: such a model cannot be built here."
    )


def _common(section: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """What both towers have: sizes."""
    is_image = tower == "VisionTransformer"
    width = _number(section, "width", 768 if is_image else 512)
    heads = _number(section, "heads", 8)
    if is_image:
        heads = width // _number(section, "head_width", 64)
    return {
        "width": width,
        "depth": _number(section, "layers", 12),
        "mlp_dim": int(width * _number(section, "mlp_ratio", 4.0)),
        "num_heads": heads,
    }


def _activation(section: Mapping[str, Any], quick: bool) -> str:
    if quick:
        return "gelu_quick"
    approximate = _section(section, "act_kwargs").get("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise UserError(
            f"act_kwargs.approximate of {CONFIG_FILE} is {approximate!r}; it must be 'none' or "
            "'tanh'."
        )
    return "gelu_tanh" if approximate == "tanh" else _GELU


def _image_options(vision: Mapping[str, Any]) -> dict[str, Any]:
    pooling = (vision.get("pool_type", "tok"), bool(vision.get("final_ln_after_pool", False)))
    if not isinstance(pooling[0], str) or pooling not in _IMAGE_POOLINGS:
        after = f"{pooling[0]} with final_ln_after_pool {pooling[1]}"
        raise _inexpressible("vision_cfg", "pool_type", after)
    patch = vision.get("patch_size", 16)
    if isinstance(patch, list) and len(set(map(str, patch))) == 1:
        patch = patch[0]
    return {
        "VisionTransformer.patch_size": _number({"patch_size": patch}, "patch_size", 16),
        "VisionTransformer.pre_norm": not vision.get("no_ln_pre", False),
        "VisionTransformer.pooling": _IMAGE_POOLINGS[pooling],
    }


def _text_options(text: Mapping[str, Any]) -> dict[str, Any]:
    pooling = text.get("pool_type", "argmax")
    if pooling not in _TEXT_POOLINGS:
        raise _inexpressible("text_cfg", "pool_type", pooling)
    return {
        "TextTransformer.vocab_size": _number(text, "vocab_size", 49408),
        "TextTransformer.pooling": pooling,
        "TextTransformer.causal": not text.get("no_causal_mask", False),
        "TextTransformer.mask_padding": False,
    }


def _pixels(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and deviation of pixels on the scale of 0 to 255, where they are said."""
    values: dict[str, Any] = {}
    for field in ("mean", "std"):
        if field in preprocess:
            numbers = preprocess[field]
            numbers = [numbers] * 3 if isinstance(numbers, int | float) else numbers
            if not isinstance(numbers, list) or len(numbers) != 3 or not all(
                isinstance(x, int | float) for x in numbers
            ):  # fmt: skip
                raise UserError(f"{field} of {CONFIG_FILE} is {numbers!r}; it must be 3 numbers.")
            values[f"ClipModel.image_{field}"] = tuple(255 * float(x) for x in numbers)
    return values


def check(path: str, model: Any) -> list[str]:
    """Compares a configuration with a model.

    Args:
      path: of the JSON.
      model: a `models.ClipModel`; options that its towers do not have are not compared.

    Returns:
      Warnings, a line each: of OpenCLIP's defaults that differ from the model, and of fields that
      are not known here.

    Raises:
      UserError: the file is no such configuration, or what it says differs from the model.
    """
    stated = options(read(path))
    towers = {"VisionTransformer": model.image_tower, "TextTransformer": model.text_tower}
    refused, warnings = [], []
    for name, there in stated.values.items():
        owner, _, attribute = name.partition(".")
        here = getattr(towers.get(owner, model), attribute, there)
        if _same(here, there):
            continue
        if name in stated.unsaid:
            warnings.append(
                f"{path} does not say {name}, for which OpenCLIP takes {there!r}, and here it is "
                f"{here!r}: set --gin.{name}={there!r} unless the weights were trained otherwise, "
                "as CLIPA's were."
            )
        else:
            refused.append(f"{name} is {there!r} there and {here!r} here")
    if refused:
        for warning in warnings:  # They may be why.
            logging.warning("%s", warning)
        raise UserError(
            f"{path} is of a different model: {', '.join(refused)}. Give the options that are "
            "there (--gin.NAME=VALUE), or weights of this model."
        )
    warnings += [f"{path} sets {field}, which is not known here." for field in stated.unknown]
    return warnings


def _same(here: Any, there: Any) -> bool:
    if isinstance(there, tuple):  # Of pixels: published to three digits.
        return len(here) == len(there) and all(
            abs(a - b) < 0.2 for a, b in zip(here, there, strict=True)
        )
    return here == there
