"""Bytes of a file at any position, of local and of remote files; remote ones by cached blocks.

TensorFlow, which takes seconds to import, is imported where a file is remote: processes that only
convert local shards go without it.
"""

import collections
import functools
import os
import threading
from concurrent import futures
from typing import Any

BLOCK_BYTES = 4 * 2**20
# Blocks that are asked for by several threads at once are fetched once each, so many at a time.
_FETCHES = 16


def _gfile() -> Any:
    import tensorflow as tf

    return tf.io.gfile


def _read_at(file: Any, offset: int, size: int) -> bytes:
    """At most `size` bytes of an open remote file; none past its end, as os.pread has it."""
    import tensorflow as tf

    try:
        file.seek(offset)
        return file.read(size)
    except tf.errors.OutOfRangeError:
        return b""


def is_local(path: str) -> bool:
    """Whether a path is a file of this machine rather than a URL such as gs://."""
    return "://" not in path


# More than records have, and where files end at the latest.
_LARGE_BYTES, _MOST_OFFSET = 2**26, 2**62


class BlockCache:
    """The most recently used blocks of remote files, no more bytes than a stated number.

    An object store answers in tens of milliseconds, whether it is asked for one record or for
    megabytes: neighbours of a record come along, and are there when a shuffle window asks for them.
    """

    def __init__(self, max_bytes: int, block_bytes: int = BLOCK_BYTES):
        self._block_bytes = block_bytes
        self._max_blocks = max(1, max_bytes // block_bytes)
        self._blocks: collections.OrderedDict[tuple[str, int], futures.Future[bytes]]
        self._blocks = collections.OrderedDict()
        self._lock = threading.Lock()
        self._pool = futures.ThreadPoolExecutor(_FETCHES, "remote-blocks")

    def read(self, path: str, offset: int, size: int) -> bytes:
        """At most `size` bytes of a file from `offset`; fewer at its end."""
        first, last = offset // self._block_bytes, (offset + max(size, 1) - 1) // self._block_bytes
        blocks = [self._block(path, number) for number in range(first, last + 1)]
        data = b"".join(block.result() for block in blocks)
        start = offset - first * self._block_bytes
        return data[start : start + size]

    def _block(self, path: str, number: int) -> "futures.Future[bytes]":
        key = (path, number)
        with self._lock:
            block = self._blocks.get(key)
            if block is None or (block.done() and block.exception() is not None):
                block = self._pool.submit(self._fetch, path, number)
                self._blocks[key] = block
            self._blocks.move_to_end(key)
            while len(self._blocks) > self._max_blocks:
                self._blocks.popitem(last=False)
            return block

    def _fetch(self, path: str, number: int) -> bytes:
        with _gfile().GFile(path, "rb") as f:
            return _read_at(f, number * self._block_bytes, self._block_bytes)


class ShardReader:
    """Random reads from one shard, local or remote; closed by `with`."""

    def __init__(self, path: str, cache: BlockCache | None = None):
        """Opens nothing yet.

        Args:
          path: of the shard.
          cache: of remote blocks; None reads a remote file as it is asked for.
        """
        self.path = path
        self._cache = cache

    def __enter__(self) -> "ShardReader":
        if is_local(self.path):
            self._fd = os.open(self.path, os.O_RDONLY)
        elif self._cache is None:
            self._file = _gfile().GFile(self.path, "rb")
        return self

    def __exit__(self, *_) -> None:
        if is_local(self.path):
            os.close(self._fd)
        elif self._cache is None:
            self._file.close()

    @functools.cached_property
    def size(self) -> int:
        """Bytes of the file."""
        if is_local(self.path):
            return os.fstat(self._fd).st_size
        return _gfile().stat(self.path).length

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer at the end of the file.

        Numbers that a damaged index made up find nothing, or less.
        """
        if min(offset, size) < 0 or offset > _MOST_OFFSET:
            return b""
        if size > _LARGE_BYTES:  # Memory for it is asked for before anything is read.
            size = max(0, min(size, self.size - offset))
        if is_local(self.path):
            return os.pread(self._fd, size, offset)
        if self._cache is not None:
            return self._cache.read(self.path, offset, size)
        return _read_at(self._file, offset, size)
