"""Which checkpoints are kept, and how many there will be at once: arithmetic, no files."""

import dataclasses
from collections.abc import Collection, Mapping


@dataclasses.dataclass(frozen=True)
class Retention:
    """What is kept: whatever one of the rules keeps.

    Attributes:
      keep: how many of the newest; None keeps all.
      keep_period: also every checkpoint whose step is a multiple of it; None for none.
      keep_best: also so many of the best.
      best_mode: 'max' where the larger metric is the better one, or 'min'.
    """

    keep: int | None
    keep_period: int | None = None
    keep_best: int = 0
    best_mode: str = "max"

    def superseded(self, saved: Mapping[int, float | None]) -> list[int]:
        """Steps that no rule keeps, ascending.

        Args:
          saved: metric of each checkpoint by its step; None where it was not evaluated. Of equal
            metrics the later step is the better one.
        """
        if self.keep is None:
            return []
        sign = -1.0 if self.best_mode == "min" else 1.0
        ranked = sorted(((sign * m, s) for s, m in saved.items() if m is not None), reverse=True)
        kept = set(sorted(saved)[-self.keep :])
        kept |= {step for step in saved if self._is_periodic(step)}
        kept |= {step for _, step in ranked[: self.keep_best]}
        return sorted(saved.keys() - kept)

    def peak(self, present: Collection[int], due: Collection[int]) -> int:
        """How many checkpoints there may be at once, the one that is being written included.

        Args:
          present: steps of the checkpoints that are there.
          due: steps that will be saved.
        """
        steps = sorted({*present, *due})
        if self.keep is None or not due:
            return len(steps)
        newest = self.keep + 1
        rules = newest + self.keep_best + sum(map(self._is_periodic, steps[:-newest]))
        # What is there too many is removed after the first save only.
        return max(min(len(steps), rules), len(present) + 1)

    def _is_periodic(self, step: int) -> bool:
        return self.keep_period is not None and step % self.keep_period == 0
