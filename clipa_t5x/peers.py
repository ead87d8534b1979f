"""The other processes of a run: where one is gone, all end, to be started again.

What waits for a dead process waits for ever, or fails with whatever error the device's network has.
So every process tells process 0 that it lives, through the coordination service's key-value store,
and process 0 tells all of them when one no longer does.

Exit statuses of a run of several processes, for those that outlive another: `RESTART_STATUS`; or
that of SIGABRT (134, -6) where jax itself sees first that the run is broken, as it does where
this process's interpreter is stuck. Both mean: start all processes again.
"""

import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
from absl import logging
from jax._src import distributed  # jax has no public door to its key-value store.

from clipa_t5x.preemption import RESTART_STATUS

_ALIVE, _LOST = "clipa_t5x/peers/alive", "clipa_t5x/peers/lost"

# Where all processes fail alike, each has this time to say why before it ends for another's sake.
_GRACE_SECONDS = 3.0

# How errors begin that a lost process may have caused; others are this process's own.
_BROKEN = re.compile(
    r"(CANCELLED|UNKNOWN|DEADLINE_EXCEEDED|ABORTED|INTERNAL|UNAVAILABLE|FAILED_PRECONDITION): "
)

_leaving, _failing = threading.Event(), threading.Event()


def service_timeout(timeout_seconds: int) -> int:
    """Heartbeat timeout, in seconds, of jax's coordination service.

    It ends processes by SIGABRT, after between half of this and all of it: only where `watch`,
    which tells more, should have ended them already.
    """
    return 5 * timeout_seconds // 2


def watch(timeout_seconds: int) -> None:
    """Ends this process within `timeout_seconds` of the death of another one of the run.

    Call once, after `jax.distributed.initialize`. Until `leave`, this process ends in the same way
    when the coordination service, which lives in process 0, is gone.
    """
    _delay_aborts()
    threading.Thread(target=_watch, args=(timeout_seconds,), name="peers", daemon=True).start()


def leave() -> None:
    """To be called before an exit in good order: from now on the service may end."""
    _leaving.set()


def abandon(status: int, why: str) -> NoReturn:
    """Ends a failed process at once, telling the others.

    An ordinary exit would wait for the others, which may wait in a collective for this one.

    Args:
      status: the exit status.
      why: completes 'process 3 ...'.
    """
    _failing.set()
    if jax.distributed.is_initialized():
        # In a thread: it must end where the service is gone, too.
        word = f"process {distributed.global_state.process_id} {why}"
        thread = threading.Thread(target=_announce, args=(word,), daemon=True)
        thread.start()
        thread.join(timeout=_GRACE_SECONDS)
        if distributed.global_state.service is not None:
            time.sleep(_GRACE_SECONDS + 1)  # The others can read it for as long as this one lives.
    os._exit(status)


def end_if_lost(error: BaseException, timeout_seconds: int) -> None:
    """Ends this process where `error` is found to come from the loss of another one.

    Returns:
      Where it does not: at once if it cannot, else after as long as a loss takes to be seen.
    """
    if jax.distributed.is_initialized() and may_come_from_a_loss(error):
        logging.info("Waiting for up to %d s to see whether a process was lost.", timeout_seconds)
        time.sleep(timeout_seconds)


def may_come_from_a_loss(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is the runtime's and not of one process alone."""
    while error is not None:
        if _BROKEN.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _interval(timeout_seconds: float) -> float:
    """Seconds between signs of life."""
    return min(timeout_seconds / 10, 5.0)


class Liveness:
    """Which processes show no life, by this process's clock."""

    def __init__(self, num_processes: int, timeout_seconds: float):
        """Of processes that are lost after `timeout_seconds`, from now on."""
        self._timeout = timeout_seconds
        self._signs = [""] * num_processes
        self._since = [time.monotonic()] * num_processes

    def lost(self, signs: Mapping[int, str]) -> list[int]:
        """Indices of those whose sign has been the same, or none, for longer than the timeout."""
        now = time.monotonic()
        for index, sign in signs.items():
            if sign != self._signs[index]:
                self._signs[index], self._since[index] = sign, now
        return [index for index, since in enumerate(self._since) if now - since > self._timeout]


def _watch(timeout_seconds: int) -> None:
    state = distributed.global_state
    client: Any = state.client
    interval = _interval(timeout_seconds)
    # A sign may be an interval old when its sender dies, and is looked at once in an interval.
    silence = timeout_seconds - 2 * interval - _GRACE_SECONDS
    liveness, sign = Liveness(state.num_processes, silence), 0
    try:
        while not _failing.is_set():
            sign += 1
            client.key_value_set(f"{_ALIVE}/{state.process_id}", str(sign), allow_overwrite=True)
            if state.process_id == 0 and (lost := liveness.lost(_signs(client))):
                _announce(f"process {lost[0]} has shown no life for {silence:.0f} s")
            if word := _wait(client, interval):
                time.sleep(_GRACE_SECONDS)
                _end(word)
    except jax.errors.JaxRuntimeError as error:
        if not _leaving.is_set():
            _end(f"process 0, where all meet, is gone ({str(error).splitlines()[0]})")


def _signs(client: Any) -> dict[int, str]:
    """The latest sign of life of every process that has given one."""
    return {int(key.rpartition("/")[2]): sign for key, sign in client.key_value_dir_get(_ALIVE)}


def _wait(client: Any, seconds: float) -> str:
    """What was announced; '' where nothing is within `seconds`."""
    try:
        return client.blocking_key_value_get(_LOST, int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        if str(error).startswith("DEADLINE_EXCEEDED"):
            return ""
        raise


def _announce(word: str) -> None:
    try:
        distributed.global_state.client.key_value_set(_LOST, word)  # pyright: ignore
    except jax.errors.JaxRuntimeError:  # Another was faster, or nobody can be told any more.
        logging.debug("Cannot announce that %s.", word, exc_info=True)


def _end(word: str) -> None:
    if _failing.is_set():  # It ends by itself, and with a status that tells more.
        return
    line = (
        f"error: {word}: this process ends with status {RESTART_STATUS}. Start all processes of "
        "the run again; it goes on from its newest checkpoint.\n"
    )
    # Not through the log: whoever hangs may hold its lock.
    os.write(2, line.encode())
    os._exit(RESTART_STATUS)


def _delay_aborts() -> None:
    """Leaves `_watch` a few seconds before jax's client aborts this process.

    It does so, from native code, in the same moment in which process 0 is gone, and no hook of it
    can be set from Python. What a signal handler may call is `sleep`; its argument is then the
    number of the signal, six seconds. The process dies of the signal all the same afterwards.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
