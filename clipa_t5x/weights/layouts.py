"""How other trainers lay out the parameters that are here: names, shapes, order of dimensions.

A layout is a list of `Tensor`s, each of which goes both ways, byte for byte. They are made from
names and shapes alone, and know no model.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from clipa_t5x.errors import UserError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

LOGIT_SCALE, LOGIT_BIAS = "logit_scale", "logit_bias"
IMAGE_POSITIONS = "image_tower/position_embedding"
TEXT_POSITIONS = "text_tower/position_embedding"

_STACK = "/encoder/layers/"
_BLOCK = re.compile(r"(image_tower|text_tower)/encoder/layers_(\d+)/(.+)")
_QKV = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of another layout, as made of arrays here.

    Attributes:
      name: there.
      shapes: the one it is written with, then others that it may be found with.
      parts: names here, of unstacked layers.
      join: the parts' arrays, in their order and of their shapes, to the array there.
      split: an array of any of `shapes` to the parts' arrays. Neither rounds or changes a dtype.
    """

    name: str
    shapes: tuple[Shape, ...]
    parts: tuple[str, ...]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray], list[np.ndarray]]


def layer_names(name: str, depth: int) -> list[str]:
    """Names of the layers' own parameters that a stacked one, [depth, ...], is taken apart into."""
    before, _, after = name.partition(_STACK)
    return [f"{before}/encoder/layers_{i}/{after}" for i in range(depth)]


def is_stacked(name: str) -> bool:
    """Whether a parameter holds all of an encoder's layers, as scanned ones do."""
    return _STACK in name


def unstacked(shapes: Shapes) -> dict[str, Shape]:
    """The same parameters with every layer's on their own, under names such as 'layers_0'.

    Args:
      shapes: by name; those of scanned encoders begin with the depth.
    """
    apart: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if is_stacked(name):
            apart.update({layer: tuple(shape[1:]) for layer in layer_names(name, shape[0])})
        else:
            apart[name] = tuple(shape)
    return apart


def clipa(shapes: Shapes) -> list[Tensor]:
    """CLIPA's layout, of its released `.npz` files; names without a 'params/' before them.

    Found are, too, the kernels and biases of its partitioned trainer, in which heads are joined.

    Args:
      shapes: of unstacked parameters; no fixed tables, which it does not store.

    Raises:
      UserError: it has no place for a parameter; names the option that made it.
    """
    return [_clipa_tensor(name, shape) for name, shape in shapes.items()]


def open_clip(shapes: Shapes) -> list[Tensor]:
    """OpenCLIP's layout: the state dict of its `CLIP` with its own vision transformer.

    Args:
      shapes: of unstacked parameters, and of the position tables, fixed ones included.

    Raises:
      UserError: it has no place for a parameter, or lacks one; names the option of it.
    """
    for name in _OPEN_CLIP:
        optional = "pre_norm" in name or name == LOGIT_BIAS
        if name not in shapes and not optional:
            raise _no_place("OpenCLIP", f"a model without {name}", name)
    tensors = []
    for name, shape in shapes.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            tensors.append(_open_clip_outside_blocks(name, shape))
        elif "/key/" not in name and "/value/" not in name:
            tensors.append(_open_clip_in_block(name, shape, *block.groups()))
    return tensors


