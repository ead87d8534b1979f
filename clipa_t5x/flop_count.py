"""Operations of a traced function: its matrix products, counted off the jaxpr.

A multiply-accumulate is two operations; what is not a product is left out, as is usual where
utilisation is told. Loops count as often as they run, sharded parts on all their devices.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def count(jaxpr: core.Jaxpr) -> int:
    """Operations of one run of `jaxpr` over the global arrays."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += _dot_general(eqn)
        elif name == "conv_general_dilated":
            total += _convolution(eqn)
        elif name == "cond":
            total += max(count(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            total += _times(eqn) * sum(count(inner) for inner in _inner(eqn))
    return total


def _dot_general(eqn: core.JaxprEqn) -> int:
    """Twice the result's size times the contracted dimensions."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return 2 * math.prod(out.shape) * math.prod(lhs.shape[dim] for dim in contracted)  # pyright: ignore


def _convolution(eqn: core.JaxprEqn) -> int:
    """Twice the result's size times the kernel elements that each of it sums."""
    kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
    spec = eqn.params["dimension_numbers"].rhs_spec  # (output features, input features, space...)
    summed = math.prod(kernel.shape[dim] for dim in spec[1:])  # pyright: ignore
    return 2 * math.prod(out.shape) * summed  # pyright: ignore


def _times(eqn: core.JaxprEqn) -> int:
    """How often an equation runs what is inside it. A `while` counts once: nobody knows."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        mesh = eqn.params["mesh"]
        return math.prod(mesh.shape[axis] for axis in eqn.params["newly_manual_axes"])
    return 1


def _inner(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Yields the jaxprs among an equation's parameters; of a custom rule only the function's."""
    for name, value in eqn.params.items():
        if name.endswith(("_fwd", "_bwd", "_rule", "jvp_jaxpr_fun", "jvp_jaxpr_thunk")):
            continue
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


def traced(value: Any) -> int:
    """Operations of a `jax.stages.Traced`."""
    return count(value.jaxpr.jaxpr)
