"""Gives malformed inputs to the project's readers, in processes that may crash or hang.

python benchmarks/malformed_inputs.py --inputs=2000
python benchmarks/malformed_inputs.py --replay=tar:17
"""

import collections
import concurrent.futures
import json
import os
import pathlib
import queue
import select
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

OUTCOMES = ("read", "refused", "crash", "hang", "execution")
BAD = OUTCOMES[2:]
KINDS = (
    *("gin", "npz", "safetensors", "pickle", "tfrecord", "tar", "array_record", "csv", "parquet"),
    *("image", "vocabulary", "word_classes", "class_names", "manifest", "record_index", "run_json"),
    *("foreign", "subtree", "open_clip_folder", "t5x", "clip_benchmark"),
)
WORKER = ("-m", "chaos.fuzz_worker")
_TESTS = pathlib.Path(__file__).resolve().parents[1]
_START_SECONDS = 300
_STDERR_LINES = 15


class Finding(NamedTuple):
    """What became of an input: `kind` and `seed` make it again."""

    kind: str
    seed: int
    outcome: str
    detail: str


class _Worker:
    """A process, started again when it has ended."""

    def __init__(self, root, kinds, timeout_secs):
        self._root, self._kinds, self._timeout = root, kinds, timeout_secs
        self._process = None
        self._starts = 0

    def _start(self):
        self._starts += 1
        root = os.path.join(self._root, str(self._starts))
        self._log = open(f"{root}.log", "w+")  # noqa: SIM115  as long as the process
        path = os.pathsep.join([str(_TESTS.parent), str(_TESTS), os.environ.get("PYTHONPATH", "")])
        environment = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": path,
                       "PYTHONFAULTHANDLER": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, *WORKER, root, ",".join(self._kinds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env={**os.environ, **environment}, cwd=self._root,
        )  # fmt: skip
        self._unread = b""
        if self._answer(_START_SECONDS) is None:
            raise RuntimeError(f"a reader does not start: {self._last_words()}")

    def _answer(self, seconds):
        """The next line from the process; None where it has ended, or none comes in time."""
        descriptor = self._process.stdout.fileno()
        end = time.monotonic() + seconds
        while b"\n" not in self._unread:
            if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            data = os.read(descriptor, 2**16)
            if not data:
                self._process.wait()
                return None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def run(self, kind, seed):
        """What becomes of an input."""
        if self._process is None:
            self._start()
        self._process.stdin.write(json.dumps([kind, seed]).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer(self._timeout)
        if answer is not None:
            return Finding(kind, seed, answer["outcome"], answer["detail"])
        status = self._process.poll()
        outcome = "hang" if status is None else "crash"
        what = f"no answer in {self._timeout} s" if status is None else f"ended by {status}"
        finding = Finding(kind, seed, outcome, f"{what}\n{self._last_words()}")
        self.close()
        return finding

    def _last_words(self):
        self._log.seek(0)
        return "".join(self._log.readlines()[-_STDERR_LINES:])

    def close(self):
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._log.close()
            self._process = None


def run(num_inputs, first_seed=0, kinds=KINDS, num_workers=2, timeout_secs=20, report=None):
    """Reads malformed inputs, as many of each kind.

    Args:
      num_inputs: at least so many, of all kinds together.
      first_seed: inputs are numbered from here, in each kind.
      kinds: of KINDS.
      num_workers: processes.
      timeout_secs: of one input; what takes longer hangs.
      report: called with every Finding, as it comes.

    Returns:
      Findings, by kind and seed.
    """
    each = -(-num_inputs // len(kinds))
    todo = [(kind, first_seed + i) for i in range(each) for kind in kinds]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        idle = queue.SimpleQueue()
        workers = []
        for number in range(num_workers):
            root = os.path.join(folder, str(number))
            os.mkdir(root)
            workers.append(_Worker(root, kinds, timeout_secs))
            idle.put(workers[-1])

        def read(item):
            worker = idle.get()
            try:
                finding = worker.run(*item)
            finally:
                idle.put(worker)
            if report is not None:
                report(finding)
            return finding

        try:
            with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
                findings = list(pool.map(read, todo))
        finally:
            for worker in workers:
                worker.close()
    return sorted(findings)


def table(findings):
    """Kinds by outcomes, counted, as lines of text."""
    counts = collections.Counter((f.kind, f.outcome) for f in findings)
    kinds = sorted({f.kind for f in findings})
    lines = [f"{'kind':<14}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES)]
    for kind in kinds:
        lines.append(f"{kind:<14}" + "".join(f"{counts[kind, o]:>11}" for o in OUTCOMES))
    totals = [sum(counts[kind, outcome] for kind in kinds) for outcome in OUTCOMES]
    lines.append(f"{'all ' + str(len(findings)):<14}" + "".join(f"{n:>11}" for n in totals))
    return "\n".join(lines)


def bad(findings):
    """Those that are neither read nor refused in one line."""
    return [finding for finding in findings if finding.outcome in BAD]
