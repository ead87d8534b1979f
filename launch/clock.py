"""Time, as whoever waits for it sees it; tests have another one."""

import time


class Clock:
    """Time, and the wish to stop."""

    def __init__(self):
        self.is_stopping = False

    def now(self) -> float:
        """Seconds."""
        return time.monotonic()

    def unix_time(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Sleeps; less, where it is asked to stop meanwhile."""
        end, was_stopping = self.now() + seconds, self.is_stopping
        # In slices: a signal's handler does not cut a sleep short, and may take no lock.
        while (left := end - self.now()) > 0 and self.is_stopping == was_stopping:
            time.sleep(min(left, 0.5))

    def stop(self) -> None:
        """Asks to stop."""
        self.is_stopping = True


def duration(seconds: float) -> str:
    """For people: '40 s', '12 min', '3.5 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
