"""What is wrong with records: reasons, counts, a bounded log, and the share that is too much."""

import collections
import threading
from collections.abc import Mapping
from typing import NoReturn

from absl import logging

from clipa_t5x.errors import UserError

# Of each reason so many records are named in the log; the counts go on.
_NAMED_PER_REASON = 10
# A share means little among fewer records.
_LEAST_RECORDS = 256


class BadRecord(Exception):  # noqa: N818  no error of the program
    """A record that cannot be trained on.

    Attributes:
      reason: a few words that many records share, such as 'truncated image'.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class BadRecords:
    """Counts of one process's records by what was wrong with them; safe among threads.

    A *bad* record is replaced by another; a *mended* one is used, but not as it was written.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bad: collections.Counter[str] = collections.Counter()
        self._mended: collections.Counter[str] = collections.Counter()
        self._seen = 0
        self._named: dict[str, str] = {}

    def saw(self, count: int) -> None:
        """Counts records that were read, good or bad."""
        with self._lock:
            self._seen += count

    def add(self, error: BadRecord, where: str) -> None:
        """Counts a bad record and names the first few of each reason in the log.

        Args:
          error: what is wrong.
          where: shard and key.
        """
        line = f"Bad record {where} ({error})"
        with self._lock:
            self._bad[error.reason] += 1
            named = sum(1 for reason in self._named.values() if reason == error.reason)
            if line in self._named or named >= _NAMED_PER_REASON:
                return
            self._named[line] = error.reason
        last = "; further ones are only counted" if named + 1 == _NAMED_PER_REASON else ""
        logging.warning("%s%s.", line, last)

    def mend(self, reason: str) -> None:
        """Counts a record that is used after a change."""
        with self._lock:
            self._mended[reason] += 1

    @property
    def num_bad(self) -> int:
        """Bad records so far."""
        with self._lock:
            return sum(self._bad.values())

    def counts(self) -> dict[str, int]:
        """Counts by 'bad/<reason>' and 'mended/<reason>'."""
        with self._lock:
            return {
                **{f"bad/{reason}": n for reason, n in sorted(self._bad.items())},
                **{f"mended/{reason}": n for reason, n in sorted(self._mended.items())},
            }

    def check(self, max_fraction: float) -> None:
        """Stops a run whose data are mostly not what they should be.

        Raises:
          UserError: the share of bad records is above `max_fraction`; names the reasons.
        """
        with self._lock:
            seen, bad = self._seen, dict(self._bad.most_common())
        total = sum(bad.values())
        if seen < _LEAST_RECORDS or total <= max_fraction * seen:
            return
        raise UserError(
            f"{total} of {seen} records are bad ({total / seen:.1%}; {_spell(bad)}), more than "
            f"MAX_BAD_FRACTION {max_fraction:.1%}: mend the data (the log names the first of each "
            "kind), or raise --gin.MAX_BAD_FRACTION."
        )

    def give_up(self, attempts: int) -> NoReturn:
        """Stops where no good record was found in so many attempts.

        Raises:
          UserError: always; names the reasons.
        """
        with self._lock:
            seen, bad = self._seen, dict(self._bad.most_common())
        raise UserError(
            f"{attempts} records that were drawn one after the other are all bad, and "
            f"{sum(bad.values())} of {seen} that were read ({_spell(bad)}): mend the data (the log "
            "names the first of each kind)."
        )


def _spell(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in counts.items())