# Names of what is in no block; {} is 'img' or 'txt' of CLIPA.
_CLIPA = {
    LOGIT_SCALE: "t",
    "image_tower/class_token": "img/cls",
    "image_tower/patch_embedding/kernel": "img/embedding/kernel",
    "text_tower/token_embedding/embedding": "txt/Embed_0/embedding",
    **{
        f"{here}/{name}": f"{there}/{theirs}"
        for here, there in (("image_tower", "img"), ("text_tower", "txt"))
        for name, theirs in (
            ("position_embedding", "pos_embedding"),
            ("encoder_norm/scale", "encoder_norm/scale"),
            ("encoder_norm/bias", "encoder_norm/bias"),
            ("head/kernel", "head/kernel"),
        )
    },
}
_CLIPA_BLOCK = {
    "norm1": "LayerNorm_0",
    "norm2": "LayerNorm_1",
    "attention": "MultiHeadDotProductAttention_0",
    "mlp/fc1": "MlpBlock_0/Dense_0",
    "mlp/fc2": "MlpBlock_0/Dense_1",
}
_OPEN_CLIP = {
    LOGIT_SCALE: "logit_scale",
    LOGIT_BIAS: "logit_bias",
    "image_tower/class_token": "visual.class_embedding",
    "image_tower/patch_embedding/kernel": "visual.conv1.weight",
    IMAGE_POSITIONS: "visual.positional_embedding",
    "image_tower/pre_norm/scale": "visual.ln_pre.weight",
    "image_tower/pre_norm/bias": "visual.ln_pre.bias",
    "image_tower/encoder_norm/scale": "visual.ln_post.weight",
    "image_tower/encoder_norm/bias": "visual.ln_post.bias",
    "image_tower/head/kernel": "visual.proj",
    "text_tower/token_embedding/embedding": "token_embedding.weight",
    TEXT_POSITIONS: "positional_embedding",
    "text_tower/encoder_norm/scale": "ln_final.weight",
    "text_tower/encoder_norm/bias": "ln_final.bias",
    "text_tower/head/kernel": "text_projection",
}
_OPEN_CLIP_STEM = {"image_tower": "visual.transformer", "text_tower": "transformer"}
_OPEN_CLIP_BLOCK = {
    "norm1/scale": "ln_1.weight",
    "norm1/bias": "ln_1.bias",
    "norm2/scale": "ln_2.weight",
    "norm2/bias": "ln_2.bias",
    "attention/query/kernel": "attn.in_proj_weight",
    "attention/query/bias": "attn.in_proj_bias",
    "attention/out/kernel": "attn.out_proj.weight",
    "attention/out/bias": "attn.out_proj.bias",
    "mlp/fc1/kernel": "mlp.c_fc.weight",
    "mlp/fc1/bias": "mlp.c_fc.bias",
    "mlp/fc2/kernel": "mlp.c_proj.weight",
    "mlp/fc2/bias": "mlp.c_proj.bias",
}

# What to tell of parameters that a layout has no place for, or lacks: a part of their names, and
# the option.
_OPTIONS = {
    "pre_norm": "VisionTransformer.pre_norm",
    "attention_pooling": "VisionTransformer.pooling='map'",
    "image_tower/encoder_norm": "VisionTransformer.pooling",
    "image_tower/head": "VisionTransformer.out_dim",
    "text_tower/head": "TextTransformer.out_dim",
    LOGIT_BIAS: "INIT_LOGIT_BIAS",
}


def _no_place(layout: str, what: str, name: str) -> UserError:
    option = next((option for part, option in _OPTIONS.items() if part in name), "its tower")
    return UserError(
        f"{layout}'s layout has no place for {what}, which comes of {option}: use a model without "
        "it, or this package's own checkpoints."
    )


def _clipa_tensor(name: str, shape: Shape) -> Tensor:
    block = _BLOCK.fullmatch(name)
    if block is None:
        if name not in _CLIPA:
            raise _no_place("CLIPA", name, name)
        there = _CLIPA[name]
        if there == "t":
            return _reshaped(there, name, shape, (1,), ())
        if there == "img/cls":
            return _reshaped(there, name, shape, (1, 1, *shape))
        is_table = there.endswith("/pos_embedding")
        return _reshaped(there, name, shape, (1, *shape) if is_table else shape)
    tower, index, rest = block.groups()
    part, _, last = rest.rpartition("/")
    module = next((m for m in _CLIPA_BLOCK if part == m or part.startswith(f"{m}/")), None)
    if module is None:
        raise _no_place("CLIPA", name, name)
    stem = f"{'img' if tower == 'image_tower' else 'txt'}/Transformer/encoderblock_{index}"
    there = f"{stem}/{_CLIPA_BLOCK[module]}{part.removeprefix(module)}/{last}"
    joined: dict[str, Shape] = {}  # Where the partitioned trainer joins heads.
    if any(f"attention/{each}/" in rest for each in _QKV):
        joined = {"kernel": (shape[0], math.prod(shape[1:])), "bias": (math.prod(shape),)}
    elif "attention/out/" in rest:
        joined = {"kernel": (math.prod(shape[:-1]), shape[-1])}
    return _reshaped(there, name, shape, shape, *([joined[last]] if last in joined else []))


