"""Chip-hours of all the machines that a job has had, as far as they were seen."""


class Meter:
    """Counts chip-seconds; of machines that are given back, the job's next ones carry the sum."""

    def __init__(self):
        """Of a job of which nothing is known yet."""
        self._before: float | None = None
        self._nodes: dict[tuple[str, float], float] = {}

    def carry(self, chip_seconds: float) -> None:
        """Takes what the job's machines carry, of those before them; once, and then counts on."""
        if self._before is None:
            self._before = chip_seconds

    def see(self, name: str, made: float, chips: float, now: float) -> float:
        """Takes note of a node.

        Args:
          name: of it.
          made: when it was, in seconds since 1970; another one of its name is made at another time.
          chips: that it has.
          now: in seconds since 1970.

        Returns:
          Its chip-seconds.
        """
        self._nodes[name, made] = max(now - made, 0.0) * chips
        return self._nodes[name, made]

    def begin(self) -> None:
        """Of machines that are asked for now: what was seen until now is before them."""
        self._before, self._nodes = self.chip_seconds, {}

    @property
    def chip_seconds(self) -> float:
        """Of all that has been seen."""
        return (self._before or 0.0) + sum(self._nodes.values())

    @property
    def chip_hours(self) -> float:
        """Of all that has been seen."""
        return self.chip_seconds / 3600
