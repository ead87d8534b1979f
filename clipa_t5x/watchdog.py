"""Tells when a run hangs, and where: all stacks, after a time in which nothing got done."""

import contextlib
import dataclasses
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from clipa_t5x import preemption
from clipa_t5x.errors import UserError, check_number


@dataclasses.dataclass(frozen=True)
class Watchdog:
    """How long nothing may get done.

    Attributes:
      timeout_seconds: from the end of one step, batch of an evaluation, compilation or save to
        that of the next; None does not watch.
      abort: whether the process ends then, with `preemption.RESTART_STATUS`, so that whoever
        started it starts it again; else it tells and goes on waiting.
    """

    timeout_seconds: float | None = 1800.0
    abort: bool = False

    def __post_init__(self) -> None:
        """Refuses what is no time.

        Raises:
          UserError: names it.
        """
        if self.timeout_seconds is not None:
            check_number("HANG_TIMEOUT", self.timeout_seconds, minimum=1e-3)
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
        self._cfg, self._model_dir = cfg, model_dir
        self._heard, self._what, self._step = time.monotonic(), "the start", None
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
        self._thread.start()

    def stop(self) -> None:
        """Waits no more."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        timeout = self._cfg.timeout_seconds or 0.0
        while not self._stopped.wait(min(timeout / 4, 1.0)):
            # Its timer runs without the interpreter, which native code may hold for ever, this
            # thread with it. Then it can end the process with no status but 1.
            faulthandler.dump_traceback_later(2 * timeout, exit=self._cfg.abort)
            if time.monotonic() - self._heard > timeout:
                self._report()
                if self._cfg.abort:
                    os._exit(preemption.RESTART_STATUS)
                self._heard = time.monotonic()

    def _report(self) -> None:
        silence = time.monotonic() - self._heard
        text = (
            f"Nothing got done for {silence:.0f} s (HANG_TIMEOUT is "
            f"{self._cfg.timeout_seconds:g} s) since {self._what}; the last completed step is "
            f"{'none' if self._step is None else self._step}. All stacks of process "
            f"{jax.process_index()}:\n{_stacks()}"
        )
        sys.stderr.write(text)
        sys.stderr.flush()
        path = epath.Path(self._model_dir) / f"hang_{jax.process_index()}.txt"
        # Storage may be what hangs, or is full: ending the process must not depend on it.
        writer = threading.Thread(target=_write, args=(path, text), daemon=True)
        writer.start()
        writer.join(timeout=10)


def _write(path: epath.Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        logging.warning("Cannot write %s (%s).", path, error)


def _stacks() -> str:
    """What every thread of this process is at."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
