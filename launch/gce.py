"""Jobs on Cloud TPU: `python -m launch.gce {run,status,stop,delete} --project=... --zone=... ...`.

`run` rents the machines of a job by a queued resource, starts it on every worker, shows worker 0's
log, rents others when they are taken away, and gives all back at its end. Killed, it goes on where
it is run again: all that it remembers is at the service and on the workers. One signal has the job
save and end. Status 0: done. 1: given up. 2: a mistake, or the service's refusal. 75: stopped, and
goes on when run again.
"""

import argparse
import contextlib
import dataclasses
import getpass
import math
import pathlib
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

from clipa_t5x import gin_utils, topologies
from clipa_t5x.errors import UserError
from clipa_t5x.preemption import RESTART_STATUS
from launch import controller, job, package, workers
from launch.clock import Clock, duration

try:
    from launch import cloud_tpu
except UserError as error:  # There is no client.
    if __name__ != "__main__":
        raise
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

# The machines' own Python is older than the project's.
SETUP = (
    "python3 -m pip install --user --quiet uv && python3 -m uv venv --quiet --python 3.11 .venv && "
    "python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu]' "
    "--constraint constraints.txt"
)
_PYTHON = ".venv/bin/python"
PATIENCE = controller.Patience()

# name, command. What a killed `docker run` left behind is removed; by its own name alone. Signals
# do not reach what sudo runs: they go by way of docker.
_CONTAINER = r"""
name=$1
shift
sudo docker rm --force "$name" >/dev/null 2>&1
trap 'sudo docker kill --signal=TERM "$name" >/dev/null' TERM
"$@" &
child=$!
wait "$child"
status=$?
while [ -n "$(jobs -r)" ]; do
  wait "$child"
  status=$?
done
exit "$status"
"""


def plan(spec: job.JobSpec, setup: str) -> workers.Plan:
    """What every worker runs.

    Raises:
      UserError: the package cannot be packed.
    """
    multiprocess = () if "--multiprocess" in spec.arguments else ("--multiprocess",)
    spec = dataclasses.replace(spec, arguments=(*spec.arguments, *multiprocess))
    environment = tuple(spec.environment.items())
    if spec.image is None:
        packed = package.pack(str(spec.package))
        command = tuple(spec.command(_PYTHON))
        return workers.Plan(spec.name, command, environment, packed, setup)
    container = f"clipa_t5x-{spec.name}"
    run = ["sudo", "docker", "run", "--privileged", "--net=host", f"--name={container}"]
    run += [f"--env={name}={value}" for name, value in environment]
    command = ["bash", "-c", _CONTAINER, "clipa_t5x", container, *run, spec.image, *spec.command()]
    pull = job.quoted(["sudo", "docker", "pull", "--quiet", spec.image])
    return workers.Plan(spec.name, tuple(command), (), None, pull)


@dataclasses.dataclass(frozen=True)
class Login:
    """How workers are logged in to: `user`, and `key`, a private key's file beside its '.pub'."""

    user: str
    key: pathlib.Path

    def __post_init__(self):
        if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", self.user):
            raise UserError(f"--ssh_user is {self.user!r}: it takes a user's name.")

    def metadata(self) -> str:
        """What lets it in.

        Raises:
          UserError: the public key cannot be read.
        """
        path = f"{self.key}.pub"
        try:
            return f"{self.user}:{pathlib.Path(path).read_text(encoding='utf-8').strip()}"
        except (OSError, UnicodeDecodeError) as error:
            remedy = job.quoted(["ssh-keygen", "-t", "ed25519", "-N", "", "-f", str(self.key)])
            raise UserError(f"--ssh_key: {path} cannot be read: {error} (run: {remedy})") from error

    def command(
        self, address: str, line: str, *, known_hosts: str, alias: str, is_known: bool
    ) -> list[str]:
        """Has a worker's shell run a line.

        Args:
          address: of the worker.
          line: quoted already.
          known_hosts: a file of host keys.
          alias: what the worker is called in it.
          is_known: whether it is in there; otherwise the first key that it shows is taken.
        """
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": "20",
            "ServerAliveInterval": "20",
            "IdentitiesOnly": "yes",
            "GlobalKnownHostsFile": "/dev/null",
            "UserKnownHostsFile": f'"{known_hosts}"',
            "HostKeyAlias": alias,
            "StrictHostKeyChecking": "yes" if is_known else "accept-new",
        }
        flags = [f"-o{name}={value}" for name, value in options.items()]
        return ["ssh", "-T", *flags, "-i", str(self.key), "-l", self.user, "--", address, line]


