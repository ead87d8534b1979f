"""A run of one or several processes on this machine: `python -m launch.local --gin_file=... ...`.

`--num_processes=2 --devices_per_process=4` starts two processes that join over loopback, on virtual
CPU devices, or each on its share of the GPUs. When one dies, the others end and all are started
again. Status 0: done. 1: given up. 2: a user's mistake. 75: stopped by a signal, and goes on when
given again. 130, 143: a second signal.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import random
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from clipa_t5x import topologies
from clipa_t5x.errors import UserError
from clipa_t5x.preemption import RESTART_STATUS
from launch import job, process_group, restarts

# After the time in which the trainer's processes find that one is gone: to say so, and to end.
_MARGIN_SECONDS = 30.0
_PEER_TIMEOUT_SECONDS = 100  # As the trainer's flag has it.
_POLL_SECONDS = 0.05


def supervise(
    commands: Callable[[], Sequence[process_group.Command]],
    policy: job.RestartPolicy,
    patience: float,
    cwd: str = ".",
) -> int:
    """Starts processes, again and again as `policy` allows, until they are done.

    Args:
      commands: makes those of a start.
      policy: of restarts.
      patience: seconds that the others have to end by themselves when one has failed.
      cwd: the folder that they run in.

    Returns:
      The status that this process is to end with; see the module.
    """
    attempts, begun = restarts.Restarts(policy), time.monotonic()
    with process_group.received_signals() as signals:
        while True:
            start = list(commands())
            _announce(start, attempts.count, policy)
            lived = time.monotonic()
            with process_group.ProcessGroup(start, cwd, _shown(len(start))) as group:
                statuses = process_group.attend(group, signals, patience, _say)
            lived = time.monotonic() - lived
            if signals and any(statuses):
                return _stopped(signals, statuses)
            decision = attempts.after(statuses, lived)
            if decision.delay is None:
                return _ended(decision, statuses, attempts.count, time.monotonic() - begun)
            ended = ", ".join(map(process_group.described, statuses))
            _say(
                f"restart {attempts.count} of at most {policy.max_restarts} in "
                f"{decision.delay:.0f} s: a start of {lived:.0f} s ended with {ended}."
            )
            if not _wait(decision.delay, signals):
                _say(f"told to stop before it: this ends with status {RESTART_STATUS}.")
                return RESTART_STATUS


def _announce(
    start: Sequence[process_group.Command], restarted: int, policy: job.RestartPolicy
) -> None:
    logs = start[0].log.parent
    counts = f"start {restarted + 1} of at most {policy.max_restarts + 1}"
    _say(f"{counts}: {len(start)} process{'es' * (len(start) > 1)}, logs in {logs}")


def _stopped(signals: Sequence[int], statuses: Sequence[int]) -> int:
    if len(signals) > 1:
        return 128 + signals[1]
    failure = restarts.Restarts(job.RestartPolicy()).after(statuses, 0).failure
    if failure:
        _say(f"told to stop, and failed: {failure}.")
        return _failed(statuses)
    _say(f"stopped: this ends with status {RESTART_STATUS}; given again, the command goes on.")
    return RESTART_STATUS


def _ended(
    decision: restarts.Decision, statuses: Sequence[int], restarted: int, seconds: float
) -> int:
    times = f"after {restarted + 1} start{'s' * (restarted > 0)}, {seconds:.0f} s"
    if not decision.failure:
        _say(f"done {times}.")
        return 0
    _say(f"given up {times}: {decision.failure}.")
    return _failed(statuses)


def _failed(statuses: Sequence[int]) -> int:
    """The user's mistake, of which the trainer has told in a line, or any other failure."""
    return 2 if 2 in statuses and 1 not in statuses else 1


def _wait(seconds: float, signals: Sequence[int]) -> bool:
    """Waits; False where a signal came."""
    until = time.monotonic() + seconds
    while not signals and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    return not signals


def _say(text: str) -> None:
    _write(2, f"launch: {text}\n")


def _shown(count: int) -> Callable[[int, str], None]:
    """Shows lines of several processes with their numbers."""
    if count == 1:
        return lambda number, line: _write(1, f"{line}\n")
    return lambda number, line: _write(1, f"[{number}] {line}\n")


