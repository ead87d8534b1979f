"""Does a recipe fit, and how fast is it? Answered by XLA, without the chips.

    python -m clipa_t5x.precompile --gin_file=gin/bigG14_stage1.gin --topology=v5e-256

The train step that `train` would run is compiled for a described TPU slice (libtpu; `pip install
'clipa_t5x[tpu]'`) or for CPU devices; for GPUs only what shapes tell is told. A schedule's stages
are compiled one after the other.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from clipa_t5x import (
    cost_report,
    experiment,
    gin_utils,
    partitioning,
    schedule,
    step_cost,
    topologies,
)
from clipa_t5x import trainer as trainer_lib
from clipa_t5x.errors import UserError
from clipa_t5x.model_info import format_bytes

# What a search varies beside the mesh: macros that change together and their values, those that
# need the least memory first.
SEARCHED = (
    (
        ("IMAGE_REMAT_POLICY", "TEXT_REMAT_POLICY"),
        ("full", "save_qkv", "save_qkv_mlp", "minimal", "none"),
    ),
    (("NUM_MICROBATCHES",), (8, 4, 2, 1)),
)
SEARCHED_REPLICAS = (1, 2, 4, 8)

Overrides = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An experiment as the command line names it.

    Attributes:
      gin_files: see `gin_utils.parse`.
      bindings: likewise.
      search_paths: likewise.
    """

    gin_files: Sequence[str]
    bindings: Sequence[str]
    search_paths: Sequence[str]

    @property
    def name(self) -> str:
        """'bigG14_stage1'; what is laid over it follows, as in 'H14_stage1+fsdp_tp2'."""
        return "+".join(pathlib.Path(file).stem for file in self.gin_files)

    def build(self, overrides: Overrides) -> dict[str, Any]:
        """The arguments of `train`, with some macros set anew.

        Raises:
          UserError: the configuration is refused.
        """
        own = [f"{name} = {value!r}" for name, value in overrides.items()]
        bindings = [*experiment.NO_PLACES, *self.bindings, *own]
        experiment.parse(self.gin_files, bindings, self.search_paths)
        return experiment.arguments()

    def stages(self) -> list["Recipe"] | None:
        """Of a schedule its stages in order, None for a stage.

        Raises:
          UserError: the schedule's own configuration is refused.
        """
        if not schedule.is_schedule(self.gin_files, self.search_paths):
            return None
        own, shared = schedule.split_bindings(self.bindings)
        read = schedule.read(self.gin_files, [experiment.NO_MODEL_DIR, *own], self.search_paths)
        return [Recipe([file], shared, self.search_paths) for file in read.stages]


def run(
    recipe: Recipe,
    *,
    topology_name: str | None,
    effort: str = "default",
    mesh: Mapping[str, int] | None = None,
    search: bool = False,
    price: float | None = None,
    output: str | None = None,
) -> None:
    """Prints what a step of the recipe costs each chip, and writes it as JSON.

    Args:
      recipe: the experiment, or a schedule of several.
      topology_name: see `topologies.parse`.
      effort: 'fast' tells memory, 'default' tells time, too.
      mesh: axis sizes; None for the recipe's own, or all chips on `data`.
      search: tries settings of one stage at fast effort, and ranks those that fit.
      price: of a chip-hour, in any currency.
      output: path of the JSON; None for `precompile_<recipe>_<topology>.json` here.

    Raises:
      UserError: something is refused, or the step does not fit; says by how much, and what would.
    """
    if topology_name is None:
        raise UserError(f"precompile needs --topology=NAME: {topologies.known_names()}.")
    topology = topologies.parse(topology_name)
    jax.config.update("jax_platforms", "cpu")  # Other chips are described, never used.
    path = pathlib.Path(output or f"precompile_{recipe.name}_{topology.name}.json")
    stages = recipe.stages()
    if search:
        if stages:
            raise UserError(
                f"--search takes one stage, and {recipe.gin_files[-1]} is a schedule of "
                f"{len(stages)}: give --gin_file={stages[0].gin_files[0]} or another of them."
            )
        _search(recipe, topology, path)
        return
    measured = []
    for stage in stages or [recipe]:
        cost, total_steps = measure(stage, topology, effort, mesh)
        measured.append((cost, cost_report.Stage(stage.name, total_steps, price)))
        print(cost_report.as_text(*measured[-1]), flush=True)
    if stages:
        print(cost_report.schedule_text(recipe.name, measured))
        _write(path, cost_report.schedule_json(recipe.name, measured))
    else:
        _write(path, cost_report.as_json(*measured[0]))
    logging.info("Written to %s.", path)
    refusals = [
        _refusal(stage, cost)
        for stage, (cost, _) in zip(stages or [recipe], measured, strict=True)
        if cost.fits is False
    ]
    if refusals:
        raise UserError(" ".join(refusals))


