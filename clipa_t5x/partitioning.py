"""Where arrays live: a (replica, data, model) mesh and rules from logical axes to mesh axes.

Layers name the dimensions of their parameters and activations (batch, length, embed, mlp, heads,
kv, vocab, layers, joint_embed). A table of rules says on which mesh axis a name is split: data
parallel, fully sharded, tensor parallel and both at once are tables, never code.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from flax.linen import spmd
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from clipa_t5x.errors import UserError

MESH_AXES = ("replica", "data", "model")
BATCH_MESH_AXES = ("replica", "data")

LogicalAxisRules = Sequence[tuple[str, Any]]


def standard_logical_axis_rules(
    activation_partitioning_dims: int = 1,
    parameter_partitioning_dims: int = 1,
    additional_rules: LogicalAxisRules = (),
) -> LogicalAxisRules:
    """The rules of T5X, by how many dimensions parameters and activations are split.

    Args:
      activation_partitioning_dims: 1 splits activations by batch (and mlp, heads over `model`); 2
        also splits their embed dimension over `model`.
      parameter_partitioning_dims: 1 splits parameters over `model` alone; 2 also splits their embed
        dimension over `data` (fully sharded data parallelism).
      additional_rules: (logical axis, mesh axis or tuple of them or None), looked at after these.

    With both at 2, jaxlib 0.10.2 partitions a product that contracts over `model` wrongly,
    silently, where there are replicas, `data` is as large as `model`, and a device holds no more
    tokens than width / data. Use 1 for activations there.

    Returns:
      Rules in order; of several for one name the first whose mesh axes are still free applies.

    Raises:
      UserError: a number of dimensions other than 1 and 2.
    """
    for name, value in [
        ("activation_partitioning_dims", activation_partitioning_dims),
        ("parameter_partitioning_dims", parameter_partitioning_dims),
    ]:
        if value not in (1, 2):
            raise UserError(f"standard_logical_axis_rules.{name} is {value}; it must be 1 or 2.")
    embed: list[tuple[str, Any]] = []
    if activation_partitioning_dims == 2:
        embed.append(("embed", "model"))
    if parameter_partitioning_dims == 2:
        embed.append(("embed", "data"))
    return (
        ("batch", BATCH_MESH_AXES),
        ("vocab", "model"),
        ("mlp", "model"),
        ("heads", "model"),
        *embed,
        ("embed", None),
        ("kv", None),
        ("length", None),
        ("layers", None),
        ("joint_embed", None),
        *additional_rules,
    )


@dataclasses.dataclass
class PjitPartitioner:
    """The mesh and the rules of one run.

    Attributes:
      num_partitions: size of the `model` axis, on every platform.
      num_replicas: size of the `replica` axis (slices that are joined by a slower network). The
        `data` axis takes the devices that remain.
      logical_axis_rules: see `standard_logical_axis_rules`.
      intended_mesh: {'replica': r, 'data': d, 'model': m} that the recipe is meant for: what a dry
        run shows where nothing else is asked for, and the mesh of a run on that many devices whose
        num_partitions and num_replicas are left at 1.
      devices: the devices of the mesh; None for all devices of all processes.
    """

    num_partitions: int = 1
    num_replicas: int = 1
    logical_axis_rules: LogicalAxisRules = dataclasses.field(
        default_factory=standard_logical_axis_rules
    )
    intended_mesh: Mapping[str, int] | None = None
    devices: Sequence[Any] | None = None

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh over `devices`.

        Raises:
          UserError: the number of devices is not a multiple of the fixed axes' sizes.
        """
        devices = jax.devices() if self.devices is None else self.devices
        # Split where no product of the network's dimensions is a mesh axis: 4 x 64 on 16 x 16.
        placed = mesh_utils.create_device_mesh(
            self._mesh_sizes(len(devices)), devices, allow_split_physical_axes=True
        )
        return Mesh(
            placed,
            MESH_AXES,
            axis_types=(AxisType.Auto,) * len(MESH_AXES),
        )

    def mesh_shape(self, num_devices: int) -> dict[str, int]:
        """Axis sizes of the mesh over that many devices.

        Raises:
          UserError: as `mesh`.
        """
        return dict(zip(MESH_AXES, self._mesh_sizes(num_devices), strict=True))

    def _mesh_sizes(self, num_devices: int) -> tuple[int, ...]:
        fixed = self.num_partitions * self.num_replicas
        if min(self.num_partitions, self.num_replicas) < 1 or num_devices % fixed:
            raise UserError(
                f"PjitPartitioner.num_partitions {self.num_partitions} x num_replicas "
                f"{self.num_replicas} does not divide the {num_devices} devices present: choose "
                f"sizes whose product is a divisor of {num_devices}."
            )
        derived = (self.num_replicas, num_devices // fixed, self.num_partitions)
        if not self.intended_mesh or fixed > 1:
            return derived
        intended = tuple(self.abstract_mesh(self.intended_mesh).shape.values())
        if math.prod(intended) == num_devices:
            return intended
        logging.warning(
            "MESH is %s, and there are %d devices: using %s.",
            dict(self.intended_mesh), num_devices, dict(zip(MESH_AXES, derived, strict=True)),
        )  # fmt: skip
        return derived

    def abstract_mesh(self, shape: Mapping[str, int] | None = None) -> AbstractMesh:
        """A mesh without devices: of `shape`, else the intended one, else that of this machine."""
        shape = shape or self.intended_mesh or dict(self.mesh.shape)
        if unknown := set(shape) - set(MESH_AXES):
            raise UserError(f"mesh axes {sorted(unknown)} are unknown; they are {MESH_AXES}.")
        sizes = tuple(int(shape.get(axis, 1)) for axis in MESH_AXES)
        return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

    @contextlib.contextmanager
    def activate(self, mesh: Mesh | AbstractMesh | None = None) -> Iterator[None]:
        """Within it, logical constraints of traced code are resolved by these rules.

        Args:
          mesh: instead of the partitioner's own; an abstract one is enough to trace.
        """
        mesh = mesh or self.mesh
        is_abstract = isinstance(mesh, AbstractMesh)
        context = jax.sharding.use_abstract_mesh(mesh) if is_abstract else jax.set_mesh(mesh)
        with context, nn.logical_axis_rules(self.logical_axis_rules):
            yield

    def batch_sharding(self, mesh: Any = None) -> NamedSharding:
        """How a batch lies: its rows over the mesh axes of 'batch', the rest whole."""
        spec = spmd.logical_to_mesh_axes(("batch",), self.logical_axis_rules)
        return NamedSharding(mesh or self.mesh, spec or PartitionSpec())

    def _batch_axes(self, mesh: Any) -> tuple[str, ...]:
        axes = self.batch_sharding(mesh).spec[0] or ()
        return (axes,) if isinstance(axes, str) else tuple(axes)

    def num_batch_parts(self, mesh: Any = None) -> int:
        """Into how many parts the mesh splits the rows of a batch."""
        mesh = mesh or self.mesh
        return math.prod(mesh.shape[axis] for axis in self._batch_axes(mesh))

    def check_batch_size(self, batch_size: int, mesh: Any = None) -> None:
        """Refuses a global batch that the mesh cannot split evenly.

        Raises:
          UserError: names both and the nearest sizes that do.
        """
        axes, parts = self._batch_axes(mesh), self.num_batch_parts(mesh)
        if batch_size < 1 or batch_size % parts:
            below = batch_size // parts * parts
            sizes = [str(size) for size in (below, below + parts) if size > 0]
            raise UserError(
                f"BATCH_SIZE is {batch_size}, not a multiple of the {parts} parts that the mesh "
                f"axes {'x'.join(axes)} split it into: set BATCH_SIZE to {' or '.join(sizes)}, or "
                "change PjitPartitioner.num_partitions."
            )

    def logical_axes(self, boxed: Any) -> Any:
        """The tree of logical axis names (a PartitionSpec each) of boxed abstract parameters.

        Raises:
          UserError: a parameter has a name that no rule knows; replicating it silently would cost
            memory on every chip.
        """
        known = {name for name, _ in self.logical_axis_rules}
        axes = nn.get_partition_spec(boxed)
        for path, spec in jax.tree_util.tree_leaves_with_path(
            axes, is_leaf=lambda x: isinstance(x, PartitionSpec)
        ):
            unknown = [name for name in spec if name is not None and name not in known]
            if unknown:
                raise UserError(
                    f"parameter {jax.tree_util.keystr(path)} has the logical axis {unknown[0]!r}, "
                    f"for which there is no rule in PjitPartitioner.logical_axis_rules: add one "
                    f"(known: {sorted(known)})."
                )
        return axes

    def param_shardings(self, boxed: Any, mesh: Any = None) -> Any:
        """NamedShardings for boxed abstract parameters, each checked to divide.

        Raises:
          UserError: a dimension is not a multiple of the mesh axes that the rules split it over.
        """
        mesh = mesh or self.mesh
        shapes = nn.unbox(boxed)

        def sharding(path: Any, shape: Any, logical: PartitionSpec) -> NamedSharding:
            spec = spmd.logical_to_mesh_axes(tuple(logical), self.logical_axis_rules)
            spec = spec or PartitionSpec()
            check_divides(jax.tree_util.keystr(path, simple=True, separator="/"), shape, spec, mesh)
            return NamedSharding(mesh, spec)

        return jax.tree_util.tree_map_with_path(sharding, shapes, self.logical_axes(boxed))


def check_divides(name: str, array: Any, spec: PartitionSpec, mesh: Any) -> None:
    """Refuses a sharding that does not split every dimension of an array evenly.

    Raises:
      UserError: names the parameter, the dimension, and what would divide it.
    """
    for dim, axes in enumerate(spec):
        if axes is None:
            continue
        axes = (axes,) if isinstance(axes, str) else axes
        parts = int(np.prod([mesh.shape[axis] for axis in axes]))
        if array.shape[dim] % parts:
            raise UserError(
                f"dimension {dim} of parameter {name} {tuple(array.shape)} is "
                f"{array.shape[dim]}, not a multiple of the {parts} parts of mesh axes "
                f"{'x'.join(axes)}: change the rule, the mesh, or pad the size to "
                f"{-(-array.shape[dim] // parts) * parts}."
            )


def parse_mesh(text: str) -> dict[str, int]:
    """'replica=4,data=64' as a dictionary.

    Raises:
      UserError: the text is not of that form.
    """
    try:
        pairs = [item.split("=") for item in text.split(",")]
        mesh = {axis.strip(): int(size) for axis, size in pairs}
        if len(mesh) < len(pairs) or min(mesh.values()) < 1:
            raise ValueError(text)
    except ValueError as error:
        raise UserError(
            f"--mesh is {text!r}; write it as axis=size pairs, each axis once and each size at "
            "least 1, for example replica=4,data=64."
        ) from error
    return mesh
