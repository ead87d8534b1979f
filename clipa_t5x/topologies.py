"""Accelerators by name ('v5e-256', 'gpu-h100-8', 'cpu-8'), and TPU slices without the chips.

Memory is what XLA's TPU compiler lets a program use, as it states it itself (libtpu 0.0.42.1); peak
bfloat16 FLOP/s are those of Google's "Cloud TPU system architecture" pages and NVIDIA's data
sheets, dense. A TPU's clock is its peak over the operations of its matrix units in one cycle; of
these the compiler's cost model uses 78 % (v6e) to 94 % (v4) in a large bfloat16 product. How many
a tpu7x has is not published, nor is its clock: no time is told for it.
"""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax

from clipa_t5x.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of chip.

    Attributes:
      name: as topology names spell it.
      hbm_bytes: memory that a program may use on one device; None where it is the machine's.
      peak_flops: bfloat16 operations per second of one chip; None where not stated.
      macs_per_cycle: multiply-accumulates of one chip's matrix units in a cycle; 0 where not known.
      torus_dims: 2 or 3 dimensions of the network; 0 for kinds that are no TPU.
      accelerator_type: what libtpu calls one host of them.
      chip_config: how libtpu sees the cores of a chip: 'megacore' for one device of two.
      devices_per_chip: how many devices a program sees on one chip, each with its own memory.
      device_kinds: what jax calls its devices; of GPUs how the name begins.
    """

    name: str
    hbm_bytes: float | None
    peak_flops: float | None
    macs_per_cycle: int = 0
    torus_dims: int = 0
    accelerator_type: str = ""
    chip_config: str = "default"
    devices_per_chip: int = 1
    device_kinds: tuple[str, ...] = ()

    @property
    def clock(self) -> float | None:
        """Cycles per second; None where the kind is no TPU, or its matrix units are not known."""
        if not (self.macs_per_cycle and self.peak_flops):
            return None
        return self.peak_flops / (2 * self.macs_per_cycle)


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "v4", 30.75 * GIB, 275e12, 8 * 128**2, 3, "v4-8", "megacore",
            device_kinds=("TPU v4",),
        ),
        Kind(
            "v5e", 15.75 * GIB, 197e12, 4 * 128**2, 2, "v5litepod-4",
            device_kinds=("TPU v5 lite", "TPU v5e"),
        ),
        Kind(
            "v5p", 95.74 * GIB, 459e12, 8 * 128**2, 3, "v5p-8", "megacore",
            device_kinds=("TPU v5", "TPU v5p"),
        ),
        Kind(
            "v6e", 31.25 * GIB, 918e12, 4 * 256**2, 2, "v6e-4",
            device_kinds=("TPU v6 lite", "TPU v6e"),
        ),
        Kind(
            "tpu7x", 94.75 * GIB, 2307e12, 0, 3, "tpu7x-8", devices_per_chip=2,
            device_kinds=("TPU7x", "TPU v7x"),
        ),
        Kind("gpu-a100", 79.25 * GIB, 312e12, device_kinds=("NVIDIA A100",)),
        Kind("gpu-h100", 79.65 * GIB, 989e12, device_kinds=("NVIDIA H100 80GB HBM3",)),
        Kind("gpu-h200", 140.4 * GIB, 989e12, device_kinds=("NVIDIA H200",)),
        Kind("cpu", None, None),
    )
}  # fmt: skip

# Slices as they can be rented, by the dimensions of their network.
_SHAPES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: (
        (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of a kind.

    Attributes:
      kind: the chips.
      num_chips: how many.
      shape: of a TPU's network, () for others.
    """

    kind: Kind
    num_chips: int
    shape: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """'v5e-256'."""
        return f"{self.kind.name}-{self.num_chips}"

    @property
    def num_devices(self) -> int:
        """How many devices a program sees."""
        return self.num_chips * self.kind.devices_per_chip

    def larger(self) -> list["Topology"]:
        """Those of the same kind with more chips, the smallest first."""
        if self.shape:
            return [t for t in _tpu_slices(self.kind) if t.num_chips > self.num_chips]
        return [dataclasses.replace(self, num_chips=self.num_chips * 2**i) for i in range(1, 7)]

    def devices(self) -> Sequence[Any] | None:
        """Devices to compile for: of the CPU real ones, of a TPU slice descriptions.

        Returns:
          `num_devices` devices, or None for kinds that nothing can be compiled for here.

        Raises:
          UserError: libtpu is missing or too old, or jax has started with fewer CPU devices.
        """
        if self.kind.torus_dims:
            return _describe_tpu_slice(self)
        return _cpu_devices(self.num_chips) if self.kind.name == "cpu" else None