def measure(
    recipe: Recipe,
    topology: topologies.Topology,
    effort: str,
    mesh: Mapping[str, int] | None = None,
    overrides: Overrides | None = None,
) -> tuple[step_cost.StepCost, int]:
    """(cost of the recipe's step on a topology, steps of the stage).

    Raises:
      UserError: the configuration, the mesh or the batch is refused.
    """
    arguments = recipe.build(overrides or {})
    devices = topology.devices()
    partitioner = _partitioner(arguments["partitioner"], topology, devices, mesh)

    with gin_utils.errors_as_raised():
        trainer = arguments.get("trainer_cls", trainer_lib.Trainer)(
            model=arguments["model"],
            optimizer=arguments["optimizer"],
            partitioner=partitioner,
            batch_spec=arguments["train_dataset_cfg"].batch_spec(),
            mesh=None if devices else partitioner.abstract_mesh(),
        )
    analytic = step_cost.analyze(arguments["model"], trainer)
    compiled = step_cost.compile_step(trainer, effort) if devices else None
    cost = step_cost.StepCost(
        topology=topology,
        mesh=dict(trainer.mesh.shape),
        effort=effort if devices else None,
        analytic=analytic,
        compiled=compiled,
    )
    return cost, arguments["total_steps"]


def _partitioner(
    given: partitioning.PjitPartitioner,
    topology: topologies.Topology,
    devices: Sequence[Any] | None,
    mesh: Mapping[str, int] | None,
) -> partitioning.PjitPartitioner:
    """The recipe's partitioner, on the topology's devices."""
    devices_needed = topology.num_devices
    if mesh is None:
        mesh = given.mesh_shape(devices_needed)
    elif math.prod(mesh.values()) != devices_needed:
        sizes = ",".join(f"{axis}={size}" for axis, size in mesh.items())
        raise UserError(
            f"--mesh={sizes} has {math.prod(mesh.values())} devices, and {topology.name} has "
            f"{devices_needed}: choose sizes whose product is {devices_needed}."
        )
    return dataclasses.replace(
        given, devices=devices, intended_mesh=mesh, num_partitions=1, num_replicas=1
    )


def _write(path: pathlib.Path, content: Any) -> None:
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output={path} cannot be written: {error.strerror}.") from error


def _refusal(recipe: Recipe, cost: step_cost.StepCost) -> str:
    """Why a step does not fit, and what would."""
    over = cost.needed_bytes - (cost.topology.kind.hbm_bytes or 0)
    found = list(_nearest(recipe, cost)) if cost.compiled else []
    remedy = "; ".join(found) or "use more chips, or --search for settings that do"
    parts = cost_report.memory_parts(cost)
    greatest = max(parts, key=lambda name: parts[name])
    where = "chip" if cost.topology.kind.devices_per_chip == 1 else "device"
    return (
        f"{recipe.name} does not fit {cost.topology.name}: at least {format_bytes(over)} too much "
        f"on each {where}, of which {greatest} take {format_bytes(parts[greatest])}. What fits: "
        f"{remedy}."
    )


def _nearest(recipe: Recipe, cost: step_cost.StepCost) -> Iterator[str]:
    """Yields settings that fit, each found by compiling at fast effort; one of each way."""
    num_devices = cost.topology.num_devices
    all_data = {"data": num_devices}
    full = dict.fromkeys(SEARCHED[0][0], "full")
    ways: list[list[tuple[str, topologies.Topology, Any, Overrides]]] = [
        [(f"--mesh=data={num_devices}", cost.topology, all_data, {})],
        [(_flags(full), cost.topology, cost.mesh, full)],
        [
            (_flags({"NUM_MICROBATCHES": n}), cost.topology, cost.mesh, {"NUM_MICROBATCHES": n})
            for n in (2, 4, 8, 16)
        ],
        [(f"--topology={t.name}", t, None, {}) for t in cost.topology.larger()[:3]],
    ]
    for way in ways:
        for text, topology, mesh, overrides in way:
            logging.info("Trying %s ...", text)
            try:
                other, _ = measure(recipe, topology, "fast", mesh, overrides)
            except UserError:
                continue  # Not a setting of this recipe.
            if other.fits:
                yield f"{text} ({format_bytes(other.needed_bytes)})"
                break


