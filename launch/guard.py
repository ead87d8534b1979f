"""Runs one command in a session of its own, and ends all of it when its launcher is gone.

`python guard.py COMMAND ...`, with a pipe as stdin that the launcher holds open: when it is closed,
as the kernel does for whoever dies of whatever, the command's process group is killed. SIGTERM and
SIGINT go on to the command alone, which tells its own children. The status is the command's, or 128
+ n where it died of signal n; what it leaves of its group is killed.

A script, of the standard library alone, so that it is there within milliseconds.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

_FORWARDED = {signal.SIGTERM, signal.SIGINT}
_WAITED = {*_FORWARDED, signal.SIGCHLD}
_PR_SET_PDEATHSIG = 1
NOT_FOUND = 127  # As shells have it.


def guarded(command: Sequence[str]) -> list[str]:
    """The command that runs a command under a guard."""
    return [sys.executable, "-I", "-S", __file__, *command]


def main(command: Sequence[str]) -> int:
    """Runs the command to its end and returns its status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
    guard, prctl = os.getpid(), getattr(ctypes.CDLL(None), "prctl", None)

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITED)
        if prctl is not None:  # Linux: should the guard itself be killed, so is the command.
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(128 + signal.SIGKILL)

    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=prepare
        )
    except OSError as error:
        print(f"error: {command[0]} cannot be run: {error.strerror}.", file=sys.stderr)
        return NOT_FOUND
    threading.Thread(target=_kill_at_eof, args=(process.pid,), daemon=True).start()
    # It is not waited for in earnest: the number by which its group is killed stays its own.
    while (ended := _ended(process.pid)) is None:
        signum = signal.sigwait(_WAITED)
        if signum in _FORWARDED:
            os.kill(process.pid, signum)
    _kill_group(process.pid)
    return ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status


def _ended(pid: int):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def _kill_at_eof(pid: int) -> None:
    while os.read(0, 4096):
        pass
    _kill_group(pid)


def _kill_group(pid: int) -> None:
    # macOS forbids it for those that have ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
