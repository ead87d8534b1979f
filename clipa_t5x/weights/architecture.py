"""Which options a model was built with, read off the names and shapes of its parameters.

Whether they are here or in another trainer's layout: a file of another model can then be refused by
the option that differs, rather than by a thousand shapes.
"""

import re
from collections.abc import Mapping
from typing import Any

from clipa_t5x.weights import layouts
from clipa_t5x.weights.layouts import Shape, Shapes

OURS, CLIPA, OPEN_CLIP = "this package's", "CLIPA's", "OpenCLIP's"

IMAGE_LENGTH = "the number of image positions"
TEXT_LENGTH = "TASK_FEATURE_LENGTHS['text']"

# By layout: the option, and the parameter and dimension that tell.
_SIZES: Mapping[str, Mapping[str, tuple[str, int]]] = {
    OURS: {
        "VisionTransformer.width": ("image_tower/patch_embedding/kernel", 3),
        "VisionTransformer.patch_size": ("image_tower/patch_embedding/kernel", 0),
        "VisionTransformer.mlp_dim": ("image_tower/encoder/layers_0/mlp/fc1/bias", 0),
        "VisionTransformer.num_heads": ("image_tower/encoder/layers_0/attention/query/bias", -2),
        "VisionTransformer.out_dim": ("image_tower/head/kernel", 1),
        IMAGE_LENGTH: ("image_tower/position_embedding", -2),
        "TextTransformer.width": ("text_tower/token_embedding/embedding", 1),
        "TextTransformer.vocab_size": ("text_tower/token_embedding/embedding", 0),
        "TextTransformer.mlp_dim": ("text_tower/encoder/layers_0/mlp/fc1/bias", 0),
        "TextTransformer.num_heads": ("text_tower/encoder/layers_0/attention/query/bias", -2),
        "TextTransformer.out_dim": ("text_tower/head/kernel", 1),
        TEXT_LENGTH: ("text_tower/position_embedding", -2),
    },
    CLIPA: {
        "VisionTransformer.width": ("img/embedding/kernel", 3),
        "VisionTransformer.patch_size": ("img/embedding/kernel", 0),
        "VisionTransformer.mlp_dim": ("img/{block}0/MlpBlock_0/Dense_0/bias", 0),
        "VisionTransformer.num_heads": ("img/{block}0/{attention}/query/bias", -2),
        "VisionTransformer.out_dim": ("img/head/kernel", 1),
        IMAGE_LENGTH: ("img/pos_embedding", -2),
        "TextTransformer.width": ("txt/Embed_0/embedding", 1),
        "TextTransformer.vocab_size": ("txt/Embed_0/embedding", 0),
        "TextTransformer.mlp_dim": ("txt/{block}0/MlpBlock_0/Dense_0/bias", 0),
        "TextTransformer.num_heads": ("txt/{block}0/{attention}/query/bias", -2),
        "TextTransformer.out_dim": ("txt/head/kernel", 1),
        TEXT_LENGTH: ("txt/pos_embedding", -2),
    },
    OPEN_CLIP: {
        "VisionTransformer.width": ("visual.conv1.weight", 0),
        "VisionTransformer.patch_size": ("visual.conv1.weight", 2),
        "VisionTransformer.mlp_dim": ("visual.transformer.resblocks.0.mlp.c_fc.bias", 0),
        "VisionTransformer.out_dim": ("visual.proj", 1),
        IMAGE_LENGTH: ("visual.positional_embedding", -2),
        "TextTransformer.width": ("token_embedding.weight", 1),
        "TextTransformer.vocab_size": ("token_embedding.weight", 0),
        "TextTransformer.mlp_dim": ("transformer.resblocks.0.mlp.c_fc.bias", 0),
        "TextTransformer.out_dim": ("text_projection", 1),
        TEXT_LENGTH: ("positional_embedding", -2),
    },
}
_CLIPA_PARTS = {
    "block": "Transformer/encoderblock_",
    "attention": "MultiHeadDotProductAttention_0",
}
_BLOCKS = {
    OURS: ("image_tower/encoder/layers_", "text_tower/encoder/layers_"),
    CLIPA: ("img/Transformer/encoderblock_", "txt/Transformer/encoderblock_"),
    OPEN_CLIP: ("visual.transformer.resblocks.", "transformer.resblocks."),
}
# Options that are a parameter's being there; (option, beginning of its name, what that means).
_PRESENT = {
    OURS: (
        ("VisionTransformer.pre_norm", "image_tower/pre_norm/", (True, False)),
        ("INIT_LOGIT_BIAS", "logit_bias", ("set", None)),
        ("VisionTransformer.pooling", "image_tower/attention_pooling/", ("map", "another")),
    ),
    CLIPA: (
        ("VisionTransformer.pre_norm", "img/pre_norm/", (True, False)),
        ("VisionTransformer.pooling", "img/MAPHead_0/", ("map", "another")),
    ),
    OPEN_CLIP: (
        ("VisionTransformer.pre_norm", "visual.ln_pre.", (True, False)),
        ("INIT_LOGIT_BIAS", "logit_bias", ("set", None)),
        ("VisionTransformer.pooling", "visual.attn_pool.", ("attentional", "another")),
    ),
}
# Where a fixed table is not stored, whether there is one tells whether it is learned.
_TABLES = {
    OURS: ("image_tower/position_embedding", "text_tower/position_embedding"),
    CLIPA: ("img/pos_embedding", "txt/pos_embedding"),
}
_TOWERS = ("VisionTransformer", "TextTransformer")


