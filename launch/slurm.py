"""Writes an sbatch script of a job: `python -m launch.slurm --gin_file=... --output=job.sbatch`.

The script starts the trainer's processes by srun, which join by SLURM's variables. When one dies,
SLURM ends the others and the script starts all again, in the same allocation; before the time limit
and on preemption they save, and the job goes back to the queue. It ends with 0: done, 1: given up,
2: a user's mistake, 75: stopped, or back in the queue.
"""

import argparse
import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Sequence

from clipa_t5x import topologies
from clipa_t5x.errors import UserError
from clipa_t5x.preemption import RESTART_STATUS
from launch import job, restarts

# What sbatch reads in comments has no quotes that could be trusted.
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,@+-]*")
_TIME = re.compile(r"(\d+-)?\d+(:\d\d?){0,2}")
_OPTION = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9_.,:/@%+*-]+)?")

# srun tells of all tasks the highest status: so what no restart mends is made the highest.
_MISTAKE, _FAILURE = 254, 255
_OUT_OF_MEMORY = 253  # srun's own, of a task that was killed for it.


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What is asked of SLURM.

    Attributes:
      nodes: how many.
      processes_per_node: of the trainer.
      gpus_per_node: 0 for CPUs.
      devices_per_process: of each; on a CPU, virtual ones.
      cpus_per_process: None leaves it to SLURM.
      time: limit, as SLURM writes it; None: the partition's.
      partition: None: the default one.
      account: None: the user's.
      save_seconds: before the time limit, in which the run saves.
      options: further ones of sbatch, such as '--mem=0'.
    """

    nodes: int
    processes_per_node: int
    gpus_per_node: int
    devices_per_process: int
    cpus_per_process: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    save_seconds: int = 300
    options: tuple[str, ...] = ()

    @property
    def num_processes(self) -> int:
        """On all nodes."""
        return self.nodes * self.processes_per_node

    def check(self) -> None:
        """Refuses what SLURM would read otherwise than it is meant.

        Raises:
          UserError: which value, and what it may be.
        """
        words = {"partition": self.partition, "account": self.account}
        for name, value in words.items():
            if value is not None and not _WORD.fullmatch(value):
                raise UserError(f"--{name}={value!r}: letters, digits and _ . , @ + - make a name.")
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise UserError(f"--time={self.time!r}: write it as 30, 12:00:00 or 2-12:00:00.")
        for option in self.options:
            if not _OPTION.fullmatch(option):
                raise UserError(
                    f"--option={option!r}: write it as --option=--mem=0, without quotes."
                )
        if self.cpus_per_process is not None and self.cpus_per_process < 1:
            raise UserError(f"--cpus_per_process={self.cpus_per_process}: there is at least one.")
        if not 60 <= self.save_seconds <= 65535:
            raise UserError(f"--save_seconds={self.save_seconds}: SLURM takes 60 to 65535.")

    def lines(self, name: str) -> list[str]:
        """Options of sbatch."""
        asked = {
            "job-name": name,
            "nodes": self.nodes,
            "ntasks-per-node": self.processes_per_node,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_process,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "output": f"{name}-%j.log",
            "open-mode": "append",
            # To the script alone. The processes hear of it by the script; SIGTERM, which SLURM
            # sends to all when it ends a job by itself, they hear of directly.
            "signal": f"B:USR1@{self.save_seconds}",
        }
        options = [f"--{key}={value}" for key, value in asked.items() if value is not None]
        return [f"#SBATCH {option}" for option in (*options, "--requeue", *self.options)]


def allocation(spec: job.JobSpec, arguments: argparse.Namespace) -> Allocation:
    """What a job and the flags ask for, checked.

    Raises:
      UserError: they do not fit together.
    """
    topology = topologies.parse(spec.topology)
    if topology.kind.torus_dims or spec.image is not None:
        what = f"image is {spec.image!r}" if spec.image else f"--topology={spec.topology}"
        raise UserError(f"{what}: launch.slurm runs a folder's package on CPUs and GPUs.")
    nodes, given = arguments.nodes, arguments.gpus_per_node
    is_gpu = topology.kind.name != "cpu"
    gpus = given if given is not None else topology.num_chips // max(nodes, 1) * is_gpu
    per_node = arguments.processes_per_node
    per_node = max(gpus, 1) if per_node is None else per_node
    if nodes < 1 or per_node < 1 or gpus < 0:
        raise UserError(
            f"--nodes={nodes} --processes_per_node={per_node} --gpus_per_node={gpus}: there is at "
            "least one node, and one process on it."
        )
    is_default = spec.topology == job.default("topology")
    devices = gpus if gpus or is_gpu else topology.num_chips // nodes
    if is_default and not gpus:
        devices = per_node
    if devices % per_node or not devices:
        raise UserError(
            f"{devices} devices of a node (--topology={spec.topology}, --gpus_per_node={gpus}) are "
            f"not to be divided among --processes_per_node={per_node}."
        )
    if not is_default and (devices * nodes != topology.num_chips or is_gpu != bool(gpus)):
        raise UserError(
            f"--topology={spec.topology} is not what --nodes={nodes} with --gpus_per_node={gpus} "
            "have."
        )
    made = Allocation(
        nodes=nodes,
        processes_per_node=per_node,
        gpus_per_node=gpus,
        devices_per_process=devices // per_node,
        cpus_per_process=arguments.cpus_per_process,
        time=arguments.time,
        partition=arguments.partition,
        account=arguments.account,
        save_seconds=arguments.save_seconds,
        options=tuple(arguments.option or ()),
    )
    made.check()
    return made


def script(spec: job.JobSpec, asked: Allocation, python: str = "python3") -> str:
    """The sbatch script of a job.

    Args:
      spec: the job.
      asked: of SLURM.
      python: program on the nodes.
    """
    command = spec.command(python)
    if asked.num_processes > 1:
        command.append("--multiprocess")
    policy = spec.restarts
    return _SCRIPT.format(
        options="\n".join(asked.lines(spec.name)),
        environment="\n".join(_exports(spec, asked)),
        max_restarts=policy.max_restarts,
        first_delay=math.ceil(policy.first_delay),
        max_delay=math.ceil(policy.max_delay),
        healthy_seconds=math.ceil(policy.healthy_seconds),
        name=spec.name,
        command=job.quoted(command),
        srun=job.quoted(_srun(spec, asked)),
        task=job.quoted([_task(asked)]),
        restart="|".join(map(str, _restart_statuses())),
        out_of_memory=_OUT_OF_MEMORY,
        mistake=_MISTAKE,
        stopped=RESTART_STATUS,
    )


def _exports(spec: job.JobSpec, asked: Allocation) -> list[str]:
    variables = dict(spec.environment)
    if asked.gpus_per_node:
        variables["JAX_PLATFORMS"] = "cuda,cpu"  # Without a GPU it fails.
    else:
        variables |= job.cpu_devices(asked.devices_per_process, variables)
    return [f"export {job.quoted([f'{name}={value}'])}" for name, value in variables.items()]


def _srun(spec: job.JobSpec, asked: Allocation) -> list[str]:
    made = ["srun", "--kill-on-bad-exit=1", "--label", f"--chdir={spec.package or '.'}"]
    if asked.gpus_per_node:
        made.append("--gpu-bind=none")  # Which are whose, each process is told by number.
    if asked.cpus_per_process:
        made.append(f"--cpus-per-task={asked.cpus_per_process}")  # Not srun's by sbatch's.
    return made


def _restart_statuses() -> list[int]:
    return sorted(status for status in restarts.RESTART_STATUSES if status > 0)


def _task(asked: Allocation) -> str:
    """What each task runs, its command as arguments."""
    ids = ""
    if asked.gpus_per_node:
        count = asked.devices_per_process  # By default jax takes one a process under SLURM.
        ids = (
            f"first=$((SLURM_LOCALID * {count}))\n"
            f'export JAX_LOCAL_DEVICE_IDS=$(seq -s, "$first" "$((first + {count - 1}))")\n'
        )
    kept = "|".join(map(str, [0, *_restart_statuses()]))
    return (
        f"{ids}trap : TERM INT\n"
        '"$@"\n'
        "status=$?\n"
        f"case $status in {kept}) ;; 2) status={_MISTAKE} ;; *) status={_FAILURE} ;; esac\n"
        'exit "$status"'
    )


_SCRIPT = """\
#!/bin/bash
{options}