class Door:
    """One job at the service, and its workers."""

    def __init__(
        self,
        place: cloud_tpu.Place,
        login: Login,
        folder: str,
        *,
        machines: cloud_tpu.Machines | None = None,
        what: workers.Plan | None = None,
        show_all: bool = False,
    ):
        """Connects.

        Args:
          place: the job's.
          login: to its workers.
          folder: for host keys.
          machines: to rent; None where there are to be no new ones.
          what: workers run; None where nothing is started.
          show_all: logs of all workers.

        Raises:
          UserError: there are no credentials.
        """
        self._place, self._login, self._folder = place, login, folder
        self._plan = what or workers.Plan(place.name, ())
        self._show_all = show_all
        self.clock = Clock()
        self.cloud = cloud_tpu.CloudTpu(
            cloud_tpu.connect(), place, machines=machines, workers=self.workers, clock=self.clock,
            say=say,
        )  # fmt: skip

    def workers(
        self, resource: controller.Resource, tell: Callable[[str], None] | None = None
    ) -> workers.ShellWorkers:
        """Of active machines; see `controller.Cloud`. `tell`: gets their logs."""
        found: list[tuple[str, str, bool]] = []
        lines: list[str] = []
        for node in resource.nodes:
            keys = self.cloud.host_keys(node.name)
            for i, address in enumerate(node.addresses):
                key = keys[i] if i < len(keys) else ""
                alias = f"{node.name}-{i}"
                found.append((address, alias, bool(key)))
                lines += [f"{alias} {key}\n"] if key else []
        known_hosts = str(pathlib.Path(tempfile.mkdtemp(dir=self._folder)) / "known_hosts")
        pathlib.Path(known_hosts).write_text("".join(lines), encoding="utf-8")

        def reach(worker: int, line: str) -> list[str]:
            address, alias, is_known = found[worker]
            return self._login.command(
                address, line, known_hosts=known_hosts, alias=alias, is_known=is_known
            )

        return workers.ShellWorkers(
            self._plan, len(found), reach, say=tell or say, show_all=self._show_all
        )


def say(line: str) -> None:
    """Tells a line at once, whatever reads it."""
    print(line, flush=True)


