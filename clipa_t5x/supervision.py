"""What watches over a run while it trains: who may stop it, and who tells when it hangs."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from clipa_t5x import goodput, lease, preemption, watchdog


class StopRequestedError(Exception):
    """The run is asked to stop while something is done that need not be finished."""


@dataclasses.dataclass(frozen=True)
class Supervisor:
    """The watches of one run, as the loop needs them.

    Attributes:
      stop: asks whether the run is to stop.
      watchdog: hears of everything that gets done.
      check_lease: to be called before a save; raises where the run no longer holds its MODEL_DIR.
      recorder: of where the wall time goes.
    """

    stop: preemption.StopRequest
    watchdog: watchdog.Watch
    check_lease: Callable[[], None]
    recorder: goodput.Recorder

    def before_batch(self) -> None:
        """To be called before every batch of an evaluation, in the same order by all processes.

        Raises:
          StopRequestedError: the evaluation is to be left as it is.
        """
        self.watchdog.beat("a batch of an evaluation")
        if self.stop.requested():
            raise StopRequestedError


@contextlib.contextmanager
def supervised(model_dir: str, watchdog_cfg: watchdog.Watchdog) -> Iterator[Supervisor]:
    """Watches over a run in `model_dir` within.

    Raises:
      UserError: another live run uses `model_dir`.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(preemption.stop_requests())
        watch = stack.enter_context(watchdog_cfg.watching(model_dir))
        check_lease = stack.enter_context(lease.held(model_dir))
        recorder = goodput.Recorder(model_dir)
        stack.callback(recorder.log_summary)
        stack.callback(recorder.close)
        yield Supervisor(stop, watch, check_lease, recorder)
