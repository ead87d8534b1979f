"""The text tower: a bidirectional transformer over WordPiece ids, as CLIPA trains it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import spmd

from clipa_t5x.towers import batch_part, layers, position_embeddings


def attention_mask(ids: jax.Array, *, causal: bool, mask_padding: bool) -> jax.Array | None:
    """Where text attention is allowed.

    Args:
      ids: int [batch, length]; 0 is padding.
      causal: a position sees itself and earlier ones only.
      mask_padding: no position sees padding, but for itself (so that no row is empty).

    Returns:
      bool [batch or 1, 1, length, length], or None where everything is allowed.
    """
    length = ids.shape[1]
    mask = None
    if causal:
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if mask_padding:
        visible = (ids != 0)[:, None, None, :] | jnp.eye(length, dtype=bool)[None, None]
        mask = visible if mask is None else mask & visible
    return mask


class TextTransformer(nn.Module):
    """Token ids to embeddings.

    Attributes:
      width, depth, mlp_dim, num_heads: the transformer's sizes.
      out_dim: size of the joint embedding; None leaves out the projection.
      vocab_size: rows of the token table. CLIPA's is 32000 for BERT's 30,522 ids.
      position_embedding: 'learned' (for the length of the first call) or 'sincos1d'.
      pooling: 'last' (the last position, whatever stands there: padding serves as a learned
        read-out token, as in the released CLIPA models), 'first', 'gap' (mean over all positions
        but the first), 'argmax' (the position of the largest id, OpenAI CLIP's end of text).
      causal, mask_padding: see `attention_mask`. CLIPA uses neither.
      activation, layer_norm_epsilon, drop_path_rate, scan_layers, remat_policy, init_style,
        init_depth, dtype: as in the image tower.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    out_dim: int | None
    vocab_size: int = 32_000
    position_embedding: str = "learned"
    pooling: str = "last"
    causal: bool = False
    mask_padding: bool = False
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
        ids: jax.Array,
        *,
        train: bool = False,
        part: batch_part.BatchPart = batch_part.WHOLE,
    ) -> jax.Array:
        """Embeds texts.

        Args:
          ids: int32 [batch, length].
          train: whether paths are dropped.
          part: which part of the batch this is.

        Returns:
          [batch, out_dim] (or [batch, width] without projection), of `dtype`, not normalised.
        """
        x = nn.Embed(
            self.vocab_size,
            self.width,
            dtype=self.dtype,
            embedding_init=layers.partitioned(nn.initializers.normal(0.02), "vocab", "embed"),
            name="token_embedding",
        )(ids)
        x = x + self._position_table(ids.shape[1]).astype(self.dtype)
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
        )(
            x,
            mask=attention_mask(ids, causal=self.causal, mask_padding=self.mask_padding),
            train=train,
            part=part,
        )
        x = layers.layer_norm(
            epsilon=self.layer_norm_epsilon, dtype=self.dtype, name="encoder_norm"
        )(x)
        return layers.project(self._pool(x, ids), self.out_dim, self.dtype)

    def _position_table(self, length: int) -> jax.Array:
        """Position embeddings [length, width]."""
        learned = layers.partitioned(nn.initializers.normal(0.01), None, "embed")
        tables = {
            "learned": lambda: self.param("position_embedding", learned, (length, self.width)),
            "sincos1d": lambda: jnp.asarray(position_embeddings.sincos_1d(length, self.width)),
        }
        return layers.choose("position_embedding", self.position_embedding, tables)()

    def _pool(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        """[batch, length, width] to [batch, width]."""
        poolings = {
            "last": lambda: x[:, -1],
            "first": lambda: x[:, 0],
            "gap": lambda: jnp.mean(x[:, 1:], axis=1),
            "argmax": lambda: jnp.take_along_axis(
                x, jnp.argmax(ids, axis=1)[:, None, None], axis=1
            )[:, 0],
        }
        return layers.choose("pooling", self.pooling, poolings)()