def layout_of(names: Mapping[str, Any]) -> str | None:
    """OURS, CLIPA or OPEN_CLIP by the names of parameters; None where they are of no such layout.

    OpenCLIP's are expected flat, without the 'text.' of its other class.
    """
    starts = {
        OURS: ("image_tower/", "text_tower/"),
        CLIPA: ("img/", "txt/"),
        OPEN_CLIP: ("visual.", "transformer.resblocks.", "token_embedding."),
    }
    for layout, prefixes in starts.items():
        if any(name.startswith(prefixes) for name in names):
            return layout
    return None


def options(shapes: Shapes) -> dict[str, Any]:
    """Options that the parameters tell, such as {'VisionTransformer.width': 1024}.

    Args:
      shapes: by name, of any layout that `layout_of` knows.

    Returns:
      Nothing where the layout is unknown; of a damaged or foreign model, what can be told.
    """
    layout = layout_of(shapes)
    if layout is None:
        return {}
    found: dict[str, Any] = {}
    depths: dict[str, int] = {}
    if layout == OURS:
        found["scan_layers"] = any(map(layouts.is_stacked, shapes))
        shapes, depths = _first_layers(shapes)
    for option, (name, dimension) in _SIZES[layout].items():
        shape = shapes.get(name.format(**_CLIPA_PARTS), ())
        if -len(shape) <= dimension < len(shape):
            found[option] = shape[dimension]
    for tower, start in zip(_TOWERS, _BLOCKS[layout], strict=True):
        indices = {m[1] for m in (re.match(rf"{re.escape(start)}(\d+)\b", k) for k in shapes) if m}
        found[f"{tower}.depth"] = depths.get(start, len(indices))
    for option, start, (there, absent) in _PRESENT[layout]:
        found[option] = there if any(name.startswith(start) for name in shapes) else absent
    for tower, table in zip(_TOWERS, _TABLES.get(layout, ()), strict=layout != OPEN_CLIP):
        found[f"{tower}.position_embedding"] = "learned" if table in shapes else "fixed"
    return found


def _first_layers(shapes: Shapes) -> tuple[dict[str, Shape], dict[str, int]]:
    """(shapes with the first layer's in the place of all layers', depths by the layers' name).

    A file may state any depth, which must cost nothing.
    """
    apart: dict[str, Shape] = {}
    depths: dict[str, int] = {}
    for name, shape in shapes.items():
        if layouts.is_stacked(name) and shape:
            (first,) = layouts.layer_names(name, 1)
            apart[first] = shape[1:]
            depths[f"{first.partition('/encoder/')[0]}/encoder/layers_"] = shape[0]
        else:
            apart[name] = shape
    return apart, depths


def compare(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Options that are known on both sides and differ, in words; '' where none is."""
    return ", ".join(
        f"{option} is {there[option]} there and {value} here"
        for option, value in here.items()
        if option in there and there[option] != value
    )