def _flags(overrides: Overrides) -> str:
    return " ".join(f'--gin.{name}="{value!r}"' for name, value in overrides.items())


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One setting of a search.

    Attributes:
      mesh: axis sizes.
      levels: index into the values of each entry of the searched macros: more is more memory.
      overrides: the macros so set.
    """

    mesh: Mapping[str, int]
    levels: tuple[int, ...]
    overrides: Overrides

    @property
    def flags(self) -> str:
        """As a user gives it to `train`."""
        return _flags({"MESH": dict(self.mesh), **self.overrides})

    def needs_more_than(self, other: "Candidate") -> bool:
        """Whether it takes at least the memory of `other` on the same mesh."""
        pairs = zip(self.levels, other.levels, strict=True)
        return self.mesh == other.mesh and all(a >= b for a, b in pairs)


def candidates(recipe: Recipe, topology: topologies.Topology) -> list[Candidate]:
    """Every combination of mesh and searched macros, those of least memory first."""
    model = recipe.build({})["partitioner"].mesh_shape(topology.num_devices)["model"]
    searched = [entry for entry in SEARCHED if _has_macros(entry[0])]
    rows = topology.num_devices // model
    meshes = [
        {"replica": replicas, "data": rows // replicas, "model": model}
        for replicas in SEARCHED_REPLICAS
        if rows % replicas == 0
    ]
    levels = itertools.product(*(range(len(values)) for _, values in searched))
    return [
        Candidate(
            mesh,
            level,
            {
                name: values[i]
                for (names, values), i in zip(searched, level, strict=True)
                for name in names
            },
        )
        for level, mesh in itertools.product(levels, meshes)
    ]


def _has_macros(macros: Sequence[str]) -> bool:
    """Whether the configuration in force has these macros."""
    try:
        for name in macros:
            gin_utils.query(name)
    except UserError:
        return False
    return True


def _search(recipe: Recipe, topology: topologies.Topology, path: pathlib.Path) -> None:
    """Compiles all candidates, tells how far it is, and prints those that fit, the best first."""
    todo = candidates(recipe, topology)
    found: list[tuple[Candidate, step_cost.StepCost]] = []
    refused: list[Candidate] = []
    start, measured = time.perf_counter(), 0
    for done, candidate in enumerate(todo):
        if any(candidate.needs_more_than(other) for other in refused):
            continue
        try:
            cost, _ = measure(recipe, topology, "fast", candidate.mesh, candidate.overrides)
        except UserError as error:
            logging.info("%s: %s", candidate.flags, error)
            refused.append(candidate)
            continue
        measured += 1
        if cost.fits is False:
            refused.append(candidate)
        else:
            found.append((candidate, cost))
            _write_search(recipe, topology, path, found)
        left = (time.perf_counter() - start) / measured * (len(todo) - done - 1)
        logging.info(
            "%d of %d, at most %d s left: %s %s", done + 1, len(todo), left, candidate.flags,
            format_bytes(cost.needed_bytes) if cost.fits is not False else "does not fit",
        )  # fmt: skip
    rows = _write_search(recipe, topology, path, found)
    print(cost_report.search_text(recipe.name, topology, rows))


def _write_search(
    recipe: Recipe,
    topology: topologies.Topology,
    path: pathlib.Path,
    found: Sequence[tuple[Candidate, step_cost.StepCost]],
) -> list[dict[str, Any]]:
    """Writes what was found so far, the best first: a search may be stopped at any time."""
    # Time is not to be had at fast effort: the least to compute, then the least to send.
    ranked = sorted(
        found, key=lambda item: (item[1].analytic.flops, cost_report.sent_bytes(item[1]))
    )
    rows = [cost_report.search_row(candidate.flags, cost) for candidate, cost in ranked]
    _write(path, {"recipe": recipe.name, "topology": topology.name, "fits": rows})
    return rows


if __name__ == "__main__":
    from clipa_t5x import main

    main.run("precompile")
