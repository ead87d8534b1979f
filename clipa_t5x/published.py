"""What has been published of CLIPA's runs: models, recipes, accuracies, hours, cost.

Where a source states no mask or text length, what its other tables and the code's configurations
use is put in. Training FLOPs follow from sizes and tokens (`flops`), never from hours.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from clipa_t5x import flops, models
from clipa_t5x.towers import text_transformer, vision_transformer

# What the points name as their sources.
SOURCES = {
    "v1": "An Inverse Scaling Law for CLIP Training (Li et al., 2023), main results",
    "v1 figure": "the same, figure of accuracy against compute, read off the drawing",
    "v2": "CLIPA-v2 (Li et al., 2023), main results, and the table in its code's README",
    "v2 table 1": "the same paper, table 1",
}

# Of an A100-80G for an hour, in US dollars: what CLIPA-v2's costs are reckoned with.
A100_80G_PRICE = 1.575

# Image tower and text tower as (width, depth, MLP, heads), then joint embedding and patch. The
# text towers of H/14 and bigG/14 are those of the released weights.
_SIZES = {
    "S/16": ((384, 12, 1536, 6), (384, 12, 1536, 6), 384, 16),
    "B/16": ((768, 12, 3072, 12), (512, 12, 2048, 8), 512, 16),
    "L/16": ((1024, 24, 4096, 16), (768, 12, 3072, 12), 768, 16),
    "L/14": ((1024, 24, 4096, 16), (768, 12, 3072, 12), 768, 14),
    "H/14": ((1280, 32, 5120, 16), (1024, 24, 4096, 16), 1024, 14),
    "bigG/14": ((1664, 48, 8192, 16), (1280, 32, 5120, 20), 1280, 14),
}
MODELS = tuple(_SIZES)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a recipe: samples, side of the image in pixels, text tokens, share masked."""

    samples: int
    pixels: int
    text_length: int
    mask_ratio: float = 0.0


@dataclasses.dataclass(frozen=True)
class Point:
    """A trained model, at the end of its last stage.

    Attributes:
      model: a name in `MODELS`.
      data: the data set.
      recipe: the stages in words.
      stages: what was trained.
      accuracy: zero-shot top-1 on ImageNet-1k, in percent.
      source: a key of `SOURCES`.
      hours: A100-80G hours that the source lists for all stages.
      dollars: the cost that it lists.
      listed_compute: forward multiply-adds of all samples, in 1e20, where the source draws them.
      schedule: the schedule in gin/ whose first stages these are, without its ending.
    """

    model: str
    data: str
    recipe: str
    stages: tuple[Stage, ...]
    accuracy: float
    source: str
    hours: int | None = None
    dollars: int | None = None
    listed_compute: float | None = None
    schedule: str | None = None

    def __str__(self) -> str:
        """Its recipe, and where gin/ has it."""
        here = f", gin/{self.schedule}.gin to stage {len(self.stages)}" if self.schedule else ""
        return self.recipe + here

    @property
    def training_flops(self) -> int:
        """FLOPs of the whole training, forward and backward, from sizes and tokens."""
        return sum(stage_flops(self.model, stage) for stage in self.stages)


@functools.cache
def clip_model(name: str, mask_ratio: float = 0.0) -> models.ClipModel:
    """The model of that published name; `mask_ratio` is its random mask's in training."""
    image, text, joint, patch = _SIZES[name]
    names = ("width", "depth", "mlp_dim", "num_heads")
    return models.ClipModel(
        image_tower=vision_transformer.VisionTransformer(
            **dict(zip(names, image, strict=True)),
            out_dim=joint,
            patch_size=patch,
            mask_ratio=mask_ratio,
        ),
        text_tower=text_transformer.TextTransformer(
            **dict(zip(names, text, strict=True)), out_dim=joint
        ),
    )


def stage_flops(model: str, stage: Stage) -> int:
    """Training FLOPs of all samples of a stage."""
    forward = flops.forward_flops(
        clip_model(model, stage.mask_ratio), stage.pixels, stage.text_length
    )
    return forward.training * stage.samples


def name_of(model: models.ClipModel) -> str | None:
    """The published name of a model with these towers' sizes, or None."""

    def sizes(tower):
        return tower.width, tower.depth, tower.mlp_dim, tower.num_heads

    try:
        image, text = model.image_tower, model.text_tower
        key = (sizes(image), sizes(text), image.out_dim, image.patch_size)
    except AttributeError:  # towers of other kinds
        return None
    return next((name for name in _SIZES if _SIZES[name] == key), None)


def name_by_sizes(sizes: Mapping[str, Any]) -> str | None:
    """The published name of a model by its towers' parameters, as configurations name them.

    Args:
      sizes: 'vision_transformer.VisionTransformer.width' and so on to a number.

    Returns:
      The name, or None where a size is missing or another.
    """
    wanted = ("width", "depth", "mlp_dim", "num_heads", "out_dim", "patch_size")
    for name in _SIZES:
        model = clip_model(name)
        if all(
            sizes.get(f"{kind}.{size}") == getattr(tower, size)
            for kind, tower in (
                ("vision_transformer.VisionTransformer", model.image_tower),
                ("text_transformer.TextTransformer", model.text_tower),
            )
            for size in wanted
            if hasattr(tower, size)
        ):
            return name
    return None


@functools.cache
def num_params(name: str) -> int:
    """Parameters of a published model at 224 pixels and 32 tokens; none is allocated."""
    batch = {
        "images": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((1, 32), jnp.int32),
    }
    model = clip_model(name)
    params = jax.eval_shape(lambda b: models.init_params(model, jax.random.key(0), b), batch)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


