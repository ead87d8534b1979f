"""What kills cost a run: `python benchmarks/survival.py [--kills=100 ...]`.

Trains the quickstart's model for some steps, again and again, kills it at random moments (by
SIGKILL: while it starts, in a step, a save, an evaluation, while a stage takes over), starts it
again, and compares its last checkpoints with those of a run that nobody disturbed. Likewise with
one of two processes, with saves only, and with checkpoints whose files are damaged.
"""

import argparse
import collections
import concurrent.futures
import itertools
import pathlib
import random
import shutil
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import experiments
import numpy as np
from chaos import damage, killing

from clipa_t5x import checkpoint_folders
from clipa_t5x.data import build

STEPS, PERIOD = 60, 10
RUN_KILLS = 10  # Then a run comes to its end, and another begins.


class Case:
    """Runs of one command in folders of their own, and what an undisturbed one comes to."""

    def __init__(
        self,
        workspace: pathlib.Path,
        name: str,
        max_unsaved_steps: int | None,
        num_processes: int = 1,
        stages: int = 2,
    ):
        """Trains undisturbed."""
        self._workspace, self._name, self._num_processes = workspace, name, num_processes
        self._max_unsaved_steps = max_unsaved_steps
        self._stages, self._numbers = stages, itertools.count()
        whole = self.make()
        start = time.perf_counter()
        whole.finish()
        print(f"{name}: undisturbed in {time.perf_counter() - start:.0f} s", flush=True)
        self._end = self._ends(whole)

    def make(self) -> killing.Run:
        """A run in a new folder."""
        model_dir = self._workspace / f"{self._name} {next(self._numbers)}"
        gin = str(experiments.GIN)
        stages = [f"{gin}/shapes_stage{i + 1}.gin" for i in range(self._stages)]
        bindings = [
            f"MODEL_DIR = {str(model_dir)!r}", f"STAGES = {stages!r}", f"TRAIN_STEPS = {STEPS}",
            f"CHECKPOINT_PERIOD = {PERIOD}", f"EVAL_PERIOD = {STEPS // 2}", "LOG_PERIOD = 1",
            "WARMUP_STEPS = 5", "EVAL_EXAMPLES = 256",
            f"MAX_UNSAVED_STEPS = {self._max_unsaved_steps}",
        ]  # fmt: skip
        command = experiments.command(
            "schedule",
            f"--gin_file={gin}/shapes.gin",
            "--peer_timeout_seconds=30",
            "--join_timeout_seconds=60",
            *(f"--gin_bindings={binding}" for binding in bindings),
        )
        return killing.Run(command, model_dir, str(self._workspace), self._num_processes)

    def _ends(self, run: killing.Run) -> list[dict[str, np.ndarray]]:
        stages = [run.model_dir / f"stage{i + 1}" for i in range(self._stages)]
        return [experiments.saved_state(str(stage), STEPS) for stage in stages]

    def differs(self, run: killing.Run) -> bool:
        """Whether any array of any stage's last checkpoint is not that of the undisturbed run."""
        pairs = zip(self._ends(run), self._end, strict=True)
        return any(
            a.keys() != b.keys() or any(not np.array_equal(a[name], b[name]) for name in a)
            for a, b in pairs
        )

    def survive(self, moments: tuple[str, ...], kills: int, seed: int, lanes: int = 1) -> None:
        """Kills that many times, over as many runs as it takes, and prints what came of it.

        `lanes` runs go on beside each other.
        """
        seen: list[killing.Kill] = []
        ends: list[bool] = []
        begun = time.perf_counter()

        def lane(number: int) -> None:
            rng = random.Random(1000 * seed + number)
            share = kills // lanes + (number < kills % lanes)
            while share:
                run = self.make()
                found = run.survive(moments, min(share, RUN_KILLS), rng)
                share -= len(found)
                seen.extend(found)
                ends.append(self.differs(run))
                shutil.rmtree(run.model_dir)
                eta = (time.perf_counter() - begun) * (kills / max(len(seen), 1) - 1)
                print(f"{len(seen)}/{kills} kills, ETA {eta / 60:.0f} min", file=sys.stderr)

        with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
            list(pool.map(lane, range(lanes)))
        runs, different = len(ends), sum(ends)
        redone = [kill.redone for kill in seen if kill.redone is not None]
        moments_seen = dict(collections.Counter(kill.moment for kill in seen))
        print(f"{self._name}, {len(seen)} kills {moments_seen} in {runs} runs of {self._stages} x "
              f"{STEPS} steps: {different} of {runs} ends differ")  # fmt: skip
        print(f"  steps done again after a kill: median {statistics.median(redone)}, at most "
              f"{max(redone)}; a checkpoint every {PERIOD}, MAX_UNSAVED_STEPS = "
              f"{self._max_unsaved_steps}; more than a period: "
              f"{sum(n > PERIOD for n in redone)}", flush=True)  # fmt: skip
        if self._num_processes > 1:
            statuses = collections.Counter(s for kill in seen for s in kill.statuses if s != -9)
            print(f"  survivors' statuses {dict(statuses)}, at most "
                  f"{max(kill.seconds for kill in seen):.1f} s after the kill")  # fmt: skip


def damaged(workspace: pathlib.Path, trials: int, rng: random.Random) -> None:
    """Damages the newest checkpoint of a real run and looks which one would be used."""
    [*_, run] = sorted(workspace.glob("*/stage1"))
    steps = checkpoint_folders.complete_steps(str(run))
    newest, before = steps[-1], steps[-2]
    outcomes: collections.Counter[str] = collections.Counter()
    for _ in range(trials):
        copy = workspace / "damaged"
        shutil.copytree(run / f"checkpoint_{newest}", copy / f"checkpoint_{newest}")
        shutil.copytree(run / f"checkpoint_{before}", copy / f"checkpoint_{before}")
        damage.damage(copy / f"checkpoint_{newest}", rng, (damage.flip_a_bit, damage.truncate))
        step, damages = checkpoint_folders.newest_whole(str(copy), [before, newest])
        found = list(damages) == [newest]
        outcomes["found, the one before used" if found and step == before else "missed"] += 1
        shutil.rmtree(copy)
    print(f"damage: {trials} bits flipped and files cut: {dict(outcomes)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of one process, at any moment")
    parser.add_argument("--process_kills", type=int, default=20, help="of one of two processes")
    parser.add_argument("--save_kills", type=int, default=50, help="within saves")
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=2, help="runs of one process at a time")
    parser.add_argument("--max_unsaved_steps", type=int, help="have training wait for saves")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = pathlib.Path(folder)
        build.main(["shapes", f"--output_dir={workspace}/data/shapes"])
        one = Case(workspace, "one process", args.max_unsaved_steps)
        if args.damages:
            damaged(workspace, args.damages, random.Random(args.seed))
        if args.save_kills:
            one.survive(("save",), args.save_kills, args.seed, args.lanes)
        if args.kills:
            one.survive(tuple(killing.MOMENTS), args.kills, args.seed + 1, args.lanes)
        if args.process_kills:
            two = Case(workspace, "two processes", args.max_unsaved_steps, 2, stages=1)
            moments = ("start", "step", "save", "evaluation")
            two.survive(moments, args.process_kills, args.seed + 2)


if __name__ == "__main__":
    main()
