"""Records how a run's wall time is spent, in `MODEL_DIR/goodput.jsonl`; `wall_time` sums it up."""

import contextlib
import time
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from clipa_t5x import errors, run_summary, wall_time

# Since when nothing has accounted for this process's time; see `count_from`.
_since: float | None = None


def count_from(moment: float | None = None) -> None:
    """Says since when the next recorder's start has been going on: doors know, training does not.

    Args:
      moment: Unix time, of the process's start for instance; now where None.
    """
    global _since
    _since = time.time() if moment is None else moment


class Recorder:
    """A stopwatch with one hand for each of `wall_time.CATEGORIES`; one hand moves at a time.

    Time outside any phase is 'init' up to the phase 'step', and 'other' after it. Saving in the
    background takes nothing from 'checkpoint': only the time that the loop stands still counts.
    Process 0 writes; the others may call everything all the same.
    """

    def __init__(self, model_dir: str):
        """Starts to count, from the moment last given to `count_from` where there was one."""
        global _since
        now = time.time()
        began, _since = min(_since or now, now), None
        self._path = epath.Path(model_dir) / wall_time.FILE
        self._start = round(began, 3)
        self._seconds = {"init": now - began}
        self._phases = ["init"]
        self._turned = time.perf_counter()
        self._resumes = self._resumed_from = self._step = 0
        self._stalled = 0.0
        self._unwaited = 0.0  # Time of steps since the last line: waiting for data was within it.
        self._closed = False

    def _turn(self) -> None:
        """Brings the hand that moves up to now."""
        now = time.perf_counter()
        name, passed = self._phases[-1], now - self._turned
        self._seconds[name] = self._seconds.get(name, 0.0) + passed
        if name == "step":
            self._unwaited += passed
        self._turned = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time within for a category; a phase within a phase takes its time from it.

        Args:
          name: one of `wall_time.CATEGORIES`.
        """
        self._turn()
        self._phases.append(name)
        try:
            yield
        finally:
            self._turn()
            self._phases.pop()
            if name == "step":
                self._phases[0] = "other"

    def resume(self, step: int) -> None:
        """Call with the state after `step` updates at hand, restored, rewound to or new (0).

        What this start or earlier ones spent on later steps is lost from here on.
        """
        self._turn()
        self._resumes += 1
        self._resumed_from = self._step = step
        self._unwaited = 0.0
        self._write()

    def log(self, step: int, stalled_seconds: float) -> None:
        """Writes a line; call it every log period and after the last step of a start.

        Args:
          step: updates done.
          stalled_seconds: the running total of `metrics.StepClock`; a new clock may begin anew.
        """
        self._turn()
        waited = stalled_seconds - (self._stalled if stalled_seconds >= self._stalled else 0.0)
        waited = min(waited, self._unwaited)
        self._seconds["step"] = self._seconds.get("step", 0.0) - waited
        self._seconds["data_wait"] = self._seconds.get("data_wait", 0.0) + waited
        self._step, self._stalled, self._unwaited = step, stalled_seconds, 0.0
        self._write()

    def close(self) -> None:
        """Writes the last line; does nothing when called again. A killed run never comes here.

        A start that ends before its first `resume` (refused, or with nothing to do) leaves nothing.
        """
        if self._resumes and not self._closed:
            self._closed = True
            self._turn()
            self._write()

    def _write(self) -> None:
        if jax.process_index() != 0:
            return
        line = wall_time.Line(
            start=self._start,
            time=round(time.time(), 3),
            resumes=self._resumes,
            resumed_from=self._resumed_from,
            step=self._step,
            seconds=self._seconds,
            ended=self._closed,
        )
        try:
            with self._path.open("a") as file:
                file.write(line.to_json() + "\n")
        except (
            errors.storage_errors()
        ) as error:  # The next line tells all that this one would have.
            logging.warning("Cannot write %s (%s): the run goes on.", self._path, error)

    def log_summary(self) -> None:
        """Logs one line about all starts of the run so far; nothing where this leaves none."""
        if jax.process_index() != 0 or not self._resumes:
            return
        try:
            lines = wall_time.parse(self._path.read_bytes().decode(errors="replace"))
        except errors.storage_errors() as error:
            logging.warning("Cannot read %s (%s).", self._path, error)
        else:
            logging.info("%s", run_summary.format_goodput(wall_time.summarize(lines)))
