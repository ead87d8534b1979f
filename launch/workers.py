"""What is run on workers: lists of arguments, quoted once, sent by whatever reaches the workers.

On a worker a job has a folder, and in it one folder for each start, made by a single rename:

    clipa_t5x/<job>/start-00001/{pid, command, log, status, stopped, TERM, KILL}

`pid` holds the process that leads the start's process group, and when it began, in clock ticks, so
that no later process of the same number is taken for it. Signals go to that group alone.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import subprocess
from collections.abc import Callable, Sequence

from clipa_t5x.errors import UserError
from clipa_t5x.preemption import RESTART_STATUS
from launch import job
from launch.controller import GONE, Start, UnreachableError
from launch.package import Package

# What ssh ends with where it is ssh that fails; the commands here never do.
_UNREACHABLE = 255
_LOG_BYTES = 2**18
_MOST_AT_ONCE = 64
_SECONDS, _SETUP_SECONDS = 120.0, 3600.0
_LAST_LINES = 20

# Sets state and ticks of a process, both '' where there is none.
_PROCESS = r"""
process() {
  state= ticks= line=
  { read -r line </proc/"$1"/stat; } 2>/dev/null || return 0
  set -- ${line##*) }
  state=$1 ticks=${20}
}
"""

# folder, digest; the package on stdin. -> the package's folder, whole or not at all.
_UNPACK = r"""
mkdir -p "$1" && cd "$1" || exit 1
[ -d "package-$2" ] && exit 0
new=$(mktemp -d "package-$2.XXXXXX") && tar -xzf - -C "$new" || exit 1
mv -T "$new" "package-$2" 2>/dev/null || rm -rf "$new"
"""

# the package's folder, what sets it up. -> that it is, once.
_SET_UP = r"""
cd "$1" || exit 1
exec 9>.set-up.lock && flock 9 || exit 1
[ -e .set-up ] && exit 0
bash -c "$2" </dev/null 1>&2 9>&- && : >.set-up || exit 1
"""

# the start's folder, fingerprint, restarts, working folder, command. It leads a process group.
_LEAD = r"""
start=$1 new=$1.$$
mkdir -p "$new" && process $$ && echo "$$ $ticks" >"$new/pid" && echo "$2 $3" >"$new/command"
mv -T "$new" "$start" 2>/dev/null || { rm -rf "$new"; exit; }
# Not ignored, as children would inherit that; and not died of.
trap : HUP INT TERM
{ cd "$4" && shift 4 && "$@"; } </dev/null >"$start/log" 2>&1
echo $? >"$start/status.new"
mv "$start/status.new" "$start/status"
# Whoever it left behind would keep the accelerators.
kill -KILL 0
"""

# folder, number, then those of _LEAD from the second on, with that script before them.
_START = r"""
mkdir -p "$1" && cd "$1" || exit 1
start=$PWD/start-$2 lead=$3
[ -d "$start" ] && exit 0
shift 3
setsid bash -c "$lead" lead "$start" "$@" </dev/null >/dev/null 2>"$start.errors" &
for i in $(seq 300); do
  [ -d "$start" ] && exit 0
  sleep 0.1
done
cat "$start.errors" >&2
exit 1
"""

# folder, offset, most bytes. -> a line: number, status, stopped, fingerprint, restarts, offset; and
# the log from there; from -1, of a long one the end alone.
_LOOK = r"""
number=0 status=0 stopped=- command="- 0" offset=$2
if cd "$1" 2>/dev/null; then
  for start in start-?????; do [ -d "$start" ] && number=${start#start-}; done
fi
if [ "$number" != 0 ]; then
  cd "start-$number" || exit 1
  status=running
  read -r pid began <pid
  read -r command <command
  process "$pid"
  if [ "$ticks" != "$began" ] || [ "$state" = Z ] || [ "$state" = X ]; then status=gone; fi
  # Looked for last: it is written before the process ends.
  if [ -e status ]; then status=$(cat status); fi
  if [ -e stopped ]; then stopped=stopped; fi
fi
if [ "$offset" -lt 0 ]; then
  size=0
  if [ -e log ]; then size=$(stat -c %s log); fi
  offset=$((size > $3 ? size - $3 / 4 : 0))
fi
echo "$number $status $stopped $command $offset"
if [ -e log ]; then tail -c "+$((offset + 1))" log | head -c "$3"; fi
"""

# folder, number, signal, a mark to leave or ''. -> the signal, once, to the start's group alone.
_SIGNAL = r"""
cd "$1/start-$2" 2>/dev/null || exit 0
if [ -n "$4" ]; then : >"$4"; fi
if [ -e status ] || [ -e "$3" ]; then exit 0; fi
: >"$3"
read -r pid began <pid
process "$pid"
# A number is not given away while its group has members: with no leader, they are the start's.
if [ -z "$ticks" ] || [ "$ticks" = "$began" ]; then kill -"$3" -- -"$pid" 2>/dev/null; fi
exit 0
"""


def _script(text: str, *arguments: str) -> list[str]:
    return ["bash", "-c", _PROCESS + text, "clipa_t5x", *arguments]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What workers are to run, as commands.

    Attributes:
      name: of the job.
      command: of the trainer.
      environment: its variables.
      package: what it is run in; None where the command brings a container.
      setup: a line for bash, run once in the package's folder; '' for none.
    """

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    package: Package | None = None
    setup: str = ""

    @property
    def folder(self) -> str:
        """The job's, below the worker's home."""
        return f"clipa_t5x/{self.name}"

    @property
    def fingerprint(self) -> str:
        """Tells this command from others; not its package, which may be mended between starts."""
        text = repr((self.command, self.environment))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _where(self) -> str:
        return f"{self.folder}/package-{self.package.digest}" if self.package else "."

    def unpack(self) -> list[str]:
        """Reads the package from stdin."""
        assert self.package is not None
        return _script(_UNPACK, self.folder, self.package.digest)

    def set_up(self) -> list[str]:
        """Sets the package up."""
        return _script(_SET_UP, self._where(), self.setup)

    def start(self, number: int, restarts: int) -> list[str]:
        """Starts the job."""
        depth = "../.." if self.package is None else f"package-{self.package.digest}"
        variables = (f"{name}={value}" for name, value in self.environment)
        begun = (self.fingerprint, str(restarts), depth, "env", *variables, *self.command)
        return _script(_START, self.folder, f"{number:05}", _PROCESS + _LEAD, *begun)

    def look(self, offset: int) -> list[str]:
        """Tells of the latest start, and its log from a byte on."""
        return _script(_LOOK, self.folder, str(offset), str(_LOG_BYTES))

    def signal(self, number: int, name: str, mark: str = "") -> list[str]:
        """Signals a start; `mark` 'stopped' says that it is for good."""
        return _script(_SIGNAL, self.folder, f"{number:05}", name, mark)


def read_look(output: bytes) -> tuple[Start, int, bytes]:
    """What `Plan.look` printed: the start, and a piece of its log from a byte on.

    Raises:
      UnreachableError: it was cut short.
    """
    line, newline, log = output.partition(b"\n")
    fields = line.decode(errors="replace").split(" ")
    if not newline or len(fields) != 6:
        raise UnreachableError(f"a worker answered {line[:80]!r}")
    number, status, stopped, command, restarts, offset = fields
    statuses = {"running": None, "gone": GONE}
    ended = statuses[status] if status in statuses else int(status)
    start = Start(int(number), ended, command, int(restarts), stopped == "stopped")
    return start, int(offset), log


class ShellWorkers:
    """Workers that take a line for a shell; see `controller.Workers`."""

    def __init__(
        self,
        plan: Plan,
        count: int,
        reach: Callable[[int, str], list[str]],
        *,
        say: Callable[[str], None] = print,
        show_all: bool = False,
    ):
        """Of a job.

        Args:
          plan: what they run.
          count: how many they are.
          reach: the local command that has a worker's shell run a line.
          say: is told lines of logs.
          show_all: of all workers' logs; or worker 0's, and the others' last where they fail.
        """
        self._plan, self._count, self._reach = plan, count, reach
        self._say = say
        self._logs = [_Log(is_shown=show_all or i == 0) for i in range(count)]
        self.fingerprint = plan.fingerprint

    def prepare(self) -> None:
        """Uploads and sets up; see `controller.Workers`."""
        plan = self._plan
        if plan.package is not None:
            content = plan.package.content
            self._all(lambda i: self._run(i, plan.unpack(), content, _SETUP_SECONDS))
        if plan.setup:
            self._all(lambda i: self._run(i, plan.set_up(), b"", _SETUP_SECONDS))

    def look(self) -> list[Start]:
        """Shows new lines; see `controller.Workers`."""
        try:
            return self._all(self._look)
        finally:
            for worker, log in enumerate(self._logs):
                for line in log.shown():
                    self._say(f"[{worker}] {line}")

    def start(self, number: int, restarts: int) -> None:
        """See `controller.Workers`."""
        self._all(lambda i: self._run(i, self._plan.start(number, restarts)))

    def signal(self, number: int, name: str, mark: str = "") -> None:
        """See `controller.Workers`."""
        self._all(lambda i: self._run(i, self._plan.signal(number, name, mark)))

    def _all(self, action: Callable[[int], object]) -> list:
        """Does something on all workers at once; raises what the first of them that fails does."""
        with concurrent.futures.ThreadPoolExecutor(min(self._count, _MOST_AT_ONCE)) as pool:
            # All are waited for, so that nothing is under way when it is tried again.
            futures = [pool.submit(action, i) for i in range(self._count)]
        return [future.result() for future in futures]

    def _look(self, worker: int) -> Start:
        log = self._logs[worker]
        while True:
            asked = log.offset
            start, offset, piece = read_look(self._run(worker, self._plan.look(asked)))
            if start.number != log.number:
                log.begin(start.number)
                if asked > 0:  # It was read from where that of the start before had come to.
                    continue
            log.add(offset, piece)
            if len(piece) < _LOG_BYTES:
                log.end(start.status)
                return start

    def _run(
        self, worker: int, command: Sequence[str], given: bytes = b"", seconds: float = _SECONDS
    ) -> bytes:
        """Runs a command on a worker; what it prints."""
        local = self._reach(worker, job.quoted(command))
        try:
            ended = subprocess.run(local, input=given, capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise UnreachableError(f"worker {worker}: no answer in {seconds:.0f} s") from error
        except FileNotFoundError as error:
            raise UserError(
                f"{local[0]} is not installed: it is how workers are reached."
            ) from error
        said = ended.stderr.decode(errors="replace").strip().splitlines() or ["no word"]
        if ended.returncode == _UNREACHABLE:
            raise UnreachableError(f"worker {worker}: {said[-1]}")
        if ended.returncode:
            for line in said[-_LAST_LINES:]:
                self._say(f"[{worker}] {line}")
            raise UserError(f"worker {worker} cannot run the job: {said[-1]}")
        return ended.stdout


class _Log:
    """What was read of a worker's log."""

    def __init__(self, *, is_shown: bool):
        self._is_shown = is_shown
        self._shown: list[bytes] = []
        self.begin(0)
        self.offset = -1  # It may have been written for days before it is seen.

    def begin(self, number: int) -> None:
        """Of another start."""
        self.number, self.offset, self._rest = number, 0, b""
        self._last: collections.deque[bytes] = collections.deque(maxlen=_LAST_LINES)

    def add(self, offset: int, piece: bytes) -> None:
        """Takes what comes next; whole lines to show, or keeps the last."""
        self.offset = offset + len(piece)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        self._take(lines)

    def end(self, status: int | None) -> None:
        """What is left of one that has ended: all, or the last lines before a failure."""
        if status is None:
            return
        self._take([self._rest] if self._rest else [])
        self._rest = b""
        if status not in (0, RESTART_STATUS):
            self._shown.extend(self._last)
        self._last.clear()

    def _take(self, lines: Sequence[bytes]) -> None:
        (self._shown if self._is_shown else self._last).extend(lines)

    def shown(self) -> list[str]:
        """Lines to show, each once."""
        lines, self._shown = self._shown, []
        return [line.decode(errors="replace") for line in lines]