# Written by launch.slurm; to be submitted by sbatch, in the folder where it is to run.
set -u
{environment}

max_restarts={max_restarts} first_delay={first_delay} max_delay={max_delay}
healthy_seconds={healthy_seconds}
command=({command})
task={task}

say() {{ echo "launch: $*" >&2; }}

# Restarts in an allocation are counted in a file, for they are still counted when the job has been
# requeued; requeues are counted by SLURM.
count_file=$PWD/{name}-$SLURM_JOB_ID.restarts
restarts=0
if [[ -f $count_file ]]; then restarts=$(<"$count_file"); fi
if [[ ! $restarts =~ ^[0-9]{{1,9}}$ ]]; then restarts=0; fi

signals=0 requeue=0 stopped=0
on_notice() {{
  signals=$((signals + 1))
  if ((requeue)); then return; fi
  requeue=1
  say "the time limit is near, or the job is preempted: the run is told to save"
  # srun would make SIGKILL of a SIGTERM of its own.
  scancel --signal=TERM "$SLURM_JOB_ID"
}}
on_stop() {{ signals=$((signals + 1)); stopped=1; say "the job is ended: the run saves"; }}
trap on_notice USR1
trap on_stop TERM INT

# Waits for a process; sets status.
await() {{
  local heard
  while true; do
    heard=$signals
    wait "$1"
    status=$?
    # A signal ends the wait, not the process.
    if ((signals == heard)); then return; fi
  done
}}

