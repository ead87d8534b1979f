"""The image tower: a Vision Transformer (Dosovitskiy et al., 2021) as CLIPA trains it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging
from flax.linen import spmd

from clipa_t5x.errors import UserError, check_number
from clipa_t5x.towers import batch_part, layers, position_embeddings, token_reduction


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of whole patches in an image; what is left over is dropped.

    Raises:
      UserError: the image is smaller than one patch, or the patch has no size.
    """
    check_number("PATCH_SIZE", patch_size, minimum=1, whole=True)
    grid = height // patch_size, width // patch_size
    if 0 in grid:
        raise UserError(
            f"image size {height} x {width} is smaller than one patch of {patch_size} pixels."
        )
    if height % patch_size or width % patch_size:
        logging.warning(
            "image size %d x %d is not a multiple of the patch size %d: the last %d rows and %d "
            "columns of pixels are dropped.",
            height, width, patch_size, height % patch_size, width % patch_size,
        )  # fmt: skip
    return grid


class PatchEmbedding(nn.Module):
    """Cuts an image into square patches and projects each, without bias.

    The kernel has a convolution's shape, [patch, patch, channels, width].
    """

    width: int
    patch_size: int
    dtype: layers.DTypeLike

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to [batch, rows, columns, width]."""
        batch, height, width, channels = images.shape
        p = self.patch_size
        rows, columns = patch_grid(height, width, p)
        kernel = self.param(
            "kernel",
            layers.partitioned(nn.initializers.lecun_normal(), None, None, None, "embed"),
            (p, p, channels, self.width),
        )
        # A product of unfolded patches is the stride-p convolution, and faster than it on CPUs.
        patches = images[:, : rows * p, : columns * p].reshape(batch, rows, p, columns, p, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)
        return patches.astype(self.dtype) @ kernel.reshape(-1, self.width).astype(self.dtype)


class AttentionPooling(nn.Module):
    """Pools tokens by a learned probe that attends to them (Zhai et al., 2022), then an MLP."""

    num_heads: int
    mlp_dim: int
    activation: str
    layer_norm_epsilon: float
    dtype: layers.DTypeLike

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps [batch, length, width] to [batch, width]."""
        batch, _, width = tokens.shape
        inits = layers.kernel_inits("xavier_uniform", width, 1)
        probe = self.param(
            "probe",
            layers.partitioned(nn.initializers.xavier_uniform(), None, None, "embed"),
            (1, 1, width),
        )
        probe = jnp.broadcast_to(probe.astype(self.dtype), (batch, 1, width))
        attention = layers.MultiHeadAttention(self.num_heads, self.dtype, inits, name="attention")
        x = attention(probe, tokens)
        norm = layers.layer_norm(epsilon=self.layer_norm_epsilon, dtype=self.dtype, name="norm")
        mlp = layers.Mlp(self.mlp_dim, self.activation, self.dtype, inits, name="mlp")
        return (x + mlp(norm(x)))[:, 0]


