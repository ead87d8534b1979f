"""Processes that write shards, and end with the one that started them."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from clipa_t5x.data import shard_conversion
from clipa_t5x.errors import UserError

_SECONDS_PER_REPORT = 0.2
# Of a worker process: how many records all of them have done, and whether to leave off.
_DONE: Any = None
_STOP: Any = None


def run(
    tasks: Mapping[int, shard_conversion.ShardTask],
    num_workers: int,
    count: Callable[[int], None],
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """Writes shards and yields (number, what `shard_conversion.write_shard` returned) as they end.

    Args:
      tasks: by number.
      num_workers: processes; 0 works in this one.
      count: called with how many more records are done.

    Raises:
      UserError: the disk refuses, or a process was killed.
    """
    if not num_workers:
        for number, task in tasks.items():
            yield number, shard_conversion.write_shard(task, count)
        return
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("q", 0), context.Event()
    pool = futures.ProcessPoolExecutor(
        min(num_workers, max(len(tasks), 1)), context, _start, (done, stop)
    )
    try:
        yield from _collect(pool, tasks, 2 * num_workers, done, count)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for want of memory: run the same command again, "
            f"with fewer than --num_workers={num_workers}. Finished shards are kept."
        ) from error
    finally:
        # Where all went well nothing runs any more; else shards that are being written are dropped.
        stop.set()
        pool.shutdown(cancel_futures=True)


def _collect(
    pool: futures.ProcessPoolExecutor,
    tasks: Mapping[int, shard_conversion.ShardTask],
    most: int,
    done: Any,
    count: Callable[[int], None],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Keeps `most` tasks in the pool: a task holds the positions of its records."""
    reported, left = 0, iter(tasks.items())
    running: dict[futures.Future, int] = {}
    while True:
        while len(running) < most and (item := next(left, None)):
            running[pool.submit(_write, item[1])] = item[0]
        finished, _ = futures.wait(
            running, _SECONDS_PER_REPORT, return_when=futures.FIRST_COMPLETED
        )
        now = done.value
        count(now - reported)
        reported = now
        for future in finished:
            yield running.pop(future), future.result()
        if not running:
            return


def _start(done: Any, stop: Any) -> None:
    """Prepares a worker process."""
    global _DONE, _STOP
    _DONE, _STOP = done, stop
    # Ctrl-C reaches the whole group; the parent tells the workers what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # Without this, workers of a parent that was killed would wait for tasks forever.
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _write(task: shard_conversion.ShardTask) -> dict[str, Any]:
    return shard_conversion.write_shard(task, _report)


def _report(number: int) -> None:
    with _DONE.get_lock():
        _DONE.value += number
    if _STOP.is_set():
        raise shard_conversion.Stopped
