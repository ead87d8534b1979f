import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_tars

from clipa_t5x.data import conversion_workers, shard_conversion, webdataset
from clipa_t5x.errors import UserError


@pytest.fixture
def tasks(tmp_path):
    """Four shards of a tar of 20 records."""
    tiny_tars.write_shards(tmp_path / "tars", num_shards=1, num_records=20)
    path = str(tmp_path / "tars" / "00000.tar")
    rows = webdataset.WebDataset().scan(path).rows
    options = shard_conversion.Options(output_format="tfrecord")
    return {
        number: shard_conversion.ShardTask(
            str(tmp_path / f"{number:05d}.tfrecord"),
            5 * number,
            [shard_conversion.Part(path, 5 * number, rows[5 * number : 5 * number + 5])],
            webdataset.WebDataset(),
            options,
        )
        for number in range(4)
    }


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_task_ends_and_every_record_is_counted(tasks, num_workers):
    counted = []
    found = dict(conversion_workers.run(tasks, num_workers, counted.append))
    assert sorted(found) == [0, 1, 2, 3]
    assert [found[number]["records"] for number in range(4)] == [5] * 4
    assert sum(counted) == 20


def test_no_task_is_no_work():
    assert not list(conversion_workers.run({}, 1, int))


def test_a_worker_that_is_killed_is_one_line(tasks, monkeypatch):
    monkeypatch.setattr(conversion_workers, "_write", _die)
    with pytest.raises(UserError, match="want of memory.*--num_workers=1"):
        list(conversion_workers.run(tasks, 1, int))


def _die(task):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_mistake_of_one_worker_stops_the_others(tasks, tmp_path):
    os.remove(tasks[0].parts[0].path)
    with pytest.raises(FileNotFoundError):
        list(conversion_workers.run(tasks, 2, int))
    assert not list(tmp_path.glob("*.tfrecord*"))


def test_workers_end_with_the_process_that_started_them():
    code = (
        "import multiprocessing as m, time; from clipa_t5x.data import conversion_workers as c;"
        "x = m.get_context('spawn');"
        "from concurrent import futures as f;"
        "e = f.ProcessPoolExecutor(1, x, c._start, (x.Value('q', 0), x.Event()));"
        "import os; print(e.submit(os.getpid).result(), flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        with open(f"/proc/{worker}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                return
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{worker}")
