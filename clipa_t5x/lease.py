"""One live run for a MODEL_DIR: a lease with a heartbeat, safe on object stores.

Each run writes an object of its own, `MODEL_DIR/.lease/<host>~<namespace>~<pid>~<ticks>~<id>.json`,
and then lists all; nothing is renamed, and no object has two writers. It relies on this alone: an
object that was written is listed afterwards. Whoever comes second therefore sees who came first.

Whether another lease's holder lives is asked of its process table where that is this machine's, and
known at once. Elsewhere its heartbeat is watched: it lives if that changes, and is taken for dead
if it does not within a timeout. Clocks of two machines are never compared.

A holder that was taken for dead (suspended, cut off from its storage) learns of it by the check
that a run makes before it writes. Between that check and the end of the write nothing guards: a
machine suspended just there, for longer than the timeout, writes what it had begun.
"""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

import jax
from absl import logging
from etils import epath

from clipa_t5x import checkpoints, processes, run_summary
from clipa_t5x.errors import UnsavableError, UserError, storage_errors

FOLDER = ".lease"
PERIOD = 10.0  # Seconds between heartbeats.
TIMEOUT = 60.0  # Seconds without one after which a holder elsewhere is taken for dead.
_POLL = 0.5


_NAME = re.compile(r"([\w.-]+)~(\w+)~(\d+)~(\d+)~(\w+)\.json")


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process, told from all others; its text is the name of its lease.

    Attributes:
      host: for people.
      namespace: within which `pid` has a meaning, `processes.namespace_id`.
      pid: its number.
      ticks: when it started, `processes.start_ticks`.
      key: random, as a process may ask for several leases.
    """

    host: str
    namespace: str
    pid: int
    ticks: int
    key: str

    @classmethod
    def this_process(cls, host: str | None = None) -> "Holder":
        """This process; on a machine of another name, which cannot be looked into, if one is given.

        Where the machine tells nothing of its processes, all others are as if elsewhere.
        """
        namespace = processes.namespace_id() if host is None else None
        return cls(
            re.sub(r"[^\w.-]", "_", host or socket.gethostname()),
            namespace or secrets.token_hex(8),
            os.getpid(),
            processes.start_ticks(os.getpid()) or 0,
            secrets.token_hex(4),
        )

    def __str__(self) -> str:
        return f"{self.host}~{self.namespace}~{self.pid}~{self.ticks}~{self.key}.json"

    def is_alive(self, seen_from: "Holder") -> bool | None:
        """Whether it runs, by the process table; None where that is another machine's."""
        if self.namespace != seen_from.namespace:
            return None
        return processes.start_ticks(self.pid) == self.ticks


