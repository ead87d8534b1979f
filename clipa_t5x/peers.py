"""The other processes of a run: where one is gone, all end, to be started again.

What waits for a dead process waits for ever, or fails with whatever error the device's network has.
So every process holds a TCP connection to process 0. It breaks when one of its ends dies, for the
kernel closes it, or when its machine does, for the kernel asks; process 0 then tells all others.

Exit statuses of a run of several processes, for those that outlive another: `RESTART_STATUS`; or
that of SIGABRT (134, -6) where jax's own service has to find that the run is broken: a process is
frozen, or never came, or the connections are forbidden. Both mean: start all processes again.
"""

import contextlib
import ctypes
import dataclasses
import os
import re
import secrets
import selectors
import signal
import socket
import threading
import time
from typing import Any, NoReturn

import jax
from absl import logging
from jax._src import distributed  # jax has no public door to its key-value store.

from clipa_t5x.preemption import RESTART_STATUS

_MEETING, _LEAVES = "clipa_t5x/peers/meeting", "leaves"
_CONNECT_SECONDS = 60

# Where all processes fail alike, each has this time to say why before it ends for another's sake.
_GRACE_SECONDS = 3.0

# How errors begin that a lost process may have caused; others are this process's own.
_BROKEN = re.compile(
    r"(CANCELLED|UNKNOWN|DEADLINE_EXCEEDED|ABORTED|INTERNAL|UNAVAILABLE|FAILED_PRECONDITION): "
)

_leaving, _failing = threading.Event(), threading.Event()
_meeting: "_Host | _Guest | None" = None


def service_timeout(timeout_seconds: int) -> int:
    """Heartbeat timeout, in seconds, of jax's coordination service.

    It ends processes by SIGABRT, after between half of this and all of it: only where `watch`,
    which tells more, should have ended them already.
    """
    return 5 * timeout_seconds // 2


def watch(timeout_seconds: int) -> None:
    """Ends this process when another one of the run dies, within `timeout_seconds`.

    It takes moments where a process dies, and the timeout where its machine does. To be called
    once, after `jax.distributed.initialize`.
    """
    global _meeting
    client: Any = distributed.global_state.client
    _delay_aborts()
    if distributed.global_state.process_id == 0:
        _meeting = _Host(timeout_seconds)
        client.key_value_set(_MEETING, f"{_meeting.port} {_meeting.token}")
        return
    port, token = client.blocking_key_value_get(_MEETING, 1000 * _CONNECT_SECONDS).split()
    host = str(distributed.global_state.coordinator_address).rpartition(":")[0].strip("[]")
    try:
        _meeting = _Guest((host, int(port)), token, timeout_seconds)
    except OSError as error:
        logging.warning(
            "Cannot connect to process 0 at %s:%s (%s): a lost process will be seen after up to "
            "%d s, and end the others by SIGABRT.",
            host, port, error, service_timeout(timeout_seconds),
        )  # fmt: skip


def leave() -> None:
    """To be called before an exit in good order: from now on this process is no loss."""
    _leaving.set()
    if isinstance(_meeting, _Guest):
        _meeting.send(_LEAVES)


def abandon(status: int, why: str) -> NoReturn:
    """Ends a failed process at once, telling the others.

    An ordinary exit would wait for the others, which may wait in a collective for this one.

    Args:
      status: the exit status.
      why: completes 'process 3 ...', in one line.
    """
    _failing.set()
    if _meeting is not None:
        _meeting.fail(why)
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


@dataclasses.dataclass
class _Member:
    """What process 0 knows of the other end of a connection: its index, and what it said last."""

    index: int | None = None
    unread: bytes = b""
    has_left: bool = False


