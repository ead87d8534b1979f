"""Processes of tests that write down their numbers, and waiting for what they do."""

import os
import pathlib
import sys
import time

from clipa_t5x import processes

# Starts in milliseconds: the standard library alone.
PYTHON = [sys.executable, "-I", "-S"]

# Code of a process with a child; both write their numbers into a folder, and sleep.
FAMILY = """
import os, sys, time
child = os.fork()
with open(f"{sys.argv[1]}/{os.getpid()}.pid", "w") as file:
    file.write(str(os.getpid()))
time.sleep(600)
"""


def wait_for(seen, seconds=60):
    """What `seen` returns, when it is true."""
    until = time.monotonic() + seconds
    while not (found := seen()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)
    return found


def read_pids(folder, count):
    """The numbers, once so many processes have written them."""

    def read():
        texts = [path.read_text() for path in pathlib.Path(folder).glob("*.pid")]
        return [int(text) for text in texts if text]

    return wait_for(lambda: pids if len(pids := read()) == count else None)


def all_gone(pids):
    """Waits until none of them runs."""
    return wait_for(lambda: all(processes.start_ticks(pid) is None for pid in pids))


def find_trainers(folder, *words):
    """Numbers of the trainers that run in a folder and have such words on their command line."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            is_there = os.path.samefile(path / "cwd", folder)
        except OSError:  # Gone, or somebody else's.
            continue
        is_trainer = command[1:3] == ["-m", "clipa_t5x.train"]
        if is_trainer and is_there and set(words) <= set(command):
            found.append(int(path.name))
    return found