def _open_clip_outside_blocks(name: str, shape: Shape) -> Tensor:
    if name not in _OPEN_CLIP:
        raise _no_place("OpenCLIP", name, name)
    there = _OPEN_CLIP[name]
    if there == "visual.conv1.weight":
        rows, columns, channels, width = shape
        return Tensor(
            there,
            ((width, channels, rows, columns),),
            (name,),
            lambda arrays: _contiguous(arrays[0].transpose(3, 2, 0, 1)),
            lambda array: [_contiguous(array.transpose(2, 3, 1, 0))],
        )
    scalar = name in (LOGIT_SCALE, LOGIT_BIAS)
    return _reshaped(there, name, shape, shape, *([(1,)] if scalar else []))


def _open_clip_in_block(name: str, shape: Shape, tower: str, index: str, rest: str) -> Tensor:
    if rest not in _OPEN_CLIP_BLOCK:
        raise _no_place("OpenCLIP", name, name)
    there = f"{_OPEN_CLIP_STEM[tower]}.resblocks.{index}.{_OPEN_CLIP_BLOCK[rest]}"
    if "/query/" in name:
        parts = tuple(name.replace("/query/", f"/{each}/") for each in _QKV)
    else:
        parts = (name,)
    if rest.endswith("/kernel"):
        return _transposed(there, parts, shape, num_inputs=2 if "/out/" in name else 1)
    return _concatenated(there, parts, shape)


def _reshaped(there: str, here: str, shape: Shape, *shapes: Shape) -> Tensor:
    """The same numbers in the same order."""
    return Tensor(
        there,
        shapes,
        (here,),
        lambda arrays: _contiguous(arrays[0]).reshape(shapes[0]),
        lambda array: [_contiguous(array).reshape(shape)],
    )


def _concatenated(there: str, parts: tuple[str, ...], shape: Shape) -> Tensor:
    """Flat vectors, one after the other."""
    return Tensor(
        there,
        ((len(parts) * math.prod(shape),),),
        parts,
        lambda arrays: np.concatenate([array.reshape(-1) for array in arrays]),
        lambda array: [_contiguous(each).reshape(shape) for each in np.split(array, len(parts))],
    )


def _transposed(there: str, parts: tuple[str, ...], shape: Shape, num_inputs: int) -> Tensor:
    """Matrices [out, in], one below the other, of kernels here [in ..., out ...].

    Args:
      there: its name.
      parts: names of the kernels.
      shape: of each.
      num_inputs: how many of its dimensions are inputs.
    """
    inputs, outputs = math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])

    def join(arrays: Sequence[np.ndarray]) -> np.ndarray:
        joined = np.empty((len(parts), outputs, inputs), arrays[0].dtype)
        for i, array in enumerate(arrays):
            joined[i] = array.reshape(inputs, outputs).T
        return joined.reshape(-1, inputs)

    return Tensor(
        there,
        ((len(parts) * outputs, inputs),),
        parts,
        join,
        lambda array: [_contiguous(a.T).reshape(shape) for a in np.split(array, len(parts))],
    )


def _contiguous(array: np.ndarray) -> np.ndarray:
    """In C's order; a scalar stays one."""
    return np.asarray(array, order="C")
