"""Tells when a run hangs, and where: all stacks, after a time in which nothing got done."""

import contextlib
import ctypes
import dataclasses
import faulthandler
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from clipa_t5x import peers
from clipa_t5x.errors import UserError, check_number, storage_errors
from clipa_t5x.preemption import RESTART_STATUS

# For a report to be written; storage may be what hangs.
_WRITE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Watchdog:
    """How long nothing may get done.

    Attributes:
      timeout_seconds: from the end of one step, batch of an evaluation, compilation or save to
        that of the next; None does not watch.
      abort: whether the process ends then, with `preemption.RESTART_STATUS`, so that whoever
        started it starts it again; else it tells and goes on waiting. One whose native code never
        gives back the interpreter ends by SIGABRT, as in `peers`.
    """

    timeout_seconds: float | None = 1800.0
    abort: bool = False

    def __post_init__(self) -> None:
        """Refuses what is no time.

        Raises:
          UserError: names it.
        """
        if self.timeout_seconds is not None:
            check_number("HANG_TIMEOUT", self.timeout_seconds, minimum=1)
        if not isinstance(self.abort, bool):
            raise UserError(f"ABORT_ON_HANG is {self.abort!r}; it must be True or False.")

    @contextlib.contextmanager
    def watching(self, model_dir: str) -> Iterator["Watch"]:
        """Watches within; what it sees goes to stderr and `model_dir`/hang_<process>.txt."""
        watch = Watch(self, model_dir)
        if self.timeout_seconds is None:
            yield watch
            return
        watch.start()
        try:
            yield watch
        finally:
            watch.stop()


class Watch:
    """A thread that waits for signs of life; any thread gives them."""

    def __init__(self, cfg: Watchdog, model_dir: str):
        """Does not watch yet."""
        self._timeout, self._abort = cfg.timeout_seconds or 0.0, cfg.abort
        self._path = epath.Path(model_dir) / f"hang_{jax.process_index()}.txt"
        self._step: int | None = None
        self._heard, self._what = time.monotonic(), "the start"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def completed(self, step: int) -> None:
        """A step has ended on the devices."""
        self._step = step
        self.beat(f"step {step}")

    def beat(self, what: str) -> None:
        """Something else has got done."""
        self._heard, self._what = time.monotonic(), what

    def start(self) -> None:
        """Begins to wait."""
        self.beat("the start")
        if self._abort:
            _abort_on_sigalrm()
        self._outlast_the_interpreter()
        self._thread.start()

    def stop(self) -> None:
        """Waits no more."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._abort:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _watch(self) -> None:
        reported = 0.0  # When the last report was, of this hang or an earlier one.
        while not self._stopped.wait(min(self._timeout / 10, 1.0)):
            self._outlast_the_interpreter()
            now = time.monotonic()
            if now - max(self._heard, reported) > self._timeout:
                self._report(now - self._heard)
                reported = time.monotonic()

    def _outlast_the_interpreter(self) -> None:
        """Sets the timers that act where native code holds the interpreter, and this thread."""
        faulthandler.dump_traceback_later(self._timeout, file=2)
        if self._abort:
            # Later than a report takes that is made here.
            signal.setitimer(signal.ITIMER_REAL, self._timeout + 2 * _WRITE_SECONDS)

    def _report(self, silence: float) -> None:
        """Tells, and ends the process where it should."""
        step = "none" if self._step is None else self._step
        text = (
            f"Nothing got done for {silence:.0f} s (HANG_TIMEOUT is {self._timeout:g}) since "
            f"{self._what}; the last completed step is {step}. All stacks of process "
            f"{jax.process_index()}:\n{_stacks()}"
        )
        sys.stderr.write(text)
        sys.stderr.flush()
        writer = threading.Thread(target=_write, args=(self._path, text), daemon=True)
        writer.start()
        writer.join(timeout=_WRITE_SECONDS)
        if self._abort:
            sys.stderr.write(f"Ending with status {RESTART_STATUS}: start the run again.\n")
            sys.stderr.flush()
            peers.abandon(RESTART_STATUS, f"hangs since {self._what}")


def _write(path: epath.Path, text: str) -> None:
    try:
        path.write_text(text)
    except storage_errors() as error:
        logging.warning("Cannot write %s (%s).", path, error)


def _stacks() -> str:
    """What every thread of this process is at."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _abort_on_sigalrm() -> None:
    """Has the timer's signal end the process from native code, in whichever thread it arrives."""
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGALRM, ctypes.cast(libc.abort, ctypes.c_void_p))
