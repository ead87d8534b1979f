"""Stopping a run in good order: SIGTERM, SIGINT and the platform's notice of preemption.

The first signal to any process asks all of them to finish their step, save at the same step, and
end with `RESTART_STATUS`. A second one ends its process at once; what is being saved then does not
count, and the checkpoint before it stays whole.
"""

import atexit
import contextlib
import itertools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from absl import logging
from jax._src import distributed  # jax has no public door to its key-value store.
from jax.experimental import multihost_utils

# EX_TEMPFAIL: nothing is wrong with the command, and given again it goes on where it was.
RESTART_STATUS = 75

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_WAIT_MS = 600_000
_JOIN_SECONDS = 10
_ROUNDS = itertools.count(1)


class RestartError(Exception):
    """Something ends early and in good order; the same command goes on where it was."""


class PreemptedError(RestartError):
    """The run was asked to stop, and has: everything it did is saved."""

    def __init__(self, step: int):
        super().__init__(f"The run stopped on request after step {step}, which is saved")
        self.step = step


class StopRequest:
    """Whether the run is asked to stop; see `stop_requests`."""

    def __init__(self):
        """Of no request yet. Every process makes its own, as often as the others do."""
        self._signals = 0
        self._agreement = _Agreement() if jax.process_count() > 1 else None

    def receive(self, signum: int) -> None:
        """Takes note of a signal; the second one ends the process with 128 + its number."""
        self._signals += 1
        if self._signals > 1:
            os.write(2, b"Second signal: ending at once.\n")
            os._exit(128 + signum)
        name = signal.Signals(signum).name
        line = (
            f"{name}: the run will finish its step, save, and end with status {RESTART_STATUS}; a "
            "second signal ends it at once.\n"
        )
        os.write(2, line.encode())
        if self._agreement is not None:
            self._agreement.tell()

    def requested(self) -> bool:
        """Whether to stop now: the same answer on all processes, which ask equally often.

        Of several processes one may hear of it earlier: all go on until they have asked as often as
        the one that is furthest. Takes microseconds.
        """
        if self._agreement is None:
            return self._signals > 0
        return self._agreement.poll()


class _Agreement:
    """Has all processes stop at the same poll, whichever of them was told to.

    It is reached by threads over the coordination service's key-value store: a process that waits
    in a collective, compiles or evaluates answers all the same. jax's preemption service works
    alike, but hears of SIGTERM alone, by a handler of its own that Python's would replace; it is
    asked, too, for what else the platform may tell it.
    """

    def __init__(self):
        self._client: Any = distributed.global_state.client
        self._key = f"clipa_t5x/stop/{next(_ROUNDS)}"
        self._lock = threading.Lock()
        self._polls, self._last_poll = 0, math.inf
        self._told = False
        # It serves until the process ends: a peer that lags behind may still ask for the polls of
        # one that is done.
        self._thread = threading.Thread(target=self._run, name="stop", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def _end(self) -> None:
        """Leaves the run before Python ends: a thread that native code gives back then aborts."""
        jax.distributed.shutdown()
        self._thread.join(_JOIN_SECONDS)

    def tell(self) -> None:
        """Asks all processes to stop."""
        self._told = True
        self._client.key_value_set(f"{self._key}/told", "", allow_overwrite=True)

    def poll(self) -> bool:
        """Counts; whether all processes have been told and this is where they stop."""
        with self._lock:
            self._polls += 1
        manager = distributed.global_state.preemption_sync_manager
        if manager is not None and multihost_utils.reached_preemption_sync_point(self._polls):
            self.tell()
        with self._lock:
            return self._polls >= self._last_poll

    def _run(self) -> None:
        try:
            while not self._is_told():
                pass
            if not self._told:
                logging.info("Another process was told to stop: all will, at the same step.")
            self.wait()
        except jax.errors.JaxRuntimeError:  # The run ends, or loses a process: others see to that.
            logging.debug("Nobody can be told to stop any more.", exc_info=True)

    def _is_told(self) -> bool:
        try:
            self._client.blocking_key_value_get(f"{self._key}/told", _WAIT_MS)
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("DEADLINE_EXCEEDED"):
                raise
            return False
        return True

    def wait(self) -> None:
        """Stops all at the first poll that none has reached; none polls meanwhile."""
        with self._lock:
            prefix = f"{self._key}/polls"
            self._client.key_value_set(f"{prefix}/{jax.process_index()}", str(self._polls))
            polls = [
                int(self._client.blocking_key_value_get(f"{prefix}/{i}", _WAIT_MS))
                for i in range(jax.process_count())
            ]
            self._last_poll = max(polls) + 1


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns signals into a request to stop, within; afterwards they do what they did before.

    Only the main thread may change what signals do: in another one none are heard.
    """
    stop = StopRequest()
    with _heard(stop.receive):
        yield stop


@contextlib.contextmanager
def signals_end_the_process(end: Callable[[str], Any]) -> Iterator[None]:
    """Has `end` end the process on a signal, within, where there is nothing to save yet.

    Args:
      end: called once with the signal's name, in a thread.
    """
    with _heard(lambda signum: end(signal.Signals(signum).name)):
        yield


def take_back_sigterm() -> None:
    """Undoes that jax handles SIGTERM, as it does from the time processes join.

    Its handler would make nothing of it but a notice that only `StopRequest` looks at.
    """
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


@contextlib.contextmanager
def _heard(receive: Callable[[int], None]) -> Iterator[None]:
    """Calls `receive` with every one of SIGNALS, in a thread.

    The main thread hears of a signal only when it comes back from what it is in, such as a
    compilation of minutes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_listening(receive))
        for signum in SIGNALS:
            stack.enter_context(_handled(signum))
        yield


@contextlib.contextmanager
def _listening(receive: Callable[[int], None]) -> Iterator[None]:
    """Calls `receive` with every signal of SIGNALS that Python handles, in a thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        while signums := os.read(reader, 1):
            if signums[0] in SIGNALS:
                receive(signums[0])

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)


@contextlib.contextmanager
def _handled(signum: int) -> Iterator[None]:
    """Has Python handle a signal, and do nothing: `_listening` hears of it."""

    def ignore(signum: int, frame: FrameType | None) -> None:
        del signum, frame

    before = signal.signal(signum, ignore)
    try:
        yield
    finally:
        # None: a handler of native code, which Python cannot put back.
        signal.signal(signum, signal.SIG_DFL if before is None else before)
