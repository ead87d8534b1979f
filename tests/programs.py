"""Runs small programs in processes of their own, alone or joined into one run."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import experiments

# Joins the run as the doors do, and has a collective to offer.
JOINED = """
import os, signal, sys, threading, time
import jax
import numpy as np
from clipa_t5x import main, peers, preemption
address, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
main._FLAGS([
    "train", f"--coordinator_address={address}", f"--process_count={count}",
    f"--process_index={index}", "--peer_timeout_seconds=10",
])
main.start_processes()
mesh = jax.make_mesh((count,), ("data",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
x = jax.make_array_from_process_local_data(sharding, np.ones(1))
add = jax.jit(lambda x: x.sum())
step = lambda: float(add(x))
step()
"""


class Program:
    """One process that runs Python code."""

    def __init__(self, code: str, *arguments: str, cwd: str | None = None):
        """Starts it."""
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code, *arguments],
            cwd=cwd,
            env=experiments.environment(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_line(self, line: str) -> None:
        """Returns once it has printed this."""
        for printed in self.process.stdout or ():
            if printed.strip() == line:
                return
        raise AssertionError((self.process.communicate()[1] or "")[-4000:])

    def end(self, timeout: float = 60) -> tuple[int, str, str]:
        """Its status, and the rest of stdout and stderr."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


@contextlib.contextmanager
def alone(code: str, *arguments: str, cwd: str | None = None) -> Iterator[Program]:
    """Runs code; it is dead afterwards."""
    program = Program(code, *arguments, cwd=cwd)
    try:
        yield program
    finally:
        program.process.kill()


@contextlib.contextmanager
def joined(code: str, count: int = 2) -> Iterator[list[Program]]:
    """Runs `JOINED` and then code in processes of one run; they are dead afterwards."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(alone(JOINED + code, address, str(count), str(i)))
            for i in range(count)
        ]


def seconds_until_all_end(programs: list[Program], timeout: float) -> float:
    """How long that takes from now."""
    start = time.monotonic()
    for program in programs:
        program.process.wait(timeout)
    return time.monotonic() - start