def parse(text: str) -> Topology:
    """The topology of a name: kind, '-', number of chips.

    The number counts chips. (Google's own names of v4 and v5p count cores, two to a chip.)

    Raises:
      UserError: no such kind, or no such number of its chips; says which there are.
    """
    name, _, count = text.rpartition("-")
    kind = KINDS.get(name)
    if kind is None or not count.isdecimal() or int(count) < 1:
        raise UserError(f"--topology is {text!r}; it must be one of {known_names()}.")
    if not kind.torus_dims:
        return Topology(kind, int(count))
    for topology in _tpu_slices(kind):
        if topology.num_chips == int(count):
            return topology
    sizes = ", ".join(t.name for t in _tpu_slices(kind))
    raise UserError(f"--topology is {text!r}, and there is no {name} of {count} chips: {sizes}.")


def device_peak_flops(device_kind: str) -> float | None:
    """bfloat16 operations per second of one device, by what jax calls it; None where not stated."""
    for kind in KINDS.values():
        is_gpu = not kind.torus_dims and device_kind.startswith(kind.device_kinds)
        if kind.peak_flops and (device_kind in kind.device_kinds or is_gpu):
            return kind.peak_flops / kind.devices_per_chip
    return None


def known_names() -> str:
    """All names, for people."""
    parts = []
    for kind in KINDS.values():
        if kind.torus_dims:
            sizes = "|".join(str(t.num_chips) for t in _tpu_slices(kind))
            parts.append(f"{kind.name}-{{{sizes}}}")
        else:
            parts.append(f"{kind.name}-N")
    return ", ".join(parts)


def _tpu_slices(kind: Kind) -> list[Topology]:
    slices = []
    for shape in _SHAPES[kind.torus_dims]:
        chips = 1
        for size in shape:
            chips *= size
        slices.append(Topology(kind, chips, shape))
    return slices


def wraps(topology: Topology) -> tuple[bool, ...]:
    """Which dimensions of a TPU's network are rings; always three of them.

    v4, v5p and tpu7x connect blocks of 4 x 4 x 4 optically, so that a slice of whole blocks is a
    torus; v5e and v6e are rings only along the pod's full 16 chips.
    """
    if topology.kind.torus_dims == 3:
        return (all(size % 4 == 0 for size in topology.shape),) * 3
    return (*(size == 16 for size in topology.shape), False)


def prepare_environment(kind: Kind) -> None:
    """Tells libtpu that there is no chip here to look for; before it is loaded for the first time.

    Without this it asks a metadata server who it is, and minutes pass. What is set already stays.
    """
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": kind.accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        # Two that compile at once would otherwise stumble over each other's lock file.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _describe_tpu_slice(topology: Topology) -> Sequence[Any]:
    from jax.experimental import topologies as jax_topologies

    prepare_environment(topology.kind)
    try:
        import libtpu  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"--topology={topology.name} compiles with libtpu, which is not installed: "
            "pip install 'clipa_t5x[tpu]' --constraint constraints.txt"
        ) from error
    sizes = "x".join(map(str, topology.shape))
    try:
        return jax_topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{topology.kind.name}:{sizes}",
            chip_config_name=topology.kind.chip_config,
            chips_per_host_bounds=(1, 1, 1) if topology.num_chips == 1 else (2, 2, 1),
            num_slices=1,
            wrap=wraps(topology),
        ).devices
    except jax.errors.JaxRuntimeError as error:
        # Of a kind that it has never heard of it says so; anything else is not the user's doing.
        if "Invalid TPU external name" not in str(error):
            raise
        raise UserError(
            f"--topology={topology.name}: libtpu {libtpu.__version__} does not know "
            f"{topology.kind.name}: install a later one (pip install --upgrade libtpu), or name "
            "another kind."
        ) from error


def _cpu_devices(count: int) -> Sequence[Any]:
    with contextlib.suppress(RuntimeError):  # Started already: there are as many as there are.
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--topology=cpu-{count}: jax has started with {len(devices)} CPU devices; unset "
            "XLA_FLAGS, or ask for no more than these."
        )
    return devices[:count]