@contextlib.contextmanager
def _stopped_by_signals(clock: Clock) -> Iterator[None]:
    """The first signal asks to stop; a second one does what it does to any program."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    if (
        before[signal.SIGHUP] == signal.SIG_IGN
    ):  # As under nohup, which means to outlive a terminal.
        del before[signal.SIGHUP]

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(*_: object) -> None:
        clock.stop()
        restore()

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()


def _run(arguments: argparse.Namespace, folder: str) -> int:
    from launch import recipe_check  # Imports the trainer.

    spec = job.from_arguments(arguments)
    if "://" not in spec.model_dir and not spec.model_dir.startswith("/"):
        raise UserError(
            f"model_dir is {spec.model_dir!r}, which would be given back with the machines: take a "
            "bucket's address (gs://...), or a path on a disk that the workers share."
        )
    if not 0 < arguments.max_wait_hours < math.inf:
        raise UserError(
            f"--max_wait_hours={arguments.max_wait_hours:g}: give the hours that machines may take "
            "to be granted."
        )
    place, login = _place(arguments, spec.name), _login(arguments)
    accelerator_type, runtime_version = cloud_tpu.accelerator(topologies.parse(spec.topology))
    recipe_check.check_recipe(spec)
    if spec.image is None and arguments.setup == SETUP:
        recipe_check.refuse_data_of_this_machine()
    machines = cloud_tpu.Machines(
        accelerator_type,
        arguments.runtime_version or runtime_version,
        num_slices=spec.num_slices,
        tier="spot" if arguments.spot else "reserved" if arguments.reserved else "on-demand",
        reservation=arguments.reserved or "-",
        service_account=arguments.service_account,
        network=arguments.network,
        subnetwork=arguments.subnetwork,
        internal_ips=arguments.internal_ips,
        ssh_keys=login.metadata(),
    )
    what = plan(spec, arguments.setup)
    if arguments.dry_run:
        print(describe(place, machines, what, login, spec.restarts))
        return 0
    door = Door(
        place, login, folder, machines=machines, what=what, show_all=arguments.show_all_logs
    )
    patience = dataclasses.replace(PATIENCE, active=arguments.max_wait_hours * 3600)
    boss = controller.Controller(
        door.cloud, spec.restarts, patience=patience, clock=door.clock, keep=arguments.keep,
        say=say,
    )  # fmt: skip
    with _stopped_by_signals(door.clock):
        is_done = boss.run()
    chip_hours = f"{door.cloud.meter.chip_hours:.1f} chip-hours"
    say(f"{'Done' if is_done else 'Stopped'}, after {boss.restarts} restarts, {chip_hours}.")
    return 0 if is_done else RESTART_STATUS


def describe(
    place: cloud_tpu.Place,
    machines: cloud_tpu.Machines,
    what: workers.Plan,
    login: Login,
    policy: job.RestartPolicy,
) -> str:
    """What `run` would ask for, and have every worker run, as text for people."""
    request = cloud_tpu.creation(place, machines, 0)
    kind = type(request)
    commands = [("sets it up", what.set_up())] if what.setup else []
    if what.package is not None:
        size = len(what.package.content) / 2**20
        commands.insert(0, (f"unpacks the package ({size:.1f} MiB on stdin)", what.unpack()))
    commands.append(("starts the job", what.start(1, 0)))
    known = {"known_hosts": "KNOWN_HOSTS", "alias": "WORKER", "is_known": True}
    lines = [
        f"# {place.resource}: {machines.num_slices} x {machines.accelerator_type}, "
        f"{machines.tier}; at most {policy.max_restarts} restarts",
        "# CreateQueuedResource:",
        kind.to_json(request, always_print_fields_with_no_presence=False),
        "# what every worker trains by:",
        job.quoted(what.command),
    ]
    for title, command in commands:
        sent = login.command("ADDRESS", job.quoted(command), **known)
        lines += [f"# {title}:", job.quoted(sent)]
    return "\n".join(lines)


def _status(arguments: argparse.Namespace, folder: str) -> int:
    place = _place(arguments, arguments.name)
    if not 0 <= arguments.price < math.inf:
        raise UserError(f"--price={arguments.price:g}: give what a chip costs for an hour.")
    if arguments.dry_run:
        say(f"would look at {place.resource}, its nodes and its workers")
        return 0
    door = Door(place, _login(arguments), folder)
    resource = door.cloud.find()
    hours, chip_hours = door.cloud.chip_hours()
    if resource is None:
        say(f"{place.resource}: there is none.")
    else:
        detail = f": {resource.detail}" if resource.detail else ""
        say(f"{place.resource}: {resource.state}{detail}, restarts: {resource.restarts}")
        for node in resource.nodes:
            say(f"node {node.name}: {node.state}, {len(node.addresses)} workers")
    if chip_hours:
        say(f"These nodes: {duration(hours * 3600)}, {chip_hours:.1f} chip-hours.")
    price, total = arguments.price, door.cloud.meter.chip_hours
    if total:
        cost = f", {total * price:.2f} at {price:g} a chip-hour" if price else ""
        say(f"The job so far: {total:.1f} chip-hours{cost}.")
    if resource is not None and resource.state == "ACTIVE":
        _tell_starts(door.workers(resource))
    return 0


def _tell_starts(reached: workers.ShellWorkers) -> None:
    """With worker 0's last lines."""
    try:
        starts = reached.look()
    except controller.UnreachableError as error:
        say(str(error))
        return
    for i, start in enumerate(starts):
        ended = "runs" if start.status is None else f"ended with status {start.status}"
        say(f"worker {i}: " + (f"start {start.number} {ended}" if start.number else "no start"))


def _stop(arguments: argparse.Namespace, folder: str) -> int:
    place = _place(arguments, arguments.name)
    if arguments.dry_run:
        say(f"would send SIGTERM to what {place.name} started on its workers, and wait for it")
        return 0 if arguments.keep else _delete(arguments, folder)
    door = Door(place, _login(arguments), folder)
    resource = door.cloud.find()
    if resource is not None and resource.state == "ACTIVE":
        _end_starts(door, resource)
    return 0 if arguments.keep else _delete(arguments, folder)


