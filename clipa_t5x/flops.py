"""FLOPs of a model from its sizes and token counts alone: nothing is traced or compiled.

Counted are the multiply-adds of matrix products, two FLOPs each, as papers and OpenCLIP's table do:

* a block at length n, width W, MLP M: projections 8 n W^2, attention 4 n^2 W, MLP 4 n W M;
* patch embedding 2 N (3 p^2) W, over all N patches: masking comes after it;
* head 2 W D, for the one pooled position.

Left out are norms, activations, softmaxes and the loss (its logits are 2 B D a sample: 0.1 % of
bigG/14's at a batch of 65,536). Training takes three times the forward pass, the backward pass
being two products for each of the forward's; what remat computes again is no model FLOP.
"""

import dataclasses
from typing import Any

from clipa_t5x import models
from clipa_t5x.errors import UserError
from clipa_t5x.towers import text_transformer, token_reduction, vision_transformer

# Forward and backward, in forward passes.
TRAINING_FACTOR = 3

_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one sample's forward pass.

    Attributes:
      image, text: of each tower.
      image_tokens, text_tokens: sequence lengths in the towers, class token and masking included.
    """

    image: int
    text: int
    image_tokens: int
    text_tokens: int

    @property
    def training(self) -> int:
        """FLOPs of one sample's share of a training step."""
        return TRAINING_FACTOR * (self.image + self.text)


def forward_flops(
    model: models.ClipModel, pixels: int, text_length: int, *, train: bool = True
) -> ForwardFlops:
    """FLOPs of one sample's forward pass, with the loss left out.

    Args:
      model: with the built-in towers.
      pixels: side of the square image.
      text_length: tokens of a text.
      train: whether patches are masked, as in training.

    Raises:
      UserError: a tower of another kind, or sizes that fit no token.
    """
    return ForwardFlops(
        image=image_tower_flops(model.image_tower, pixels, train=train),
        text=text_tower_flops(model.text_tower, text_length),
        image_tokens=image_tokens(model.image_tower, pixels, train=train),
        text_tokens=text_length,
    )


def encoder_flops(length: int, *, width: int, depth: int, mlp_dim: int) -> int:
    """FLOPs of one sequence through `depth` blocks; the number of heads does not matter."""
    projections = 8 * length * width**2
    attention = 4 * length**2 * width
    mlp = 4 * length * width * mlp_dim
    return depth * (projections + attention + mlp)


def image_tokens(
    tower: vision_transformer.VisionTransformer, pixels: int, *, train: bool = True
) -> int:
    """Sequence length in the image tower: the class token and the patches that are kept.

    Raises:
      UserError: the image is smaller than a patch, or the mask keeps none.
    """
    _check_kind(tower, vision_transformer.VisionTransformer)
    grid = vision_transformer.patch_grid(pixels, pixels, tower.patch_size)
    ratio = tower.mask_ratio if train else 0.0
    return 1 + token_reduction.num_kept(grid, ratio, tower.mask_strategy)


def image_tower_flops(
    tower: vision_transformer.VisionTransformer, pixels: int, *, train: bool = True
) -> int:
    """FLOPs of one image's forward pass; see `forward_flops`."""
    length = image_tokens(tower, pixels, train=train)
    rows, columns = vision_transformer.patch_grid(pixels, pixels, tower.patch_size)
    patches = 2 * rows * columns * _CHANNELS * tower.patch_size**2 * tower.width
    blocks = encoder_flops(length, width=tower.width, depth=tower.depth, mlp_dim=tower.mlp_dim)
    pooling = _attention_pooling_flops(tower, length) if tower.pooling == "map" else 0
    return patches + blocks + pooling + _head_flops(tower)


def text_tower_flops(tower: text_transformer.TextTransformer, length: int) -> int:
    """FLOPs of one text's forward pass; a look-up of embeddings costs none.

    Raises:
      UserError: a tower of another kind.
    """
    _check_kind(tower, text_transformer.TextTransformer)
    blocks = encoder_flops(length, width=tower.width, depth=tower.depth, mlp_dim=tower.mlp_dim)
    return blocks + _head_flops(tower)


def _attention_pooling_flops(tower: vision_transformer.VisionTransformer, length: int) -> int:
    """One query attends to `length` tokens, then an MLP of one position."""
    width = tower.width
    projections = 4 * width**2 + 4 * length * width**2
    return projections + 4 * length * width + 4 * width * tower.mlp_dim


def _head_flops(tower: Any) -> int:
    return 2 * tower.width * (tower.out_dim or 0)


def _check_kind(tower: Any, kind: type) -> None:
    if not isinstance(tower, kind):
        raise UserError(
            f"FLOPs of a {type(tower).__name__} are not known: only those of {kind.__name__} are."
        )