class VisionTransformer(nn.Module):
    """Images to embeddings.

    Attributes:
      width, depth, mlp_dim, num_heads: the transformer's sizes (spec of each variant: gin/models).
      patch_size: side of a square patch, in pixels.
      out_dim: size of the joint embedding; None leaves out the projection.
      position_embedding: 'sincos2d' (fixed, recomputed for every grid) or 'learned' (for the grid
        of the first call).
      pooling: 'gap' (mean of the patch tokens, then LayerNorm), 'tok' (LayerNorm, then the class
        token), 'map' (attention pooling), 'none' (the class token without a norm).
      mask_ratio: share of the patches dropped in training; never in evaluation.
      mask_strategy: 'random', 'grid' or 'block', see `token_reduction.mask`.
      pre_norm: whether tokens are normalised before the first block, too, as in OpenAI's CLIP.
      activation: 'gelu_tanh', 'gelu_exact' or 'gelu_quick' (OpenAI's x sigmoid(1.702 x)).
      layer_norm_epsilon: added to the variance.
      drop_path_rate, scan_layers, remat_policy, init_style, init_depth: see `layers.Encoder`.
      dtype: computation dtype; parameters are float32.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    out_dim: int | None
    position_embedding: str = "sincos2d"
    pooling: str = "gap"
    mask_ratio: float = 0.0
    mask_strategy: str = "random"
    pre_norm: bool = False
    activation: str = "gelu_tanh"
    layer_norm_epsilon: float = 1e-6
    drop_path_rate: float = 0.0
    scan_layers: bool = True
    remat_policy: str = "none"
    dtype: layers.DTypeLike = "float32"
    init_style: str = "width_scaled"
    init_depth: int = 12

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        part: batch_part.BatchPart = batch_part.WHOLE,
    ) -> jax.Array:
        """Embeds images.

        Args:
          images: float [batch, height, width, 3], already normalised.
          train: whether patches are masked ('patch_mask' stream) and paths dropped.
          part: which part of the batch this is.

        Returns:
          [batch, out_dim] (or [batch, width] without projection), of `dtype`, not normalised.
        """
        x = PatchEmbedding(self.width, self.patch_size, self.dtype, name="patch_embedding")(images)
        batch, rows, columns, _ = x.shape
        class_token = self.param(
            "class_token", layers.partitioned(nn.initializers.zeros, "embed"), (self.width,)
        )
        positions = self._position_table(rows, columns).astype(self.dtype)
        patches = x + positions[1:].reshape(rows, columns, self.width)
        token_reduction.num_kept((rows, columns), self.mask_ratio, self.mask_strategy)
        if train and self.mask_ratio > 0:
            patches = token_reduction.mask(
                self.make_rng("patch_mask"), patches, self.mask_ratio, self.mask_strategy, part
            )
        patches = patches.reshape(batch, -1, self.width)
        first = jnp.broadcast_to(
            class_token.astype(self.dtype) + positions[0], (batch, 1, self.width)
        )
        x = jnp.concatenate([first, patches], axis=1)
        x = self._norm("pre_norm")(x) if self.pre_norm else x
        x = spmd.with_logical_constraint(x, ("batch", "length", "embed"))
        x = layers.Encoder(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            layer_norm_epsilon=self.layer_norm_epsilon,
            drop_path_rate=self.drop_path_rate,
            scan_layers=self.scan_layers,
            remat_policy=self.remat_policy,
            dtype=self.dtype,
            init_style=self.init_style,
            init_depth=self.init_depth,
            name="encoder",
        )(x, train=train, part=part)
        return layers.project(self._pool(x), self.out_dim, self.dtype)

    def _position_table(self, rows: int, columns: int) -> jax.Array:
        """Position embeddings [1 + patches, width]; the class token's comes first."""
        learned = layers.partitioned(nn.initializers.normal(self.width**-0.5), None, "embed")
        tables = {
            "sincos2d": lambda: jnp.asarray(
                position_embeddings.sincos_2d(rows, columns, self.width)
            ),
            "learned": lambda: self.param(
                "position_embedding", learned, (1 + rows * columns, self.width)
            ),
        }
        return layers.choose("position_embedding", self.position_embedding, tables)()

    def _norm(self, name: str) -> nn.LayerNorm:
        return layers.layer_norm(epsilon=self.layer_norm_epsilon, dtype=self.dtype, name=name)

    def _pool(self, x: jax.Array) -> jax.Array:
        """[batch, 1 + patches, width] to [batch, width]."""

        def attention_pooling() -> jax.Array:
            return AttentionPooling(
                self.num_heads,
                self.mlp_dim,
                self.activation,
                self.layer_norm_epsilon,
                self.dtype,
                name="attention_pooling",
            )(x)

        poolings = {
            "gap": lambda: self._norm("encoder_norm")(jnp.mean(x[:, 1:], axis=1)),
            "tok": lambda: self._norm("encoder_norm")(x)[:, 0],
            "map": attention_pooling,
            "none": lambda: x[:, 0],
        }
        return layers.choose("pooling", self.pooling, poolings)()
