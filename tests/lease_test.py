"""One live run for a folder, with real processes: killed, suspended, and starting all at once."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import experiments
import pytest

from clipa_t5x import lease
from clipa_t5x.errors import UserError

# Takes a lease, says so, and checks it whenever a line comes in.
HOLD = """
import sys
from clipa_t5x import lease
folder, host, period, timeout = sys.argv[1:]
with lease.held(folder, host=host or None, period=float(period), timeout=float(timeout)) as check:
    print("held", flush=True)
    for line in sys.stdin:
        check()
        print("mine", flush=True)
"""


class Run:
    """Another process that holds, or asks for, the lease of a folder."""

    def __init__(self, folder, host="", period=0.1, timeout=60.0):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), host, str(period), str(timeout)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=experiments.REPOSITORY,
        )  # fmt: skip

    def says(self):
        return self.process.stdout.readline().strip()

    def check(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.says()

    def send(self, number):
        self.process.send_signal(number)

    def end(self):
        """Closes its input, and returns (status, stderr)."""
        error = self.process.communicate(timeout=60)[1]
        return self.process.returncode, error


@pytest.fixture
def start(request):
    def make(*args, **kwargs):
        run = Run(*args, **kwargs)
        request.addfinalizer(run.process.communicate)
        request.addfinalizer(run.process.kill)
        return run

    return make


def leases(folder):
    return sorted(path.name for path in (pathlib.Path(folder) / lease.FOLDER).iterdir())


def test_a_folder_is_held_once_and_free_again(tmp_path):
    with lease.held(str(tmp_path)) as check:
        check()
        before = time.monotonic()
        assert f"in use by another run: process {os.getpid()} on " in refused(tmp_path)
        assert time.monotonic() - before < 20  # A minute if it had to be watched.
        check()
        assert len(leases(tmp_path)) == 1
    assert leases(tmp_path) == []
    with lease.held(str(tmp_path)):
        pass


def test_the_body_that_fails_gives_it_back(tmp_path):
    with pytest.raises(KeyError), lease.held(str(tmp_path)):
        raise KeyError
    assert leases(tmp_path) == []


def refused(folder, **kwargs):
    with pytest.raises(UserError) as caught, lease.held(str(folder), **kwargs):
        pass
    return str(caught.value)


def test_a_run_of_this_machine_hinders_while_its_process_is_there(tmp_path, start):
    run = start(tmp_path, period=1e3)
    assert run.says() == "held"
    assert f"in use by another run: process {run.process.pid} on " in refused(tmp_path)
    (tmp_path / lease.FOLDER / leases(tmp_path)[0]).write_text("")  # A disk that was full.
    assert f"process {run.process.pid} on " in refused(tmp_path)
    assert run.check() == "mine"
    run.send(signal.SIGSTOP)  # Suspended is alive.
    assert f"process {run.process.pid} on " in refused(tmp_path)
    run.send(signal.SIGKILL)
    run.process.wait()
    assert len(leases(tmp_path)) == 1
    before = time.monotonic()
    with lease.held(str(tmp_path)):
        assert time.monotonic() - before < 20
        assert len(leases(tmp_path)) == 1
    assert leases(tmp_path) == []


def test_a_run_elsewhere_hinders_while_its_heart_beats(tmp_path, start):
    """When it has been silent for too long it is replaced, and stops when it wakes."""
    run = start(tmp_path, host="elsewhere")
    assert run.says() == "held"
    who = f"process {run.process.pid} on elsewhere, running for"
    assert who in refused(tmp_path, period=0.1)
    assert run.check() == "mine"
    run.send(signal.SIGSTOP)
    before = time.monotonic()
    with lease.held(str(tmp_path), period=0.1, timeout=1.0) as check:
        assert 1 <= time.monotonic() - before < 20
        run.send(signal.SIGCONT)
        time.sleep(0.3)
        check()
        assert run.check() == ""
        status, error = run.end()
        assert status != 0 and "was taken over by another run" in error
        check()
        assert len(leases(tmp_path)) == 1


def test_who_wakes_while_it_writes_its_heartbeat_is_not_the_holder(tmp_path):
    """The write that was under way brings back a lease that another run had removed."""
    old = lease.Claim(str(tmp_path), lease.Holder.this_process("old"), 60.0, 1e3)
    old.acquire()
    with lease.held(str(tmp_path), period=0.1, timeout=0.5) as check:
        old._write()
        check()
        with pytest.raises(UserError, match="taken over"):
            old.check()
        old.release()
        check()


def test_a_lease_that_is_gone_is_not_written_again(tmp_path):
    with lease.held(str(tmp_path), period=0.05) as check:
        (path,) = (tmp_path / lease.FOLDER).iterdir()
        assert lease._says_held(lease._read(path))
        path.unlink()
        time.sleep(0.2)
        assert leases(tmp_path) == []
        with pytest.raises(UserError, match="taken over"):
            check()


def test_heartbeats_that_cannot_be_written_are_not_fatal(tmp_path):
    with lease.held(str(tmp_path), period=0.05) as check:
        (path,) = (tmp_path / lease.FOLDER).iterdir()
        # What lies there is swapped at once: a lease that is gone is not written again.
        (tmp_path / "aside").symlink_to(tmp_path)
        (tmp_path / "aside").rename(path)  # Exists, and cannot be written.
        time.sleep(0.2)
        check()
        (tmp_path / "aside").write_text("")
        (tmp_path / "aside").rename(path)
        time.sleep(0.2)
        assert lease._says_held(lease._read(path))


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / lease.FOLDER).write_text("a file")
    with pytest.raises(UserError, match="cannot be written"), lease.held(str(tmp_path)):
        pass


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / lease.FOLDER).mkdir()
    (tmp_path / lease.FOLDER / "notes.json").write_text("{}")
    with lease.held(str(tmp_path)) as check:
        check()
    assert leases(tmp_path) == ["notes.json"]


@pytest.mark.parametrize("hosts", [(None, None, None), ("a", "b", "c"), ("a", None, None)])
def test_of_those_that_start_at_once_one_wins(tmp_path, hosts):
    """Many times; the winner still holds when the last of the others has given up."""
    for trial in range(15):
        folder = str(tmp_path / str(trial))
        barrier, given_up = threading.Barrier(len(hosts)), threading.Semaphore(0)
        winners, refused = [], []

        def ask(host, folder=folder, barrier=barrier, given_up=given_up,
                winners=winners, refused=refused):  # fmt: skip
            barrier.wait()
            try:
                with lease.held(folder, period=0.02, timeout=30.0, host=host) as check:
                    winners.append(host)
                    for _ in hosts[1:]:
                        assert given_up.acquire(timeout=20)
                    check()
            except UserError:
                refused.append(host)
                given_up.release()

        threads = [threading.Thread(target=ask, args=(host,)) for host in hosts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(winners), len(refused)) == (1, len(hosts) - 1), trial
        assert leases(folder) == []


# Forks processes that ask at the same instant, many times; an interpreter each would take seconds.
CONTEND = """
import os, sys, warnings
import jax
from clipa_t5x import errors, lease
warnings.simplefilter("ignore")
jax.process_index()

