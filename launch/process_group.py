"""The processes of one start on this machine: begun, told, watched, and never left behind."""

import contextlib
import dataclasses
import math
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import BinaryIO

from clipa_t5x.errors import UserError
from launch import guard

_POLL_SECONDS = 0.05
_GUARD_SECONDS = 10.0  # Within which a guard has killed what it guards.

# What is told to end, and how the processes are told. A terminal that is gone is like a request.
_TOLD = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGTERM,
}


@dataclasses.dataclass(frozen=True)
class Command:
    """One process to start.

    Attributes:
      arguments: of the process, its program first.
      environment: variables, in addition to this process's own.
      log: file that gets its stdout and stderr, after what is in it.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log: pathlib.Path


@contextlib.contextmanager
def received_signals() -> Iterator[list[int]]:
    """Collects SIGTERM, SIGINT and SIGHUP, within.

    An ignored SIGHUP stays so, and of those after another signal nothing is heard: a closed
    terminal sends several.
    """
    received: list[int] = []

    def receive(signum: int, frame: FrameType | None) -> None:
        del frame
        if signum != signal.SIGHUP or not received:
            received.append(signum)

    before = {s: signal.getsignal(s) for s in _TOLD}
    heard = [s for s in _TOLD if s != signal.SIGHUP or before[s] != signal.SIG_IGN]
    for signum in heard:
        signal.signal(signum, receive)
    try:
        yield received
    finally:
        for signum in heard:
            signal.signal(signum, before[signum])


class ProcessGroup:
    """Processes that belong together, each in a session of its own, under a guard.

    Whatever becomes of this process, none of them outlives it: see `guard`. A context manager; at
    its end, all are killed.
    """

    def __init__(self, commands: Sequence[Command], cwd: str, show: Callable[[int, str], None]):
        """Starts them.

        Args:
          commands: one for each process.
          cwd: the folder that they run in.
          show: called with a process's number and a line that it wrote.

        Raises:
          UserError: a log cannot be written.
        """
        self._show = show
        self._statuses: list[int | None] = [None] * len(commands)
        self._logs: list[_Tail] = []
        self._guards: list[subprocess.Popen] = []
        for command in commands:
            with _opened(command.log) as log:
                self._logs.append(_Tail(command.log, log.tell()))
                self._guards.append(
                    subprocess.Popen(
                        guard.guarded(command.arguments),
                        cwd=cwd,
                        env={**os.environ, **command.environment},
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )

    def __enter__(self) -> "ProcessGroup":
        return self

    def __exit__(self, *error) -> None:
        self.kill()
        self.poll()

    def poll(self) -> list[int]:
        """Shows what has been written since; returns the numbers of those that ended since."""
        ended = []
        for number, (process, log) in enumerate(zip(self._guards, self._logs, strict=True)):
            status = process.poll() if self._statuses[number] is None else None
            for line in log.lines(to_the_end=status is not None):
                self._show(number, line)
            if status is not None:
                self._statuses[number] = status
                ended.append(number)
        return ended

    @property
    def statuses(self) -> list[int | None]:
        """Of each process; None of one that has not ended."""
        return list(self._statuses)

    @property
    def running(self) -> list[int]:
        """Numbers of those that have not ended."""
        return [number for number, status in enumerate(self._statuses) if status is None]

    def send(self, signum: int) -> None:
        """Sends a signal to each process that runs."""
        for number in self.running:
            self._guards[number].send_signal(signum)

    def kill(self) -> None:
        """Kills those that run, each with its process group, and no other."""
        for process in self._guards:
            if process.stdin is not None:
                process.stdin.close()
        deadline = time.monotonic() + _GUARD_SECONDS
        for process in self._guards:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _opened(log: pathlib.Path) -> BinaryIO:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open("ab")
    except OSError as error:
        raise UserError(f"the log {log} cannot be written: {error.strerror}.") from error


class _Tail:
    """Reads the lines that a file gets."""

    def __init__(self, path: pathlib.Path, offset: int):
        self._file = path.open("rb")
        self._file.seek(offset)
        self._unread = b""

    def lines(self, to_the_end: bool) -> Iterator[str]:
        """Those that are whole; at the end, what remains is one, and the file is closed."""
        if self._file.closed:
            return
        *lines, self._unread = (self._unread + self._file.read()).split(b"\n")
        if to_the_end:
            self._file.close()
            lines += [self._unread] if self._unread else []
        for line in lines:
            yield line.decode(errors="replace").rstrip("\r")


def attend(
    group: ProcessGroup,
    signals: Sequence[int],
    patience: float,
    say: Callable[[str], None],
) -> list[int]:
    """Waits for the end of all processes.

    The first signal goes on to all, so that they save; the second kills them. When one has failed,
    the others have their time to end by themselves, and are killed then.

    Args:
      group: the processes.
      signals: what `received_signals` collects.
      patience: seconds from the first failure on.
      say: told what happens and why.

    Returns:
      The status of each, as `subprocess` tells it, or 128 + n for signal n.
    """
    begun, deadline, told = time.monotonic(), math.inf, 0
    while group.running:
        for number in group.poll():
            status = group.statuses[number]
            assert status is not None
            seconds = time.monotonic() - begun
            say(f"process {number} ended with status {described(status)} after {seconds:.0f} s.")
            if status and group.running and deadline == math.inf:
                deadline = time.monotonic() + patience
                others = len(group.running)
                say(f"the other {others} of its start may take {patience:.0f} s to end, too.")
        for signum in signals[told:2]:
            told += 1
            _tell(group, signum, told, say)
        if group.running and time.monotonic() > deadline:
            say(f"killing {len(group.running)} that did not end in {patience:.0f} s.")
            group.kill()
        time.sleep(_POLL_SECONDS)
    return [status for status in group.statuses if status is not None]


def _tell(group: ProcessGroup, signum: int, count: int, say: Callable[[str], None]) -> None:
    name = signal.Signals(signum).name
    if count > 1:
        say(f"{name} again: killing {len(group.running)} processes at once.")
        group.kill()
        return
    say(f"{name}: {len(group.running)} processes are told; a second signal kills them.")
    group.send(_TOLD[signal.Signals(signum)])


def described(status: int) -> str:
    """'137 (SIGKILL)'."""
    number = -status if status < 0 else status - 128
    with contextlib.suppress(ValueError):
        return f"{status} ({signal.Signals(number).name})"
    return str(status)
