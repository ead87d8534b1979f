"""Kills real training runs at chosen moments, starts them again, and tells what that cost."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import experiments

from clipa_t5x import checkpoint_manifest

_POLL_SECONDS = 0.01
_PATIENCE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Moment:
    """When to kill: some time after something can be seen from outside.

    Attributes:
      seen: (run's folders as they were at its start, as they are) -> whether it is time.
      seconds: most that is waited from then on, at random.
    """

    seen: Callable[["Snapshot", "Snapshot"], bool]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What is seen of a run from outside.

    Attributes:
      lines: of metrics, by group's first name ('train', 'training_eval', ...).
      stages: folders that were begun.
      saving: checkpoints that are being written, or were left so; by name and when they began.
    """

    lines: collections.Counter[str]
    stages: int
    saving: frozenset[tuple[str, int]]

    @classmethod
    def of(cls, model_dir: pathlib.Path) -> "Snapshot":
        """Looks at all files in a run's, or schedule's, folder."""
        lines: collections.Counter[str] = collections.Counter()
        stages = len(_children(model_dir, "stage"))
        for path in (model_dir, *_children(model_dir, "stage")):
            lines.update(r["group"].split("/")[0] for r in _records(path / "metrics.jsonl"))
        folders = [model_dir, *(model_dir / f"stage{i + 1}" for i in range(stages))]
        saving = set()
        for path in (child for folder in folders for child in _children(folder, "checkpoint_")):
            with contextlib.suppress(FileNotFoundError):  # What was left is cleared away.
                if not _is_whole(path):
                    saving.add((str(path), (path / "data" / "metadata").stat().st_mtime_ns))
        return cls(lines, stages, frozenset(saving))


def _children(folder: pathlib.Path, prefix: str) -> list[pathlib.Path]:
    names = os.listdir(folder) if folder.is_dir() else []
    paths = (folder / name for name in names if name.startswith(prefix))
    return sorted(path for path in paths if path.is_dir())


def _records(path: pathlib.Path) -> Iterator[dict]:
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            yield json.loads(line[line.rfind('{"step"') :])


def _is_whole(checkpoint: pathlib.Path) -> bool:
    return (checkpoint / checkpoint_manifest.FILE).exists()


MOMENTS = {
    # Imports, building, restoring, compiling.
    "start": Moment(lambda _, now: True, 9.0),
    # Steps; batches are read all the time.
    "step": Moment(lambda before, now: now.lines["train"] > before.lines["train"], 3.0),
    "save": Moment(lambda before, now: bool(now.saving - before.saving), 0.05),
    "evaluation": Moment(
        lambda before, now: now.lines["training_eval"] > before.lines["training_eval"], 0.5
    ),
    # The next stage takes its parameters from the one before.
    "hand-over": Moment(lambda before, now: now.stages > before.stages, 8.0),
}


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill, and what came of it.

    Attributes:
      moment: a name of MOMENTS.
      signal: 'SIGKILL' or 'SIGTERM'.
      redone: steps that the run had finished and did again; None where it had not begun.
      statuses: of all processes.
      seconds: from the kill until the last of the others had ended.
    """

    moment: str
    signal: str
    redone: int | None
    statuses: tuple[int, ...]
    seconds: float


class Run:
    """A training command that is started again and again, until it is done."""

    def __init__(
        self,
        command: list[str],
        model_dir: pathlib.Path,
        cwd: str,
        num_processes: int = 1,
        num_devices: int = 1,
        optimized: bool = True,
    ):
        """Starts nothing yet; `command` writes to `model_dir`."""
        self._command, self._cwd, self.model_dir = command, cwd, model_dir
        self._num_processes = num_processes
        self._environment = experiments.environment(num_devices, optimized)
        self._logs = [model_dir.parent / f"{model_dir.name}.{i}.log" for i in range(num_processes)]

    def _start(self) -> list[subprocess.Popen]:
        join: list[list[str]] = [[]]
        if self._num_processes > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{s.getsockname()[1]}"
            join = [
                [f"--coordinator_address={address}", f"--process_count={self._num_processes}",
                 f"--process_index={i}"]
                for i in range(self._num_processes)
            ]  # fmt: skip
        processes = []
        for arguments, log in zip(join, self._logs, strict=True):
            with log.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [*self._command, *arguments],
                        cwd=self._cwd,
                        env=self._environment,
                        stdout=file,
                        stderr=file,
                        start_new_session=True,
                    )
                )
        return processes

    def log(self, index: int = 0) -> str:
        """What a process of the latest start has said."""
        return self._logs[index].read_text(errors="replace")

    def finish(self, timeout: float = 1800) -> None:
        """Starts, and waits for the end of all processes."""
        processes = self._start()
        for i, process in enumerate(processes):
            assert process.wait(timeout) == 0, self.log(i)[-4000:]

    def kill(
        self,
        moment: str,
        rng: random.Random,
        with_signal: str = "SIGKILL",
        timeout: float = 300,
        within: float = math.inf,
    ) -> Kill | None:
        """Starts, and kills one process at a moment; the others have `timeout` seconds to end.

        Where the moment lasts longer than `within` seconds, it is taken to last so long.

        Returns:
          What happened; None where the run was done before the moment came.
        """
        before = Snapshot.of(self.model_dir)
        processes = self._start()
        chosen = MOMENTS[moment]
        chosen = Moment(chosen.seen, min(chosen.seconds, within))
        if not self._wait_for(chosen, before, processes, rng):
            for i, process in enumerate(processes):
                assert process.wait(timeout) == 0, self.log(i)[-4000:]
            return None
        victim = rng.randrange(len(processes))
        processes[victim].send_signal(getattr(signal, with_signal))
        killed = time.monotonic()
        try:
            statuses = tuple(process.wait(timeout) for process in processes)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        seconds = time.monotonic() - killed
        return Kill(moment, with_signal, self._redone(), statuses, seconds)

    def survive(
        self, moments: Sequence[str], kills: int, rng: random.Random, **kwargs: Any
    ) -> list[Kill]:
        """Kills at random ones of `moments`, up to `kills` times, and lets the run come to its end.

        Args:
          moments: names of MOMENTS.
          kills: at most; fewer where the run is done before.
          rng: decides all.
          **kwargs: of `kill`.
        """
        seen: list[Kill] = []
        while len(seen) < kills:
            kill = self.kill(rng.choice(moments), rng, **kwargs)
            if kill is None:
                return seen
            seen.append(kill)
        self.finish()
        return seen

    def _wait_for(self, moment: Moment, before: Snapshot, processes: list, rng: random.Random):
        """Whether the moment came while all processes ran."""

        def running() -> bool:
            return all(process.poll() is None for process in processes)

        patience = math.inf
        while running() and not moment.seen(before, now := Snapshot.of(self.model_dir)):
            # A moment that does not come, such as a stage's end in the last one, is any moment.
            if MOMENTS["step"].seen(before, now):
                patience = min(patience, time.monotonic() + _PATIENCE_SECONDS)
            if time.monotonic() > patience:
                break
            time.sleep(_POLL_SECONDS)
        until = time.monotonic() + rng.uniform(0, moment.seconds)
        while running() and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        return running()

    def _stage_dir(self) -> pathlib.Path:
        return max(_children(self.model_dir, "stage"), default=self.model_dir)

    def _redone(self) -> int | None:
        """Steps after the newest whole checkpoint that the newest stage had finished."""
        folder = self._stage_dir()
        records = _records(folder / "metrics.jsonl")
        steps = [record["step"] for record in records if record["group"] == "train"]
        if not steps:
            return None
        # A start that came after an earlier kill has not logged all that that one had.
        whole = [
            int(re.fullmatch(r"checkpoint_(\d+)", p.name)[1])  # pyright: ignore
            for p in _children(folder, "checkpoint_")
            if re.fullmatch(r"checkpoint_\d+", p.name) and _is_whole(p)
        ]
        return max(steps[-1] - max(whole, default=0), 0)
