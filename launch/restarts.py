"""What an ended start of a job means, and when the next one begins; the same for every launcher."""

import dataclasses
from collections.abc import Sequence

from clipa_t5x.preemption import RESTART_STATUS
from launch.job import RestartPolicy

# Shells and containers tell of a signal by 128 + its number, Python by a negative number. SIGHUP,
# SIGINT and SIGTERM come of people and platforms, SIGABRT of a process whose peer is frozen,
# SIGKILL of a machine that is taken away or out of memory.
_SIGNALS = (1, 2, 6, 9, 15)
RESTART_STATUSES = {RESTART_STATUS, *(128 + n for n in _SIGNALS), *(-n for n in _SIGNALS)}


@dataclasses.dataclass(frozen=True)
class Decision:
    """What follows.

    Attributes:
      delay: seconds until the next start; None where there is none.
      failure: why there is none, in one line; '' where the job is done or goes on.
    """

    delay: float | None
    failure: str = ""


class Restarts:
    """Counts a job's restarts and decides on each."""

    def __init__(self, policy: RestartPolicy):
        """Of a job that is begun for the first time."""
        self._policy = policy
        self._short_lives = 0
        self.count = 0

    def after(self, statuses: Sequence[int], lived_seconds: float) -> Decision:
        """What follows the end of a start.

        Args:
          statuses: of all its processes, as `subprocess` or a shell tells them.
          lived_seconds: from its beginning to its end.
        """
        if not any(statuses):
            return Decision(None)
        bad = [status for status in statuses if status and status not in RESTART_STATUSES]
        if bad:
            return Decision(None, f"a process ended with status {bad[0]}, which no restart mends")
        return self.again(lived_seconds, f"status {next(filter(None, statuses))}")

    def again(self, lived_seconds: float, reason: str) -> Decision:
        """A restart for a reason that is none of the job's own, such as a preempted machine.

        Args:
          lived_seconds: from the start's beginning to its end.
          reason: for the failure, where there have been too many.
        """
        if self.count >= self._policy.max_restarts:
            most = f"max_restarts = {self._policy.max_restarts}"
            return Decision(None, f"{reason}, after {self.count} restarts ({most})")
        if lived_seconds >= self._policy.healthy_seconds:
            self._short_lives = 0
        delay = self._policy.delay(self._short_lives)
        self._short_lives += 1
        self.count += 1
        return Decision(delay)