# 12.8 billion, 512 and 128 million samples, as whole batches count them.
_PRETRAIN_84 = Stage(12_811_632_640, 84, 8)
_PRETRAIN_70 = Stage(12_811_632_640, 70, 8)
_TUNE_336 = Stage(131_072_000, 336, 32, 0.4)
_TUNE_V1 = Stage(131_072_000, 224, 32)
_TUNE_V1_16_TOKENS = Stage(131_072_000, 224, 16)


def _tune_224(mask_ratio: float) -> Stage:
    return Stage(524_288_000, 224, 32, mask_ratio)


def _v2(
    model: str,
    data: str,
    accuracies: tuple[float | None, ...],
    hours_and_dollars: tuple[tuple[int, int] | None, ...],
    schedule: str,
    pretrain: Stage = _PRETRAIN_84,
    mask_ratio: float = 0.3,
) -> list[Point]:
    """Points after each stage of a CLIPA-v2 recipe; None for what was not published."""
    stages = (pretrain, _tune_224(mask_ratio), _TUNE_336)
    words = (f"12.8B@{pretrain.pixels}", "512M@224", "128M@336")
    listed = (None, *hours_and_dollars)
    return [
        Point(
            model,
            data,
            " + ".join(words[: number + 1]),
            stages[: number + 1],
            accuracy,
            "v2",
            *(listed[number] or (None, None)),
            schedule=schedule,
        )
        for number, accuracy in enumerate(accuracies)
        if accuracy is not None
    ]


def _v1(
    model: str,
    accuracy: float,
    pixels: int,
    text_length: int,
    source: str,
    listed_compute: float | None = None,
    schedule: str | None = None,
    tuning: Stage = _TUNE_V1,
) -> Point:
    """A point of the first paper's recipe: 2.56 billion samples, then 131 million untouched ones.

    At 224 pixels nothing is reduced, and no tuning follows.
    """
    pretrain = Stage(2_560_000_000, pixels, text_length)
    stages = (pretrain,) if pixels == 224 else (pretrain, tuning)
    recipe = f"2.56B@{pixels}/{text_length}" + (" + 128M@224" if len(stages) > 1 else "")
    return Point(
        model,
        "LAION-400M",
        recipe,
        stages,
        accuracy,
        source,
        listed_compute=listed_compute,
        schedule=schedule,
    )


_FIGURE_PIXELS = (64, 96, 112, 160, 224)
_FIGURE = {
    "S/16": ((0.033, 50.6), (0.044, 53.9), (0.051, 54.7), (0.081, 56.1), (0.131, 56.7)),
    "B/16": ((0.092, 59.9), (0.135, 62.1), (0.163, 62.8), (0.275, 63.6), (0.469, 64.1)),
    "L/16": ((0.282, 66.2), (0.433, 68.1), (0.533, 68.9), (0.927, 69.0), (1.602, 69.2)),
}
_FIGURE_SCHEDULES = {
    ("S/16", 64): "S16_64",
    ("S/16", 112): "S16_112",
    ("B/16", 64): "B16_64",
    ("B/16", 112): "B16_112",
    ("B/16", 160): "B16_160",
}
_FIGURE_H14 = ((56, 0.560, 70.2), (70, 0.702, 71.8), (84, 0.876, 72.8))

POINTS: tuple[Point, ...] = (
    *_v2(
        "H/14", "LAION-2B", (72.1, 78.6, 79.1), ((7776, 12247), (8640, 13616)), "H14_laion2b"
    ),
    *_v2("L/14", "DataComp-1B", (72.7, 79.7, 80.3), ((4008, 6318), (4520, 7124)), "L14"),
    *_v2(
        "H/14", "DataComp-1B", (None, 81.1, None), ((5920, 9324), None), "H14_70", _PRETRAIN_70
    ),
    *_v2("H/14", "DataComp-1B", (75.6, 81.5, 81.8), ((7776, 12247), (8640, 13616)), "H14"),
    *_v2(
        "bigG/14", "DataComp-1B", (78.5, 82.5, 83.0), ((21998, 34646), (23742, 39056)), "bigG14",
        mask_ratio=0.4,
    ),
    *_v2("H/14", "LAION-2B", (70.1, None, None), (), "H14_laion2b_70", _PRETRAIN_70),
    Point(
        "H/14", "LAION-2B", "12.8B@84 + 128M@224", (_PRETRAIN_84, _TUNE_V1), 77.9, "v2 table 1"
    ),
    Point(
        "H/14", "LAION-2B", "2.56B@84 + 128M@224", (Stage(2_560_000_000, 84, 8), _TUNE_V1), 74.1,
        "v2 table 1",
    ),
    _v1("B/16", 63.2, 112, 16, "v1", schedule="B16_i50_t16", tuning=_TUNE_V1_16_TOKENS),
    _v1("L/16", 67.8, 64, 16, "v1", schedule="L16_i17_t16", tuning=_TUNE_V1_16_TOKENS),
    _v1("L/16", 69.3, 96, 8, "v1", schedule="L16_i37_t8"),
    *(
        _v1(
            model, accuracy, pixels, 32, "v1 figure", compute,
            _FIGURE_SCHEDULES.get((model, pixels)),
        )
        for model, series in _FIGURE.items()
        for pixels, (compute, accuracy) in zip(_FIGURE_PIXELS, series, strict=True)
    ),
    *(
        _v1("H/14", accuracy, pixels, 8, "v1 figure", compute)
        for pixels, compute, accuracy in _FIGURE_H14
    ),
)  # fmt: skip
