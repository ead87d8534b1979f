"""What a run is made of, as text, before any is allocated: parameters, layout and batch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from clipa_t5x import checkpoints, partitioning


def _spec_text(spec: PartitionSpec, rank: int) -> str:
    names = [*spec, *[None] * (rank - len(spec))]
    return ", ".join("+".join(n) if isinstance(n, tuple) else n or "-" for n in names) or "-"


def bytes_per_device(array: Any) -> int:
    """Bytes of one device's part of an abstract array with a sharding."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def format_bytes(count: float) -> str:
    """'1.5 GiB' and the like."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError


def num_params(abstract_params: Any) -> int:
    """Number of parameters."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params))


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in rows]  # fmt: skip


def sharding_record(abstract_params: Any, mesh: Any) -> dict[str, Any]:
    """The table of parameters as plain values, for `sharding.json`.

    Args:
      abstract_params: of `jax.ShapeDtypeStruct` with named shardings.
      mesh: concrete or abstract.

    Returns:
      'mesh': axis to size; 'parameters': rows of 'parameter' (its path), 'shape', 'dtype',
      'sharding' (of every dimension the mesh axis, a list of axes, or None), and 'bytes' on one
      device.
    """
    rows = []
    for name, leaf in checkpoints.flatten(abstract_params).items():
        spec = [*leaf.sharding.spec, *[None] * (len(leaf.shape) - len(leaf.sharding.spec))]
        rows.append({
            "parameter": name,
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "sharding": [list(axes) if isinstance(axes, tuple) else axes for axes in spec],
            "bytes": bytes_per_device(leaf),
        })  # fmt: skip
    return {"mesh": dict(mesh.shape), "parameters": rows}


def describe(
    abstract_state: Any,
    logical_axes: Any,
    batch_spec: Mapping[str, jax.ShapeDtypeStruct],
    partitioner: partitioning.PjitPartitioner,
    mesh: Any,
) -> str:
    """The table of parameters and shardings, totals, and the batch.

    Args:
      abstract_state: train state of `jax.ShapeDtypeStruct` with shardings.
      logical_axes: tree of PartitionSpec with the parameters' logical axis names.
      batch_spec: shapes and dtypes of a global batch.
      partitioner: gives the batch's layout.
      mesh: concrete or abstract.
    """
    params = checkpoints.flatten(abstract_state.params)
    is_spec = {"is_leaf": lambda x: isinstance(x, PartitionSpec)}
    axes = [spec for spec in jax.tree.leaves(logical_axes, **is_spec)]
    rows = [("parameter", "shape", "logical axes", "mesh axes", "bytes per device")]
    for (name, leaf), logical in zip(params.items(), axes, strict=True):
        rank = len(leaf.shape)
        rows.append((
            name,
            " x ".join(map(str, leaf.shape)) or "scalar",
            _spec_text(logical, rank),
            _spec_text(leaf.sharding.spec, rank),
            f"{bytes_per_device(leaf):,}",
        ))  # fmt: skip
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    state_bytes = sum(bytes_per_device(x) for x in jax.tree.leaves(abstract_state))
    param_bytes = sum(bytes_per_device(x) for x in params.values())
    batch_sharding = partitioner.batch_sharding(mesh)
    lines = [
        f"mesh: {shape} ({math.prod(mesh.shape.values())} devices)",
        "",
        *_table(rows),
        "",
        f"parameters: {num_params(abstract_state.params):,}",
        f"parameters per device: {format_bytes(param_bytes)}",
        f"train state per device (parameters, optimizer, step): {format_bytes(state_bytes)}",
        "",
        *_table([
            ("batch feature", "global shape", "dtype", "mesh axes", "shape per device"),
            *[
                (
                    name,
                    " x ".join(map(str, spec.shape)),
                    str(spec.dtype),
                    _spec_text(batch_sharding.spec, len(spec.shape)),
                    " x ".join(map(str, batch_sharding.shard_shape(spec.shape))),
                )
                for name, spec in batch_spec.items()
            ],
        ]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
