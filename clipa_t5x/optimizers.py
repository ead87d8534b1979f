"""Optimizers: optax chains with decay, freezing and learning-rate rules by parameter name."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipa_t5x import schedules
from clipa_t5x.errors import UserError, check_number

Params = Any

MU_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An update rule and the learning-rate schedule inside it, so that logs tell the real rate.

    Attributes:
      transformation: the optax chain; its updates are added to the parameters.
      learning_rate_fn: step -> rate before per-parameter factors.
    """

    transformation: optax.GradientTransformation
    learning_rate_fn: schedules.Schedule


def path_name(path: Sequence[Any]) -> str:
    """'image_tower/head/kernel' for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def by_name(patterns: Sequence[str]) -> Callable[[Params], Params]:
    """Returns a function from a tree to one of bools: does any pattern match the whole name?"""
    compiled = [re.compile(pattern) for pattern in patterns]

    def select(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: any(regex.fullmatch(path_name(path)) for regex in compiled), params
        )

    return select


def adamw(
    learning_rate: schedules.Schedule,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.2,
    mu_dtype: str = "float32",
    decayed: Sequence[str] = (r".*/kernel",),
    frozen: Sequence[str] = (),
    max_grad_norm: float | None = None,
    max_logit_scale: float | None = None,
) -> Optimizer:
    """AdamW with CLIPA's defaults: the decay is decoupled and scaled by the learning rate.

    Args:
      learning_rate: schedule, see `clipa_t5x.schedules`.
      b1: decay of the gradient's running mean.
      b2: decay of the squared gradient's running mean.
      eps: added to the root of the latter.
      weight_decay: factor of the parameter that joins the update.
      mu_dtype: dtype of the first moment, 'float32' or 'bfloat16'; the second is float32.
      decayed: regular expressions; a parameter whose whole name matches one decays. The default
        takes every kernel and leaves out biases, norms, tables, tokens and the temperature.
      frozen: regular expressions of parameters that never change ('image_tower/.*').
      max_grad_norm: clips the gradient's global norm; None does not.
      max_logit_scale: keeps exp(logit_scale) at or under this after every update (CLIP's is 100);
        None does not. CLIPA's JAX program did not.

    Raises:
      UserError: a pattern in `decayed` or `frozen` is not a regular expression, `mu_dtype` is no
        floating dtype, or a number is none or negative.
    """
    for pattern in (*decayed, *frozen):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{pattern!r} in optimizers.adamw is not a regular expression: {error}."
            ) from error
    if mu_dtype not in MU_DTYPES:
        raise UserError(f"MU_DTYPE is {mu_dtype!r}; it must be one of {list(MU_DTYPES)}.")
    check_number("WEIGHT_DECAY", weight_decay, minimum=0)
    clip = [optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm else []
    limit = []
    if max_logit_scale is not None:
        check_number("MAX_LOGIT_SCALE", max_logit_scale, minimum=1e-6)
        limit = [clamp_logit_scale(max_logit_scale)]
    freeze = [optax.masked(optax.set_to_zero(), by_name(frozen))] if frozen else []
    chain = optax.chain(
        *clip,
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.dtype(mu_dtype)),
        optax.add_decayed_weights(weight_decay, mask=by_name(decayed)),
        optax.scale_by_learning_rate(learning_rate),
        *limit,
        *freeze,
    )
    return Optimizer(chain, learning_rate)


def clamp_logit_scale(maximum: float) -> optax.GradientTransformation:
    """Shortens the update of `logit_scale` so that its exponential stays at or under `maximum`.

    A limit on the parameter, not on its value in the forward pass: there a clipped parameter would
    lose its gradient and stay where it is.
    """

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        if params is None:
            raise ValueError("clamp_logit_scale needs the parameters.")

        def clamp(path: Sequence[Any], u: jax.Array, p: jax.Array) -> jax.Array:
            if path_name(path) != "logit_scale":
                return u
            return jnp.minimum(p + u, jnp.log(maximum)) - p

        return jax.tree_util.tree_map_with_path(clamp, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