def _write(descriptor: int, text: str) -> None:
    """Writes, if anybody is there: a closed terminal is no reason to lose a run."""
    data = text.encode(errors="replace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Processes and their devices.

    Attributes:
      kind: 'cpu', 'gpu', or 'tpu' for all of this machine's.
      num_processes: how many.
      devices_per_process: of each.
    """

    kind: str
    num_processes: int
    devices_per_process: int

    def environment(self, index: int, given: Mapping[str, str]) -> dict[str, str]:
        """Variables by which a process sees its own devices.

        Args:
          index: of the process.
          given: variables that it gets otherwise.

        Raises:
          UserError: CUDA_VISIBLE_DEVICES names too few.
        """
        if self.kind == "cpu":
            return job.cpu_devices(self.devices_per_process, given)
        if self.kind == "tpu":
            return {}
        needed = self.num_processes * self.devices_per_process
        visible = given.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(needed))))
        devices = [name for name in visible.split(",") if name]
        if len(devices) < needed:
            raise UserError(
                f"CUDA_VISIBLE_DEVICES is {visible!r}: {self.num_processes} processes of "
                f"{self.devices_per_process} need {needed}."
            )
        first = index * self.devices_per_process
        own = devices[first : first + self.devices_per_process]
        return {
            "JAX_PLATFORMS": "cuda,cpu",  # Without a GPU it fails, and does not go to the CPU.
            "CUDA_VISIBLE_DEVICES": ",".join(own),
            # Within an allocation of SLURM jax would take one device alone.
            "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(len(own)))),
        }


def layout(spec: job.JobSpec, num_processes: int, devices_per_process: int | None) -> Layout:
    """How a job's devices are divided among processes.

    Args:
      spec: the job.
      num_processes: how many.
      devices_per_process: of each; None divides the topology's.

    Raises:
      UserError: they do not fit together, or are not of one machine.
    """
    topology = topologies.parse(spec.topology)
    if spec.image is not None:
        raise UserError(
            f"image is {spec.image!r}: launch.local runs no containers; give --package."
        )
    if num_processes < 1 or (devices_per_process is not None and devices_per_process < 1):
        raise UserError(
            f"--num_processes={num_processes} --devices_per_process={devices_per_process}: there "
            "is at least one."
        )
    if topology.kind.torus_dims:
        if num_processes > 1 or spec.num_slices > 1 or devices_per_process is not None:
            raise UserError(
                f"--topology={spec.topology}: on one TPU host launch.local starts one process, for "
                "all of its chips; launch.gce starts slices."
            )
        return Layout("tpu", 1, topology.num_devices)
    if devices_per_process is None:
        devices_per_process = max(topology.num_devices // num_processes, 1)
    elif spec.topology == job.default("topology"):
        topology = dataclasses.replace(topology, num_chips=num_processes * devices_per_process)
    if num_processes * devices_per_process != topology.num_devices:
        raise UserError(
            f"--topology={spec.topology} has {topology.num_devices} devices, and "
            f"--num_processes={num_processes} --devices_per_process={devices_per_process} take "
            f"{num_processes * devices_per_process}."
        )
    kind = "cpu" if topology.kind.name == "cpu" else "gpu"
    return Layout(kind, num_processes, devices_per_process)


def commands(
    spec: job.JobSpec, devices: Layout, log_dir: pathlib.Path
) -> list[process_group.Command]:
    """Those of one start of a job; several processes meet at a port that is free now."""
    given = {**os.environ, **spec.environment}
    port = free_port()
    made = []
    for index in range(devices.num_processes):
        arguments = spec.command(sys.executable)
        environment = {**spec.environment, **devices.environment(index, given)}
        if devices.num_processes > 1:
            arguments += [
                f"--coordinator_address=127.0.0.1:{port}",
                f"--process_count={devices.num_processes}",
                f"--process_index={index}",
            ]
            # Nobody else is to join: by default it listens at all of the machine's addresses.
            environment["JAX_COORDINATOR_BIND_ADDRESS"] = f"127.0.0.1:{port}"
        log = log_dir / f"process_{index}.log"
        made.append(process_group.Command(tuple(arguments), environment, log))
    return made


def free_port() -> int:
    """A port of loopback that nobody has.

    It is taken seconds later, so it is none of those that the kernel may meanwhile give to any
    connection: these are higher.
    """
    while True:
        port = random.randrange(10_000, 32_768)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


def patience(spec: job.JobSpec) -> float:
    """Seconds in which the trainer's processes end when one has died."""
    given = re.findall(r"^--peer_timeout_seconds=(\d+)$", "\n".join(spec.arguments), re.MULTILINE)
    return (int(given[-1]) if given else _PEER_TIMEOUT_SECONDS) + _MARGIN_SECONDS


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser("python -m launch.local", description=__doc__)
    job.add_arguments(made)
    made.add_argument("--num_processes", type=int, default=1)
    made.add_argument(
        "--devices_per_process", type=int, help="default: those of --topology, divided"
    )
    made.add_argument("--log_dir", help="default: logs in MODEL_DIR, or here where that is remote")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the status to end with."""
    return job.exit_status(_run, argv)


def _run(argv: Sequence[str]) -> int:
    spec, arguments = job.parse_arguments(parser(), argv)
    devices = layout(spec, arguments.num_processes, arguments.devices_per_process)
    folder = spec.package or "."
    if not pathlib.Path(folder).is_dir():
        raise UserError(f"package is {folder!r}, which is no folder.")
    is_remote = "://" in spec.model_dir
    default = pathlib.Path("logs", spec.name) if is_remote else pathlib.Path(spec.model_dir, "logs")
    log_dir = pathlib.Path(folder, arguments.log_dir or default)
    if arguments.dry_run:
        _show_plan(spec, commands(spec, devices, log_dir), folder)
        return 0
    # A recipe that would not train is refused by the trainer, before it does anything: to ask it
    # beforehand would take as long again as its start.
    return supervise(
        lambda: commands(spec, devices, log_dir), spec.restarts, patience(spec), folder
    )


def _show_plan(spec: job.JobSpec, made: Sequence[process_group.Command], folder: str) -> None:
    from launch import recipe_check  # Imports the trainer.

    with contextlib.chdir(folder):
        recipe_check.check_recipe(spec)
    for command in made:
        variables = [f"{name}={value}" for name, value in command.environment.items()]
        print(f"# log: {command.log}")
        line = job.quoted(["env", *variables, *command.arguments])
        print(line if folder == "." else f"(cd {job.quoted([folder])} && {line})")


if __name__ == "__main__":
    sys.exit(main())
