"""Stopping a run in good order: SIGTERM, SIGINT and the platform's notice of preemption.

The first signal to any process asks all of them to finish their step, save at the same step, and
end with `RESTART_STATUS`. A second one ends its process at once; what is being saved then does not
count, and the checkpoint before it stays whole.
"""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from absl import logging
from jax.experimental import multihost_utils

# EX_TEMPFAIL: nothing is wrong with the command, and given again it goes on where it was.
RESTART_STATUS = 75

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class PreemptedError(Exception):
    """The run was asked to stop, and has: everything it did is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped on request after step {step}, which is saved")
        self.step = step


class StopRequest:
    """Whether the run is asked to stop; see `stop_requests`."""

    def __init__(self, notify: Callable[[int], None] | None = None):
        """Of no request yet; `notify` is told of the first signal."""
        self._notify = notify
        self._signals, self._polls, self._agreed = 0, 0, False

    def receive(self, signum: int) -> None:
        """Takes note of a signal; the second one ends the process."""
        self._signals += 1
        if self._signals > 1:
            os.write(2, b"Second signal: ending at once.\n")
            os._exit(128 + signum)
        os.write(
            2,
            f"{signal.Signals(signum).name}: the run will finish its step, save, and end with "
            f"status {RESTART_STATUS}; a second signal ends it at once.\n".encode(),
        )
        if self._notify is not None:
            self._notify(signum)

    def requested(self) -> bool:
        """Whether to stop now: the same answer on all processes, which ask equally often.

        Of several processes one may hear of it earlier: all go on until they have asked as often as
        the one that is furthest.
        """
        if jax.process_count() == 1:
            return self._signals > 0
        self._polls += 1
        self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(self._polls)
        return self._agreed


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns signals into a request to stop, within; afterwards they do what they did before.

    Only the main thread may change what signals do: in another one none are heard.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    with contextlib.ExitStack() as stack:
        notify = stack.enter_context(_platform_notice()) if jax.process_count() > 1 else None
        stop = StopRequest(notify)
        # In a thread: the main one hears of a signal only when it comes back from what it is in,
        # such as a compilation of minutes.
        stack.enter_context(_listening(stop.receive))
        for signum in SIGNALS:
            stack.enter_context(_handled(signum))
        yield stop


@contextlib.contextmanager
def _platform_notice() -> Iterator[Callable[[int], None]]:
    """Tells jax's preemption service of a signal, which tells the other processes.

    The service has a handler of its own for SIGTERM, in C, that takes the place of any notice by
    the platform. Python's handler would replace it, so that it is kept and called from there.
    """
    c_signal = ctypes.CDLL(None).signal
    c_signal.restype, c_signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    ignore = 1
    address = c_signal(signal.SIGTERM, ignore)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
    try:
        yield lambda signum: handler(signal.SIGTERM)
    finally:
        c_signal(signal.SIGTERM, address)


@contextlib.contextmanager
def _listening(receive: Callable[[int], None]) -> Iterator[None]:
    """Calls `receive` with every signal that Python handles, in a thread."""
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
        logging.debug("Signal %d.", signum)

    before = signal.signal(signum, ignore)
    try:
        yield
    finally:
        # None: a handler that Python does not know; `_platform_notice` puts it back.
        signal.signal(signum, signal.SIG_DFL if before is None else before)
