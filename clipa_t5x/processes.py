"""What this machine tells of its processes, by Linux's /proc; elsewhere it tells nothing."""

import hashlib
import os
import pathlib
import time


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where there is no such process.

    With it a process is told from a later one of the same number. One that has ended and is still
    to be collected by its parent counts as none.
    """
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace")
        fields = stat[stat.rindex(")") + 2 :].split()  # A name may hold anything before it.
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def start_time() -> float | None:
    """Unix time at which this process started; None where the machine does not tell."""
    ticks = start_ticks(os.getpid())
    try:
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return None if ticks is None else time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))


def namespace_id() -> str | None:
    """Names within what process numbers have a meaning: this boot, this container; None: unknown.

    Host names do not tell: containers and restored machines share them.
    """
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:16]
