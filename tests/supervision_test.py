import json
import os
import signal
import time

import pytest

from clipa_t5x import supervision, watchdog
from clipa_t5x.errors import UserError


def supervised(model_dir):
    return supervision.supervised(str(model_dir), watchdog.Watchdog())


def test_a_request_to_stop_ends_an_evaluation_between_batches(tmp_path):
    with supervised(tmp_path) as supervisor:
        supervisor.before_batch()
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 10
        while not supervisor.stop.requested() and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(supervision.StopRequestedError):
            supervisor.before_batch()


def test_one_run_at_a_time(tmp_path):
    with supervised(tmp_path) as supervisor:
        with pytest.raises(UserError, match="is in use by another run"), supervised(tmp_path):
            pass
        supervisor.check_lease()
    with supervised(tmp_path) as supervisor:
        supervisor.check_lease()


def test_time_is_recorded_to_the_end_whatever_ends_it(tmp_path):
    with pytest.raises(KeyError), supervised(tmp_path) as supervisor:
        supervisor.recorder.resume(3)
        raise KeyError
    last = (tmp_path / "goodput.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["ended"] is True