short_lives=0
while true; do
  total=$((restarts + ${{SLURM_RESTART_COUNT:-0}}))
  say "start $((total + 1)) of at most $((max_restarts + 1)): job $SLURM_JOB_ID"
  begun=$SECONDS
  {srun} bash -c "$task" task "${{command[@]}}" &
  await $!
  lived=$((SECONDS - begun))
  case $status in
    0) say "done after $((total + 1)) starts"; exit 0 ;;
    {restart}|{out_of_memory}) ;;
    {mistake}) say "given up: the trainer was given something wrong, which no restart mends"
      exit 2 ;;
    *) say "given up: status $status, which no restart mends"; exit 1 ;;
  esac
  if ((stopped)); then
    say "stopped with status $status; submitted again, the job goes on"
    exit {stopped}
  fi
  if ((total >= max_restarts)); then
    say "given up: status $status, after $total restarts (max_restarts = $max_restarts)"
    exit 1
  fi
  if ((requeue)); then
    say "status $status after $lived s: back to the queue"
    scontrol requeue "$SLURM_JOB_ID" || say "it cannot be requeued: submit it again"
    exit {stopped}
  fi
  if ((lived >= healthy_seconds)); then short_lives=0; fi
  delay=$first_delay
  for ((i = 0; i < short_lives && delay < max_delay; i++)); do delay=$((2 * delay)); done
  if ((delay > max_delay)); then delay=$max_delay; fi
  short_lives=$((short_lives + 1))
  restarts=$((restarts + 1))
  echo "$restarts" >"$count_file"
  say "status $status after $lived s: restart $((total + 1)) of at most $max_restarts in $delay s"
  sleep "$delay" &
  pause=$!
  wait "$pause"
  # A signal meanwhile: there is nothing to save.
  if ((stopped)); then exit {stopped}; fi
  if ((requeue)); then
    scontrol requeue "$SLURM_JOB_ID" || say "it cannot be requeued: submit it again"
    exit {stopped}
  fi
done
"""


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser("python -m launch.slurm", description=__doc__)
    job.add_arguments(made)
    add = made.add_argument
    add("--nodes", type=int, default=1)
    add("--processes_per_node", type=int, help="default: one for each GPU, or one")
    add("--gpus_per_node", type=int, help="default: the topology's, divided by --nodes")
    add("--cpus_per_process", type=int, help="cores for each, which read and decode data")
    add("--time", help="limit; before it, the job saves and goes back to the queue")
    add("--partition")
    add("--account")
    add("--save_seconds", type=int, default=300, help="before the time limit, to save in")
    add("--option", action="append", help="of sbatch, repeatable: --option=--mem=0")
    add("--python", default="python3", help="on the nodes, such as .venv/bin/python")
    add("--output", help="the script to write")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the status to end with."""
    return job.exit_status(_run, argv)


def _run(argv: Sequence[str]) -> int:
    spec, arguments = job.parse_arguments(parser(), argv)
    text = script(spec, allocation(spec, arguments), arguments.python)
    if "\0" in text:
        raise UserError("a value has a character of code 0, which no command can take.")
    if not (arguments.output or arguments.dry_run):
        raise UserError("give --output=FILE for the script, or --dry_run to see it.")
    from launch import recipe_check  # Imports the trainer.

    recipe_check.check_recipe(spec)
    if arguments.dry_run:
        print(text, end="")
        return 0
    try:
        pathlib.Path(arguments.output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output={arguments.output}: {error.strerror}.") from error
    print(f"submit it by: {job.quoted(['sbatch', arguments.output])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
