"""Transformer layers shared by both towers: attention, MLP, pre-norm blocks, the scanned encoder.

Every parameter is born with logical axis names (T5X's: embed, mlp, heads, kv, layers); which mesh
axis a name lies on is decided by rules, see `clipa_t5x.partitioning`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import spmd
from jax.ad_checkpoint import checkpoint_name

from clipa_t5x.errors import UserError
from clipa_t5x.towers import batch_part

Initializer = Callable[..., Any]
DTypeLike = Any

GELU = {
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: nn.gelu(x, approximate=False),
    "gelu_quick": lambda x: x * nn.sigmoid(1.702 * x),
}

# What a block keeps from the forward pass for the backward pass; everything else is recomputed.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_qkv": jax.checkpoint_policies.save_only_these_names("query", "key", "value"),
    "save_qkv_mlp": jax.checkpoint_policies.save_only_these_names(
        "query", "key", "value", "mlp_hidden"
    ),
}


def choose(kind: str, name: str, options: dict[str, Any]) -> Any:
    """Returns `options[name]`; raises `UserError` that lists the options where there is none."""
    if name not in options:
        raise UserError(f"{kind} is {name!r}; it must be one of {sorted(options)}.")
    return options[name]


def partitioned(init: Initializer, *axes: str | None) -> Initializer:
    """Makes `init` return its array together with the logical names of its dimensions."""
    return nn.with_logical_partitioning(init, axes)


def layer_norm(*, epsilon: float, dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """LayerNorm over the embed dimension: float32 statistics, scale and bias."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        scale_init=partitioned(nn.initializers.ones, "embed"),
        bias_init=partitioned(nn.initializers.zeros, "embed"),
        name=name,
    )


def kernel_inits(style: str, width: int, init_depth: int) -> dict[str, Initializer]:
    """Initialisers of a block's kernels: qkv, attention_out, fc1, fc2.

    Args:
      style: 'width_scaled' (normal; qkv W^-1/2, fc1 (2W)^-1/2, the two kernels that write to the
        residual stream W^-1/2 (2 init_depth)^-1/2) or 'xavier_uniform'.
      width: W, the tower's embed dimension.
      init_depth: the depth of the residual scaling. CLIPA's is 12 for towers of every depth.
    """
    normal, xavier = nn.initializers.normal, nn.initializers.xavier_uniform
    residual = normal(width**-0.5 * (2 * init_depth) ** -0.5)
    styles = {
        "width_scaled": {
            "qkv": normal(width**-0.5),
            "attention_out": residual,
            "fc1": normal((2 * width) ** -0.5),
            "fc2": residual,
        },
        "xavier_uniform": {
            "qkv": xavier(in_axis=0, out_axis=(1, 2)),
            "attention_out": xavier(in_axis=(0, 1), out_axis=2),
            "fc1": xavier(),
            "fc2": xavier(),
        },
    }
    return choose("init_style", style, styles)


class Einsum(nn.Module):
    """A linear map by `jnp.einsum`, with bias: what turns embeddings into heads and back.

    Attributes:
      equation: of inputs and kernel.
      shape: of the kernel.
      axes: logical axis names of the kernel's dimensions.
      bias_dims: how many of the kernel's last dimensions the bias has.
      kernel_init: initialiser of the kernel.
      dtype: computation dtype.
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    bias_dims: int
    kernel_init: Initializer
    dtype: DTypeLike

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the map to `inputs`, shaped as `equation` says."""
        kernel = self.param("kernel", partitioned(self.kernel_init, *self.axes), self.shape)
        zeros = partitioned(nn.initializers.zeros, *self.axes[-self.bias_dims :])
        bias = self.param("bias", zeros, self.shape[-self.bias_dims :])
        inputs = inputs.astype(self.dtype)
        return jnp.einsum(self.equation, inputs, kernel.astype(self.dtype)) + bias.astype(
            self.dtype
        )


