"""How a run's wall time was spent, over all its starts: what `goodput.jsonl` holds, summed up.

A *start* is one process's work on a run; a run that is killed and resumed has several. Every line
tells the seconds of its start so far, in categories, and the step reached, so that a line lost or
written twice changes nothing:

    {"start": 1.7e9, "time": 1.7e9, "resumes": 1, "from": 40, "step": 50,
     "seconds": {"init": 9.1, "step": 3.0, ...}}

`start` (when it began; also its name) and `time` (when the line was written) are Unix times. `from`
is the step that the start went on from: its checkpoint's, or that of its latest rewind; `resumes`
counts both. `"ended": true` marks the last line of a start that was not killed.

Standard library only, as `run_history` is.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FILE = "goodput.jsonl"

# Of running starts. 'lost' is worked out here; recorders know the others.
CATEGORIES: tuple[str, ...] = (
    "step",
    "data_wait",
    "evaluation",
    "checkpoint",
    "compile",
    "init",
    "lost",
    "other",
)
DOWN = "down"

# What is lost when the steps it was spent on are done again. Evaluations and saves of such steps
# stay where they are: they are no progress either way.
_OF_STEPS = ("step", "data_wait")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of `goodput.jsonl`, see the module's text."""

    start: float
    time: float
    resumes: int
    resumed_from: int
    step: int
    seconds: Mapping[str, float]
    ended: bool = False

    def to_json(self) -> str:
        """The line as it is written, without its newline."""
        record = {
            "start": self.start,
            "time": self.time,
            "resumes": self.resumes,
            "from": self.resumed_from,
            "step": self.step,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }
        return json.dumps(record | ({"ended": True} if self.ended else {}))


@dataclasses.dataclass(frozen=True)
class Summary:
    """Where the time went.

    Attributes:
      seconds: of every one of `CATEGORIES`, and of `DOWN`, the time between starts. Together they
        are the time from the run's beginning to its last line.
      restarts: starts after the first.
      rewinds: how often a start went back to an earlier step by itself.
    """

    seconds: Mapping[str, float]
    restarts: int = 0
    rewinds: int = 0

    @property
    def running(self) -> float:
        """Seconds without those between starts."""
        return sum(value for name, value in self.seconds.items() if name != DOWN)

    @property
    def goodput(self) -> float:
        """The share of the running time that went into steps which were kept, in 0..1."""
        return self.seconds["step"] / self.running if self.running else 0.0


def title(category: str) -> str:
    """How a category is named to readers: 'data wait' for 'data_wait'."""
    return category.replace("_", " ")


def total(summaries: Sequence[Summary]) -> Summary:
    """Sums up stages that followed each other; the time between two stages is in neither."""
    seconds = {
        name: sum(each.seconds[name] for each in summaries) for name in (*CATEGORIES, DOWN)
    }  # fmt: skip
    restarts = sum(each.restarts for each in summaries)
    return Summary(seconds, restarts, sum(each.rewinds for each in summaries))


def parse(text: str) -> list[Line]:
    """The lines of a `goodput.jsonl`; what a killed run or a full disk tore is left out."""
    found = (_parse_line(line) for line in text.splitlines())
    return [line for line in found if line is not None]


def _parse_line(text: str) -> Line | None:
    # The line after a torn one was appended to it: the whole record at the end is good.
    start = text.find("{")
    while start >= 0:
        try:
            return _line(json.loads(text[start:]))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            start = text.find("{", start + 1)
    return None


def _line(record: dict[str, Any]) -> Line:
    seconds = {str(name): float(value) for name, value in record["seconds"].items()}
    start, time = float(record["start"]), float(record["time"])
    if not all(math.isfinite(value) for value in (start, time, *seconds.values())):
        raise ValueError("a time that is no number")
    resumes, resumed_from, step = (int(record[name]) for name in ("resumes", "from", "step"))
    return Line(start, time, resumes, resumed_from, step, seconds, record.get("ended") is True)