class Claim:
    """This process's claim to a MODEL_DIR, made by `acquire`; see `held`."""

    def __init__(
        self, model_dir: str, holder: Holder, timeout: float, period: float, owner: str = "run"
    ):
        """Writes nothing yet."""
        self._owner = owner
        self._model_dir, self._holder = model_dir, holder
        self._folder = epath.Path(model_dir) / FOLDER
        self._own = self._folder / str(holder)
        self._timeout, self._period = timeout, period
        self._is_held = False
        self._replaced: list[str] = []
        self._beats, self._began = 0, time.monotonic()
        self._writing = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def acquire(self) -> None:
        """Returns when no other live run claims the folder.

        Of runs that come at the same time one wins: the first by name waits for the others to have
        looked round, and these give way to it.

        Raises:
          UserError: another one does, or the folder cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write()
        except storage_errors() as error:
            raise UserError(
                f"MODEL_DIR {self._model_dir} cannot be written ({error}): mend that, or take "
                "another MODEL_DIR."
            ) from error
        self._thread.start()
        try:
            self._wait_for_others()
            self._is_held = True
            self._write()
        except BaseException:
            self.release()
            raise

    def _wait_for_others(self) -> None:
        seen: dict[str, tuple[str, float]] = {}  # Lease -> its last heartbeat, and since when.
        while others := self._others():
            for name, text in others.items():
                alive = _holder(name).is_alive(self._holder)
                if name not in seen:
                    seen[name] = text, time.monotonic()
                    self._log_wait(name, alive)
                if alive is None and text != seen[name][0]:
                    seen[name], alive = (text, time.monotonic()), True
                elif alive is None and time.monotonic() - seen[name][1] > self._timeout:
                    alive = False
                self.wait(name, text, alive)
            time.sleep(min(_POLL, self._period / 5))

    def wait(self, name: str, text: str, alive: bool | None) -> None:
        """Removes the lease of a dead run, gives way to one that comes first, or leaves it open."""
        if alive is False:
            logging.warning("Taking over from %s, which has ended.", _describe(name, text))
            self._replaced.append(name)
            (self._folder / name).unlink(missing_ok=True)
        elif alive and (_says_held(text) is not False or name < self._own.name):
            raise UserError(
                f"MODEL_DIR {self._model_dir} is in use by another {self._owner}: "
                f"{_describe(name, text)}. Stop that {self._owner}, or take another MODEL_DIR."
            )

    def _log_wait(self, name: str, alive: bool | None) -> None:
        if alive is None:
            logging.warning(
                "MODEL_DIR %s was last used by %s: watching for a sign of life for up to %.0f s.",
                self._model_dir, _describe(name, ""), self._timeout,
            )  # fmt: skip

    def _others(self) -> dict[str, str]:
        """Leases but this one and those it replaced: name -> what they say."""
        texts = {}
        for path in self._folder.iterdir():
            if path.name not in (self._own.name, *self._replaced) and _NAME.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # It was just given up.
                    texts[path.name] = _read(path)
        return texts

    def check(self) -> None:
        """To be called before writing to the folder: this run may have been taken for dead.

        What storage does not answer is taken for a hiccup, and logged.

        Raises:
          UserError: another run took the folder over, or the lease was deleted.
        """
        try:
            taken = not self._own.exists() or any(map(_says_held, self._others().values()))
        except storage_errors() as error:
            logging.warning("Cannot look at %s (%s): the run goes on.", self._folder, error)
            return
        if taken:
            raise UnsavableError(
                f"MODEL_DIR {self._model_dir} was taken over by another run while this one was "
                f"silent for more than {self._timeout:.0f} s (suspended, or cut off from it): this "
                "one stops and writes nothing more. Start it again once the other has ended."
            )

    def _write(self) -> None:
        record = {
            "held": self._is_held,
            "beat": self._beats,
            "seconds": round(time.monotonic() - self._began, 1),
        }
        with self._writing:
            self._own.write_text(json.dumps(record) + "\n")

    def _beat(self) -> None:
        while not self._stopped.wait(self._period):
            self._beats += 1
            try:
                # One that is gone was taken over: written again it would claim the folder anew.
                if not self._own.exists() or self._stopped.is_set():
                    return
                self._write()
            except Exception as error:  # A heartbeat must not end for a hiccup of the storage.
                logging.warning("Cannot write %s (%s): the run goes on.", self._own, error)

    def release(self) -> None:
        """Ends the heartbeat and takes the lease away; what is left lapses by itself."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._period)
        try:
            self._own.unlink(missing_ok=True)
        except storage_errors() as error:
            logging.warning("Cannot remove %s (%s).", self._own, error)


@contextlib.contextmanager
def held(
    model_dir: str,
    *,
    timeout: float = TIMEOUT,
    period: float = PERIOD,
    host: str | None = None,
    owner: str = "run",
) -> Iterator[Callable[[], None]]:
    """Holds a MODEL_DIR within; yields `Claim.check`, to be called before each save.

    Of several processes, process 0 holds it, and none goes on before it does. Where it is refused,
    process 0 ends with the error; the others wait here, and end when they lose it.

    Args:
      model_dir: local or remote; made if absent.
      timeout: seconds without a heartbeat after which a holder on another machine is taken for
        dead; several times as long as the holder's period.
      period: seconds between this run's own heartbeats.
      host: pretends to run on another machine, by name; None for this one.
      owner: what holds it, for people.

    Raises:
      UserError: another live run holds it, or it cannot be written.
    """
    if jax.process_index() != 0:
        checkpoints.wait_for_all_processes("lease_held")
        yield lambda: None
        return
    claim = Claim(model_dir, Holder.this_process(host), timeout, period, owner)
    claim.acquire()
    try:
        checkpoints.wait_for_all_processes("lease_held")
        yield claim.check
    finally:
        claim.release()


def _holder(name: str) -> Holder:
    """Whose lease has this name."""
    match = _NAME.fullmatch(name)
    assert match is not None
    host, namespace, pid, ticks, key = match.groups()
    return Holder(host, namespace, int(pid), int(ticks), key)


def _read(path: epath.Path) -> str:
    """What a lease says; read again where it is just being written."""
    text = ""
    for _ in range(5):
        text = path.read_bytes().decode(errors="replace")
        if _says_held(text) is not None:
            break
        time.sleep(0.02)
    return text


def _says_held(text: str) -> bool | None:
    """Whether a lease says that it is held; None where it cannot be read, of a full disk say."""
    try:
        return bool(json.loads(text)["held"])
    except (ValueError, KeyError, TypeError):
        return None


def _describe(name: str, text: str) -> str:
    """'process 12 on host-3, running for 2 h 5 min'."""
    holder = _holder(name)
    who = f"process {holder.pid} on {holder.host}"
    try:
        seconds = float(json.loads(text)["seconds"])
    except (ValueError, KeyError, TypeError):
        return who
    return f"{who}, running for {run_summary.format_duration(seconds)}"