class MultiHeadAttention(nn.Module):
    """Multi-head attention with biases; the softmax is taken in float32.

    Attributes:
      num_heads: heads; the head dimension is width / num_heads.
      dtype: computation dtype.
      inits: initialisers under 'qkv' and 'attention_out'.
    """

    num_heads: int
    dtype: DTypeLike
    inits: dict[str, Initializer]

    @nn.compact
    def __call__(
        self, queries: jax.Array, keys: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """Attends from `queries` to `keys`.

        Args:
          queries: [batch, q, width].
          keys: [batch, k, width], the source of both keys and values.
          mask: bool [batch or 1, 1, q, k], True where attention is allowed; None for everywhere.

        Returns:
          [batch, q, width].
        """
        width = queries.shape[-1]
        if width % self.num_heads:
            raise UserError(f"width {width} is not a multiple of num_heads {self.num_heads}.")

        head_dim = width // self.num_heads

        def project(name: str, inputs: jax.Array) -> jax.Array:
            outputs = Einsum(
                equation="bld,dhk->blhk",
                shape=(width, self.num_heads, head_dim),
                axes=("embed", "heads", "kv"),
                bias_dims=2,
                kernel_init=self.inits["qkv"],
                dtype=self.dtype,
                name=name,
            )(inputs)
            outputs = spmd.with_logical_constraint(outputs, ("batch", "length", "heads", "kv"))
            return checkpoint_name(outputs, name)

        attended = jax.nn.dot_product_attention(
            project("query", queries), project("key", keys), project("value", keys), mask=mask
        )
        return Einsum(
            equation="blhk,hkd->bld",
            shape=(self.num_heads, head_dim, width),
            axes=("heads", "kv", "embed"),
            bias_dims=1,
            kernel_init=self.inits["attention_out"],
            dtype=self.dtype,
            name="out",
        )(attended)


class Mlp(nn.Module):
    """Dense, GELU, dense, with biases."""

    mlp_dim: int
    activation: str
    dtype: DTypeLike
    inits: dict[str, Initializer]

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps [batch, length, width] to the same shape."""
        hidden = nn.Dense(
            self.mlp_dim,
            dtype=self.dtype,
            kernel_init=partitioned(self.inits["fc1"], "embed", "mlp"),
            bias_init=partitioned(nn.initializers.zeros, "mlp"),
            name="fc1",
        )(inputs)
        hidden = spmd.with_logical_constraint(hidden, ("batch", "length", "mlp"))
        hidden = checkpoint_name(hidden, "mlp_hidden")
        return nn.Dense(
            inputs.shape[-1],
            dtype=self.dtype,
            kernel_init=partitioned(self.inits["fc2"], "mlp", "embed"),
            bias_init=partitioned(nn.initializers.zeros, "embed"),
            name="fc2",
        )(choose("activation", self.activation, GELU)(hidden))


def drop_path(
    branch: jax.Array,
    rate: jax.Array | float,
    rng_fn: Callable[[], jax.Array],
    part: batch_part.BatchPart = batch_part.WHOLE,
) -> jax.Array:
    """Zeroes a residual branch per sample with probability `rate`, else divides it by 1 - rate.

    Stochastic depth (Huang et al., 2016).

    Args:
      branch: [batch, length, width].
      rate: scalar probability in [0, 1), traced under the layer scan.
      rng_fn: returns the random key.
      part: which part of the batch this is.
    """
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    rng = rng_fn()
    kept = part.draw(lambda n: jax.random.bernoulli(rng, keep, (n, 1, 1)), branch.shape[0])
    return jnp.where(kept, branch / keep.astype(branch.dtype), jnp.zeros_like(branch))


class EncoderBlock(nn.Module):
    """Pre-norm block: x += attention(LN(x)); x += mlp(LN(x)).

    The call returns a (carry, None) pair, the form that `nn.scan` asks for.
    """

    num_heads: int
    mlp_dim: int
    activation: str
    layer_norm_epsilon: float
    dtype: DTypeLike
    init_style: str
    init_depth: int
    use_drop_path: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        drop_path_rate: jax.Array,
        mask: jax.Array | None,
        part: batch_part.BatchPart,
    ) -> tuple[jax.Array, None]:
        """Maps x [batch, length, width] to the same shape; see `MultiHeadAttention` for `mask`."""
        inits = kernel_inits(self.init_style, x.shape[-1], self.init_depth)

        def add(residual: jax.Array, branch: jax.Array) -> jax.Array:
            if self.use_drop_path:
                branch = drop_path(branch, drop_path_rate, lambda: self.make_rng("drop_path"), part)
            return spmd.with_logical_constraint(residual + branch, ("batch", "length", "embed"))

        normed = layer_norm(epsilon=self.layer_norm_epsilon, dtype=self.dtype, name="norm1")(x)
        attention = MultiHeadAttention(self.num_heads, self.dtype, inits, name="attention")
        x = add(x, attention(normed, normed, mask))
        normed = layer_norm(epsilon=self.layer_norm_epsilon, dtype=self.dtype, name="norm2")(x)
        mlp = Mlp(self.mlp_dim, self.activation, self.dtype, inits, name="mlp")
        return add(x, mlp(normed)), None


class Encoder(nn.Module):
    """A stack of blocks, scanned over depth so that compile time does not grow with it.

    Attributes:
      depth: number of blocks.
      drop_path_rate: of the last block; the rates grow linearly from 0 with depth.
      scan_layers: one traced block over stacked parameters [layers, ...]; False unrolls the stack
        into blocks `layers_0`, `layers_1`, ... with the same result.
      remat_policy: 'none', or a name in `REMAT_POLICIES`.
      num_heads, mlp_dim, activation, layer_norm_epsilon, dtype, init_style, init_depth: see the
        block's parts.
    """

    depth: int
    num_heads: int
    mlp_dim: int
    activation: str = "gelu_tanh"
    layer_norm_epsilon: float = 1e-6
    drop_path_rate: float = 0.0
    scan_layers: bool = True
    remat_policy: str = "none"
    dtype: DTypeLike = "float32"
    init_style: str = "width_scaled"
    init_depth: int = 12

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        train: bool = False,
        part: batch_part.BatchPart = batch_part.WHOLE,
    ) -> jax.Array:
        """Maps [batch, length, width] to the same shape.

        Drop path is active only where `train` is set, and draws from the 'drop_path' stream what
        falls to this `part` of the batch.
        """
        block_cls: Any = EncoderBlock
        if self.remat_policy != "none":
            policy = choose("remat_policy", self.remat_policy, {"none": None, **REMAT_POLICIES})
            block_cls = nn.remat(block_cls, policy=policy, prevent_cse=not self.scan_layers)
        settings: dict[str, Any] = {
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "activation": self.activation,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "dtype": self.dtype,
            "init_style": self.init_style,
            "init_depth": self.init_depth,
            "use_drop_path": train and self.drop_path_rate > 0,
        }
        rates = jnp.linspace(0.0, self.drop_path_rate, self.depth)
        if self.scan_layers:
            in_axes: Any = (0, nn.broadcast, nn.broadcast)
            scanned = nn.scan(
                block_cls,
                variable_axes={"params": 0},
                split_rngs={"params": True, "drop_path": True},
                in_axes=in_axes,
                length=self.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scanned(**settings, name="layers")(x, rates, mask, part)[0]
        for i in range(self.depth):
            x, _ = block_cls(**settings, name=f"layers_{i}")(x, rates[i], mask, part)
        return x


def stack_layers(params: dict[str, Any], depth: int) -> dict[str, Any]:
    """Turns the parameters of an unrolled `Encoder` into those of a scanned one."""
    blocks: Sequence[Any] = [params[f"layers_{i}"] for i in range(depth)]
    return {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def project(x: jax.Array, out_dim: int | None, dtype: DTypeLike) -> jax.Array:
    """Projects pooled features [batch, width] to [batch, out_dim], without bias.

    Called from within a tower's compact method: the parameters belong to the tower, as `head`.
    """
    if out_dim is None:
        return x
    init = partitioned(nn.initializers.normal(x.shape[-1] ** -0.5), "embed", "joint_embed")
    return nn.Dense(out_dim, use_bias=False, dtype=dtype, kernel_init=init, name="head")(x)
