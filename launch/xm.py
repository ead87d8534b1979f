"""A job, or a sweep over it, as an XManager experiment: `python -m launch.xm --gin_file=... ...`.

`--sweep='LEARNING_RATE=[1e-3,2e-3] x TEXT_TOKENS=[8,16,32]'` makes six work units (see `sweep`),
each with a MODEL_DIR in the experiment's folder, which is the job's MODEL_DIR. `--executor=local`
runs them on this machine, `--max_parallel` at a time, each under `launch.local`, and ends with a
table (see `results`). `vertex` and `kubernetes` submit them and end. Every recipe is checked before
anything is submitted.

Status 0: all are done, or submitted. 1: some failed. 2: a user's mistake. 75: stopped by a signal,
and goes on when given again.
"""

# XManager is an extra, and not wherever this is checked.
# pyright: reportMissingImports=false

import argparse
import asyncio
import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from clipa_t5x import folders
from clipa_t5x.errors import UserError
from clipa_t5x.preemption import RESTART_STATUS
from launch import guard, job, local, restarts, results, sweep, xm_cloud

_JOB_FILE = "job.yaml"
_DATABASE_FILE = "experiments.sqlite3"
# XManager gives a shell what is to run. It is to be replaced by it: signals are for the command.
_EXEC = "exec"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Plan:
    """An experiment that can be submitted.

    Attributes:
      name: title, and part of names of resources.
      folder: of this machine; of its records and of what the local executor runs.
      units: the work units.
    """

    name: str
    folder: pathlib.Path
    units: Sequence[sweep.WorkUnit]


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser("python -m launch.xm", description=__doc__)
    job.add_arguments(made)
    add = made.add_argument
    add("--sweep", action="append", default=[], help="grid, zip or list of overrides; repeatable")
    add("--executor", choices=("local", *xm_cloud.EXECUTORS), default="local")
    add("--experiment_dir", help="of records and tables; default: MODEL_DIR, where it is local")
    add("--max_parallel", type=int, default=1, help="work units at a time on this machine")
    add("--num_processes", type=int, default=1, help="of a work unit on this machine")
    add("--devices_per_process", type=int, help="on this machine")
    add("--project", help="of Google Cloud, for vertex")
    add("--region", default="us-central1", help="of Vertex AI")
    add("--service_account", help="that work units run as")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the status to end with."""
    return job.exit_status(_run, argv)


def _run(argv: Sequence[str]) -> int:
    spec, arguments = job.parse_arguments(parser(), argv)
    plan = make_plan(spec, arguments)
    if arguments.executor != "local":
        cloud = xm_cloud.executor(arguments)
        for unit in plan.units:
            cloud.check(unit.spec)
        if arguments.dry_run:
            print(cloud.shown(plan.units), end="")
            return 0
        with library(plan):
            return _submit(plan, cloud)
    local.layout(spec, arguments.num_processes, arguments.devices_per_process)
    if arguments.max_parallel < 1:
        raise UserError(f"--max_parallel={arguments.max_parallel}: there is at least one.")
    commands = {unit.name: _command(plan, unit, arguments) for unit in plan.units}
    if arguments.dry_run:
        _show(plan, commands)
        return 0
    with library(plan):
        return asyncio.run(run_here(plan, commands, arguments.max_parallel))


def make_plan(spec: job.JobSpec, arguments: argparse.Namespace) -> Plan:
    """The experiment of a job and its sweeps, all its recipes checked.

    Raises:
      UserError: a sweep, or what would be submitted by it, is refused, and why.
    """
    package = spec.package or "."
    if not pathlib.Path(package).is_dir():
        raise UserError(f"package is {package!r}, which is no folder.")
    is_remote = "://" in spec.model_dir
    if is_remote and arguments.executor == "local" and not arguments.experiment_dir:
        raise UserError(
            f"model_dir is {spec.model_dir}: give --experiment_dir=DIR, a folder of this machine "
            "for the experiment's records."
        )
    remote_default = pathlib.Path("experiments", spec.name)
    folder = remote_default if is_remote else pathlib.Path(package, spec.model_dir)
    if arguments.experiment_dir:
        folder = pathlib.Path(arguments.experiment_dir)
    units = sweep.work_units(spec, arguments.sweep)
    with contextlib.chdir(package):
        sweep.check(units)
    return Plan(spec.name, folder, units)


def _job_file(plan: Plan, unit: sweep.WorkUnit) -> pathlib.Path:
    return plan.folder / unit.name / _JOB_FILE


def _command(plan: Plan, unit: sweep.WorkUnit, arguments: argparse.Namespace) -> list[str]:
    """What a work unit runs on this machine: its launcher, which ends when this process does."""
    command = [sys.executable, "-m", "launch.local", f"--job={_job_file(plan, unit)}"]
    if arguments.num_processes > 1:
        command.append(f"--num_processes={arguments.num_processes}")
    if arguments.devices_per_process is not None:
        command.append(f"--devices_per_process={arguments.devices_per_process}")
    return guard.guarded(command)


def _show(plan: Plan, commands: dict[str, list[str]]) -> None:
    print(f"# {len(plan.units)} work units; records in {plan.folder}")
    for unit in plan.units:
        print(f"\n# work unit {unit.name}: {_job_file(plan, unit)} will be")
        print("".join(f"#   {line}\n" for line in unit.spec.as_yaml().splitlines()), end="")
        print(job.quoted([_EXEC, *commands[unit.name]]))


@contextlib.contextmanager
def _lifeline() -> Iterator[None]:
    """What is started within has a pipe as stdin that breaks when this process dies; see `guard`.

    XManager hands stdin on; afterwards it is empty.
    """
    reader, writer = os.pipe()
    os.dup2(reader, 0)
    os.close(reader)
    try:
        yield
    finally:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.close(writer)


@contextlib.contextmanager
def library(plan: Plan) -> Iterator[None]:
    """XManager, with its database in the experiment's folder and not in the user's.

    Raises:
      UserError: it is not installed, or the folder cannot be.
    """
    try:
        from absl import flags
        from xmanager import xm_flags
        from xmanager.xm_local.storage import database
    except ImportError as error:
        raise xm_cloud.not_installed(error) from error
    settings = {"backend": "sqlite", "db_name": str(plan.folder.absolute() / _DATABASE_FILE)}
    config = plan.folder.absolute() / "database.yaml"
    _make_folder(config.parent)
    config.write_text(
        yaml.safe_dump({"sql_connector": "sqlite", "sql_connection_settings": settings})
    )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    flags.FLAGS[xm_flags.DB_YAML_CONFIG_PATH.name].value = str(config)
    caches = (database.database, database.db_settings, database.db_connector, database._db_config)
    for cached in caches:  # Of an experiment before, in this process.
        cached.cache_clear()
    yield


def _make_folder(path: pathlib.Path) -> None:
    folders.make(str(path), "the experiment's folder", "take another by --experiment_dir=DIR")


def _submit(plan: Plan, cloud: xm_cloud.Cloud) -> int:
    results.Record.begin(plan.folder, plan.units)
    asyncio.run(cloud.submit(plan.name, plan.units))
    print(
        f"launch: {len(plan.units)} work units are submitted; their MODEL_DIRs are in "
        f"{plan.folder / results.RECORD_FILE}.",
        file=sys.stderr,
    )
    return 0


async def run_here(plan: Plan, commands: dict[str, list[str]], max_parallel: int) -> int:
    """Runs the work units on this machine, and prints their table."""
    for unit in plan.units:
        path = _job_file(plan, unit)
        _make_folder(path.parent)
        path.write_text(unit.spec.as_yaml(), encoding="utf-8")
    runner = _Runner(results.Record.begin(plan.folder, plan.units), max_parallel)
    loop = asyncio.get_running_loop()
    for signum in _SIGNALS:
        loop.add_signal_handler(signum, runner.stop)
    with _lifeline():
        await _run_all(plan.name, commands, runner)
    print(results.report(runner.record))
    return runner.status()


async def _run_all(name: str, commands: dict[str, list[str]], runner: "_Runner") -> None:
    """Makes an experiment of the work units, and waits for all of them."""
    from xmanager import xm, xm_local
    from xmanager.xm_local import executables

    async with xm_local.create_experiment(name) as experiment:
        executable = executables.LocalBinary(name=name, command=_EXEC)
        jobs = {
            unit: xm.Job(executable, xm_local.Local(), name=unit, args=command)
            for unit, command in commands.items()
        }
        await asyncio.gather(*(runner.run(experiment, unit, jobs[unit]) for unit in jobs))


class _Runner:
    """Adds work units to an experiment, so many at a time, until it is told to stop."""

    def __init__(self, record: results.Record, max_parallel: int):
        self.record = record
        self.statuses: dict[str, int] = {}
        self._places = asyncio.Semaphore(max_parallel)
        self._running: dict[str, Any] = {}
        self._is_stopped = False

    async def run(self, experiment: Any, name: str, xm_job: Any) -> None:
        """Runs one when there is a place for it."""
        from xmanager import xm

        async with self._places:
            if self._is_stopped:
                return
            unit = await experiment.add(xm_job)
            # Of a work unit on this machine XManager shows neither its status nor a way to stop it.
            [self._running[name]] = unit._local_execution_handles
            if self._is_stopped:
                self._running[name].terminate()
            with contextlib.suppress(xm.ExperimentUnitFailedError):
                await unit.wait_until_complete()
            unit._local_execution_handles.clear()  # XManager would tell of failures again.
            status = self._running.pop(name).process.returncode
            # Told before it could listen, it died of that; it goes on when given again.
            is_stopped = self._is_stopped and status in restarts.RESTART_STATUSES
            self.statuses[name] = RESTART_STATUS if is_stopped else status
            self.record.ended(name, self.statuses[name])

    def stop(self) -> None:
        """Has those that run save and end, and begins no more; again, it ends them at once."""
        print(f"launch: {len(self._running)} work units are told to stop.", file=sys.stderr)
        self._is_stopped = True
        for handle in self._running.values():
            handle.terminate()

    def status(self) -> int:
        """That this process ends with."""
        failed = [status for status in self.statuses.values() if status not in (0, RESTART_STATUS)]
        if failed:
            return 1
        return RESTART_STATUS if self._is_stopped or any(self.statuses.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