class _Host:
    """Process 0's part: it hears of every loss, and passes it on."""

    def __init__(self, timeout_seconds: int):
        """Begins to listen, at any port."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        self.port, self.token = self._server.getsockname()[1], secrets.token_hex(8)
        self._timeout = timeout_seconds
        self._connections: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        threading.Thread(target=self._run, name="peers", daemon=True).start()

    def fail(self, why: str) -> None:
        """Tells all that process 0 fails."""
        self._tell_all(f"process 0 {why}")

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    with contextlib.suppress(OSError):
                        self._accept()
                else:
                    self._read(key.fileobj, key.data)

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        _keep_alive(connection, self._timeout)
        self._selector.register(connection, selectors.EVENT_READ, _Member())
        self._connections.add(connection)

    def _read(self, connection: Any, member: _Member) -> None:
        try:
            data = connection.recv(4096)
        except OSError:
            data = b""
        member.unread += data
        *lines, member.unread = member.unread.split(b"\n")
        for line in lines:
            self._hear(member, line.decode(errors="replace"))
        is_stranger = member.index is None and bool(lines or len(member.unread) > 64)
        if not data or is_stranger:
            self._selector.unregister(connection)
            self._connections.discard(connection)
            connection.close()
            if member.index is not None and not member.has_left:
                self._lose(f"process {member.index} is gone")

    def _hear(self, member: _Member, line: str) -> None:
        if member.index is None:
            token, _, index = line.partition(" ")
            if token == self.token:
                member.index = int(index)
            return
        member.has_left = True
        if line != _LEAVES:
            self._lose(f"process {member.index} {line}", _GRACE_SECONDS)

    def _lose(self, word: str, grace: float = 0.0) -> None:
        self._tell_all(word)
        # In a thread: another process may yet have something to say.
        threading.Thread(target=_end, args=(word, grace), daemon=True).start()

    def _tell_all(self, word: str) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.sendall(f"{word}\n".encode())


class _Guest:
    """The part of every other process."""

    def __init__(self, address: tuple[str, int], token: str, timeout_seconds: int):
        """Connects.

        Raises:
          OSError: it cannot.
        """
        self._connection = socket.create_connection(address, timeout=_CONNECT_SECONDS)
        self._connection.settimeout(None)
        _keep_alive(self._connection, timeout_seconds)
        self.send(f"{token} {distributed.global_state.process_id}")
        threading.Thread(target=self._run, name="peers", daemon=True).start()

    def fail(self, why: str) -> None:
        """Tells process 0 that this one fails."""
        self.send(why)

    def send(self, word: str) -> None:
        """Tells process 0 a word."""
        with contextlib.suppress(OSError):
            self._connection.sendall(f"{word}\n".encode())

    def _run(self) -> None:
        word = ""
        with contextlib.suppress(OSError), self._connection.makefile(errors="replace") as lines:
            word = next((line.strip() for line in lines), "")
        if word:
            _end(word, _GRACE_SECONDS)
        elif not _leaving.is_set():
            _end("process 0 is gone")


def _end(word: str, grace: float = 0.0) -> None:
    """Ends this process for another's sake, unless it fails by itself within the grace."""
    time.sleep(grace)
    if _failing.is_set():  # It ends with a status that tells more.
        return
    line = (
        f"error: {word}: this process ends with status {RESTART_STATUS}. Start all processes of "
        "the run again; it goes on from its newest checkpoint.\n"
    )
    # Not through the log: whoever hangs may hold its lock.
    os.write(2, line.encode())
    os._exit(RESTART_STATUS)


def _keep_alive(connection: socket.socket, timeout_seconds: int) -> None:
    """Has the kernel break a connection whose other machine does not answer for so long."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = 5
    interval = max(timeout_seconds // (2 * probes), 1)
    options = {
        "TCP_KEEPIDLE": max(timeout_seconds - probes * interval, 1),
        "TCP_KEEPINTVL": interval,
        "TCP_KEEPCNT": probes,
        "TCP_USER_TIMEOUT": 1000 * timeout_seconds,
    }
    for name, value in options.items():
        if hasattr(socket, name):  # The last one is Linux's.
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _delay_aborts() -> None:
    """Leaves this module a few seconds before jax's client aborts the process.

    It does so, from native code, in the same moment in which process 0 is gone, and no hook of it
    can be set from Python. What a signal handler may call is `sleep`; its argument is then the
    number of the signal, six seconds. The process dies of the signal all the same afterwards.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