def _end_starts(door: Door, resource: controller.Resource) -> None:
    """Has what runs save and end, for good."""
    reached = door.workers(resource)
    end = door.clock.now() + PATIENCE.stop
    try:
        number = max(start.number for start in reached.look())
        if number:
            reached.signal(number, "TERM", "stopped")
        while any(start.status is None for start in reached.look()):
            if door.clock.now() > end:
                raise UserError(
                    f"the job has not ended {duration(PATIENCE.stop)} after SIGTERM: see why "
                    "(status), or give its machines back as they are (delete)"
                )
            door.clock.sleep(PATIENCE.poll)
    except controller.UnreachableError as error:
        say(f"{error}: what it has not saved is lost.")


def _delete(arguments: argparse.Namespace, folder: str) -> int:
    place = _place(arguments, arguments.name)
    if arguments.dry_run:
        say(f"would delete {place.resource} and its nodes, and wait until there are none")
        return 0
    door = Door(place, _login(arguments), folder)
    end = door.clock.now() + PATIENCE.delete
    while not door.cloud.delete():
        if door.clock.now() > end:
            raise UserError(
                f"{place.resource} is still there {duration(PATIENCE.delete)} after its deletion "
                "was asked for, and may cost: look at it in the console"
            )
        door.clock.sleep(PATIENCE.poll)
    say(f"{place.resource}: there is none.")
    return 0


def _place(arguments: argparse.Namespace, name: str) -> cloud_tpu.Place:
    dataclasses.replace(job.JobSpec(("-",), "-"), name=name).check()
    return cloud_tpu.Place(arguments.project, arguments.zone, name)


def _login(arguments: argparse.Namespace) -> Login:
    return Login(arguments.ssh_user or getpass.getuser(), pathlib.Path(arguments.ssh_key))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m launch.gce", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    verbs = parser.add_subparsers(required=True, metavar="{run,status,stop,delete}")
    run = verbs.add_parser("run", help="take a job to its end", allow_abbrev=False)
    job.add_arguments(run)
    run.set_defaults(door=_run)
    _add_machines(run)
    for name, door, text in (
        ("status", _status, "what there is of a job, what it does, what it cost so far"),
        ("stop", _stop, "have a job save and end, and give its machines back"),
        ("delete", _delete, "give a job's machines back as they are"),
    ):
        verb = verbs.add_parser(name, help=text, allow_abbrev=False)
        verb.set_defaults(door=door)
        verb.add_argument("--name", default="clipa", help="of the job; default: %(default)s")
        verb.add_argument("--dry_run", action="store_true", help="say what would be done")
        if name == "status":
            verb.add_argument("--price", type=float, default=0.0, help="of a chip-hour")
        if name == "stop":
            verb.add_argument("--keep", action="store_true", help="keep the machines")
    for verb in verbs.choices.values():
        add = verb.add_argument
        add("--project", required=True)
        add("--zone", required=True)
        add("--ssh_user", help="default: the one here")
        add("--ssh_key", default=str(pathlib.Path.home() / ".ssh" / "google_compute_engine"))
    return parser


def _add_machines(run: argparse.ArgumentParser) -> None:
    add = run.add_argument
    tier = run.add_mutually_exclusive_group()
    tier.add_argument("--spot", action="store_true", help="cheaper, and may be taken away")
    tier.add_argument(
        "--reserved", nargs="?", const="-", metavar="ID", help="of a reservation, or of any"
    )
    add("--runtime_version", default="", help="software of the machines; default: the topology's")
    add("--service_account", default="", help="e-mail of what the machines act as")
    add("--network", default="")
    add("--subnetwork", default="")
    add("--internal_ips", action="store_true", help="no addresses in the internet: run this inside")
    add("--setup", default=SETUP, help="a line for bash that sets the package up; '' for none")
    add("--max_wait_hours", type=float, default=PATIENCE.active / 3600, help="for machines")
    add("--keep", action="store_true", help="keep the machines, whatever the end")
    add("--show_all_logs", action="store_true", help="of all workers, not worker 0's alone")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the status to end with; see the module."""
    try:
        given = gin_utils.rewrite_gin_args(list(sys.argv[1:] if argv is None else argv))
        arguments = _parser().parse_args(given)
        with tempfile.TemporaryDirectory() as folder:
            return arguments.door(arguments, folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, controller.FailedError) else 2


if __name__ == "__main__":
    sys.exit(main())