def ask(folder, host, begin, end):
    os.read(begin, 1)
    try:
        with lease.held(folder, host=host or None, period=0.05) as check:
            os.read(end, 1)
            check()
            return 0
    except errors.UserError:
        return 2

for trial in range(int(sys.argv[2])):
    hosts = [("", ""), ("a", "b"), ("", "a", "")][trial % 3]
    (begin, go), (end, stop) = os.pipe(), os.pipe()
    children = []
    for host in hosts:
        children.append(os.fork())
        if children[-1] == 0:
            os._exit(ask(f"{sys.argv[1]}/{trial}", host, begin, end))
    os.write(go, b"x" * len(hosts))
    ended = [os.wait()[1] for _ in hosts[1:]]
    os.write(stop, b"x" * len(hosts))
    ended.append(os.wait()[1])
    print([os.waitstatus_to_exitcode(status) for status in ended], flush=True)
"""


def test_of_processes_that_start_at_once_one_wins(tmp_path):
    """The others have given up while the winner held; there is always a winner."""
    trials = 30
    result = subprocess.run(
        [sys.executable, "-c", CONTEND, str(tmp_path), str(trials)],
        capture_output=True, text=True, timeout=120, check=False, cwd=experiments.REPOSITORY,
        env=experiments.environment(1),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    outcomes = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(outcomes) == trials
    assert all(outcome == [2] * (len(outcome) - 1) + [0] for outcome in outcomes), outcomes
    assert all(leases(path) == [] for path in tmp_path.iterdir())
