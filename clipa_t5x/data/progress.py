"""How far long work is, its rate, and when it will be done."""

import threading
import time
from typing import TextIO


class Progress:
    """Counts on a stream: in place on a terminal, else on a new line now and then.

    Safe among threads.
    """

    def __init__(self, total: int, stream: TextIO, what: str = "records"):
        """Prepares to count; the clock starts with the first.

        Args:
          total: the number that will have been counted at the end.
          stream: where to write.
          what: is counted.
        """
        self._what = what
        self._lock = threading.Lock()
        self._total = total
        self._stream = stream
        self._in_place = stream.isatty()
        self._interval = 0.2 if self._in_place else 5.0
        self._done = self._first = 0
        self._start = self._last_report = 0.0

    def count(self, number: int = 1) -> None:
        """Counts so many more."""
        if not number:
            return
        with self._lock:
            now = time.monotonic()
            if self._done == 0:
                # What went before, such as TensorFlow's import, tells nothing about the rate.
                self._start = self._last_report = now
                self._first = number
            self._done += number
            if now - self._last_report >= self._interval or self._done == self._total:
                self._last_report = now
                self._report(now - self._start)

    def _report(self, seconds: float) -> None:
        rate = (self._done - self._first) / max(seconds, 1e-6)
        eta = (self._total - self._done) / max(rate, 1e-6)
        speed = f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"
        line = f"{self._done}/{self._total} {self._what}, {speed}/s, ETA {eta:.0f} s"
        if self._in_place:
            end = "\n" if self._done == self._total else ""
            self._stream.write(f"\r{line:<60}{end}")
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()
