"""Experiments by XManager: `python -m launch.xm --gin_file=... --sweep=...`.

Each work unit of the sweep is a job with a MODEL_DIR of its own under --model_dir. On this machine
it runs under `launch.local`, which begins it again when it is killed; on Vertex AI or Kubernetes it
is a container of --image. At the end there is a table of results.
"""

import argparse
import asyncio
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from clipa_t5x import topologies
from clipa_t5x.errors import UserError
from launch import job, results, sweep

EXECUTORS = ("local", "vertex", "kubernetes")
_INSTALL = "XManager is not installed: pip install 'clipa_t5x[xmanager]'."

# XManager's names of accelerators.
_RESOURCES = {
    "v4": "TPU_V4", "v5e": "TPU_V5E", "v5p": "TPU_V5P", "v6e": "TPU_V6E", "tpu7x": "TPU_V7X",
    "gpu-a100": "A100_80GIB", "gpu-h100": "H100", "gpu-h200": "H200",
}  # fmt: skip


def local_command(unit: sweep.WorkUnit) -> list[str]:
    """What runs a work unit on this machine; its job's file is in its MODEL_DIR."""
    return [sys.executable, "-m", "launch.local", f"--job={_job_file(unit)}"]


def _job_file(unit: sweep.WorkUnit) -> pathlib.Path:
    return pathlib.Path(unit.spec.model_dir) / "job.yaml"


def requirements(spec: job.JobSpec) -> dict[str, Any]:
    """What XManager is asked for, by its names: {'TPU_V5E': 256}.

    Raises:
      UserError: it has no such accelerator.
    """
    topology = topologies.parse(spec.topology)
    kind = topology.kind.name
    if kind == "cpu":
        return {"cpu": topology.num_chips}
    if kind not in _RESOURCES:
        raise UserError(f"XManager has no accelerator {kind}: {', '.join(_RESOURCES)} it has.")
    if topology.shape and len(topology.shape) > 1:
        return {_RESOURCES[kind]: "x".join(map(str, topology.shape))}
    return {_RESOURCES[kind]: topology.num_chips}


def _xmanager() -> tuple[Any, Any]:
    try:
        from xmanager import xm, xm_local  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{_INSTALL} ({error})") from error
    return xm, xm_local


def cloud_job(unit: sweep.WorkUnit, executor: str) -> tuple[Any, Any]:
    """(packageable, executor) of XManager's that a container of a work unit is submitted as.

    Raises:
      UserError: there is no --image, or XManager is not installed or has no such accelerator.
    """
    xm, xm_local = _xmanager()
    if unit.spec.image is None:
        raise UserError(f"--executor={executor} runs a container: give --image=REGISTRY/NAME:TAG.")
    chosen = {"vertex": xm_local.Vertex, "kubernetes": xm_local.Kubernetes}[executor]
    command = unit.spec.command()
    packageable = xm.container(
        chosen.Spec(), image_path=unit.spec.image, args=command,
        env_vars=dict(unit.spec.environment),
    )  # fmt: skip
    needs = xm.JobRequirements(**requirements(unit.spec), replicas=unit.spec.num_slices)
    return packageable, chosen(requirements=needs)


def describe(units: Sequence[sweep.WorkUnit], executor: str) -> str:
    """What would be submitted, as text for people: of every work unit its job and command."""
    blocks = []
    for number, unit in enumerate(units, 1):
        lines = [f"# work unit {number}: {unit.name}"]
        if executor == "local":
            lines += [f"# {_job_file(unit)}:", unit.spec.as_yaml().rstrip()]
            lines.append(job.quoted(local_command(unit)))
        else:
            needs = ", ".join(f"{k}={v}" for k, v in requirements(unit.spec).items())
            lines.append(f"# {executor}, image {unit.spec.image}, {unit.spec.num_slices} x {needs}")
            lines += [f"# {name}={value}" for name, value in unit.spec.environment.items()]
            lines.append(job.quoted(unit.spec.command()))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _use_database(folder: pathlib.Path) -> None:
    """XManager's own records go beside the experiment, not into the home directory."""
    from absl import flags
    from xmanager import xm_flags  # noqa: F401  # pyright: ignore[reportMissingImports]

    folder.mkdir(parents=True, exist_ok=True)
    database = folder.absolute() / "xmanager.sqlite3"
    settings = folder.absolute() / "xmanager.yaml"
    settings.write_text(
        "sql_connector: sqlite\n"
        f"sql_connection_settings: {{backend: sqlite, db_name: {str(database)!r}}}\n"
    )
    flags.FLAGS(["launch.xm", f"--xm_db_yaml_config_path={settings}"], known_only=True)


async def _submit(title: str, units: Sequence[sweep.WorkUnit], executor: str, parallel: int) -> int:
    """Submits all work units, at most so many at a time; how many failed."""
    xm, xm_local = _xmanager()
    room = asyncio.Semaphore(parallel)
    failed = 0
    async with xm_local.create_experiment(experiment_title=title) as experiment:

        def package(unit: sweep.WorkUnit) -> tuple[Any, Any]:
            if executor != "local":
                packageable, place = cloud_job(unit, executor)
            else:
                _job_file(unit).parent.mkdir(parents=True, exist_ok=True)
                _job_file(unit).write_text(unit.spec.as_yaml())
                python, *arguments = local_command(unit)
                packageable = xm.binary(xm_local.Local.Spec(), path=python, args=arguments)
                place = xm_local.Local(experimental_stream_output=True)
            (executable,) = experiment.package([packageable])
            return executable, place

        async def run(unit: sweep.WorkUnit) -> None:
            nonlocal failed
            async with room:
                executable, place = package(unit)
                added = await experiment.add(xm.Job(executable, executor=place, name=unit.name))
                try:
                    await added.wait_until_complete()
                except Exception as error:  # XManager's own kinds, of a process that failed.
                    failed += 1
                    print(f"work unit {unit.name} failed: {error}", file=sys.stderr)

        await asyncio.gather(*map(run, units))
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m launch.xm", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    job.add_arguments(parser)
    add = parser.add_argument
    add("--sweep", action="append", default=[], help="see launch/sweep.py; repeatable")
    add("--executor", choices=EXECUTORS, default="local")
    add("--max_parallel", type=int, default=1, help="work units at a time; default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs an experiment; status 0, 1 where a work unit failed, or 2 after a user's mistake."""
    return job.exit_status(_run, argv)


def _run(argv: Sequence[str]) -> int:
    spec, arguments = job.parse_arguments(_parser(), argv)
    units = sweep.work_units(spec, arguments.sweep)
    sweep.check(units)
    if arguments.dry_run:
        print(describe(units, arguments.executor))
        return 0
    if arguments.max_parallel < 1:
        raise UserError(f"--max_parallel is {arguments.max_parallel}: at least 1 runs.")
    _xmanager()
    _use_database(pathlib.Path(spec.model_dir))
    results.write_experiment(spec.model_dir, units)
    failed = asyncio.run(_submit(spec.name, units, arguments.executor, arguments.max_parallel))
    print(results.write(spec.model_dir))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