def summarize(lines: Iterable[Line]) -> Summary:
    """Sums up all starts of a run.

    Where a start goes on from step R, the time that earlier ones spent on steps after R is lost;
    of a stretch of steps that contains R, by the share of its steps that come after R. A start that
    was killed wrote nothing about the steps since its last line: it is charged with a stretch as
    long as its last one, as lost, at most with the time until the next start. The rest of that time
    is down. Of a killed start with no start after it, nothing is known beyond its last line.

    Args:
      lines: as `parse` returns them, in the file's order.

    Returns:
      The summary; all zeros where there are no lines.
    """
    account = _Account()
    for line in lines:
        account.add(line)
    return account.summary()


@dataclasses.dataclass
class _Stretch:
    """Steps after `first` up to `last`, still counted as progress, and the seconds they took."""

    first: int
    last: int
    seconds: dict[str, float]

    def cut(self, step: int) -> float:
        """Leaves what lies up to `step`; returns the seconds that go."""
        if step >= self.last:
            return 0.0
        kept = max(step - self.first, 0) / (self.last - self.first)
        before = sum(self.seconds.values())
        self.seconds = {name: kept * value for name, value in self.seconds.items()}
        self.last = max(step, self.first)
        return before - sum(self.seconds.values())


class _Account:
    """Reads lines in order and keeps what they come to."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys((*CATEGORIES, DOWN), 0.0)
        self._stretches: list[_Stretch] = []
        self._starts: dict[float, Line] = {}  # The last line of each.
        self._latest: Line | None = None
        self._rewinds = 0

    def add(self, line: Line) -> None:
        before = self._starts.get(line.start)
        if before is None:
            self._add_gap(line.start)
            before = Line(line.start, line.start, 0, 0, 0, self._overlap(line))
        if sum(line.seconds.values()) < sum(before.seconds.values()):
            return  # Lines of a start only grow: this one came too late.
        spent = {
            name: value - before.seconds.get(name, 0.0) for name, value in line.seconds.items()
        }
        self._starts[line.start] = self._latest = line
        of_steps = {name: spent.pop(name, 0.0) for name in _OF_STEPS}
        for name, value in spent.items():
            self._seconds[name if name in CATEGORIES else "other"] += value
        first = before.step
        if line.resumes > before.resumes:
            self._rewinds += line.resumes - max(before.resumes, 1)
            self._go_back(line.resumed_from)
            first = line.resumed_from
        if line.step > first:
            self._stretches.append(_Stretch(first, line.step, of_steps))
        elif line.ended and line.resumes == before.resumes:  # After the last step, in good order.
            self._seconds["other"] += sum(of_steps.values())
        else:  # Steps that were not told of before a rewind or a failure.
            self._seconds["lost"] += sum(of_steps.values())

    def _overlap(self, line: Line) -> dict[str, float]:
        """What a start spent while the one before it was still ending: counted once."""
        overlap = self._latest.time - line.start if self._latest else 0.0
        return {"init": min(max(overlap, 0.0), line.seconds.get("init", 0.0))}

    def _add_gap(self, start: float) -> None:
        """Accounts for the time between the latest line and another start."""
        latest = self._latest
        if latest is None:
            return
        gap, unknown = max(start - latest.time, 0.0), 0.0
        if not latest.ended and latest.step > latest.resumed_from:
            unknown = min(gap, sum(self._stretches[-1].seconds.values()))
        self._seconds["lost"] += unknown
        self._seconds[DOWN] += gap - unknown

    def _go_back(self, step: int) -> None:
        for stretch in reversed(self._stretches):
            self._seconds["lost"] += stretch.cut(step)
        self._stretches = [stretch for stretch in self._stretches if stretch.last > stretch.first]

    def summary(self) -> Summary:
        seconds = dict(self._seconds)
        for stretch in self._stretches:
            for name, value in stretch.seconds.items():
                seconds[name] += value
        return Summary(seconds, max(len(self._starts) - 1, 0), self._rewinds)
