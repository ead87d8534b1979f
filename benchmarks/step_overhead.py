"""What the training loop costs outside the jitted step: `python benchmarks/step_overhead.py`.

Runs the same compiled step on the same batch in a bare Python loop and in the real loop (clock,
metrics, log lines, files), segment after segment in turn, and prints the ratio of the medians.
"""

import argparse
import contextlib
import statistics
import tempfile
import time

import jax
import numpy as np

from clipa_t5x import experiment, metrics, stage_info, supervision, train_loop, trainer, watchdog
from clipa_t5x.data import input_pipeline


class SameBatch:
    """An iterator that always has its batch ready: what remains is the loop itself."""

    waited_seconds = 0.0

    def __init__(self, batch):
        self._batch = batch

    def __next__(self):
        return self._batch


def build(batch_size: int):
    """The digits recipe's trainer, a fresh state and a batch of noise."""
    bindings = ["MODEL_DIR = 'unused'", f"BATCH_SIZE = {batch_size}"]
    experiment.parse(["gin/digits_stage1.gin"], bindings, ["gin"])
    arguments = experiment.arguments()
    partitioner, cfg = arguments["partitioner"], arguments["train_dataset_cfg"]
    bound = trainer.Trainer(
        model=arguments["model"],
        optimizer=arguments["optimizer"],
        partitioner=partitioner,
        batch_spec=cfg.batch_spec(),
    )
    rng = np.random.default_rng(0)
    layout = input_pipeline.BatchLayout(partitioner.batch_sharding())
    host_batch = {k: rng.integers(0, 100, v.shape, v.dtype) for k, v in cfg.batch_spec().items()}
    info = stage_info.StageInfo.collect(
        arguments["model"], bound.abstract_state.params, cfg, arguments["checkpoint_cfg"], 1_000_000
    )
    return bound, bound.init_state(0), layout.to_global(host_batch, batch_size), info


def bare_segment(step, state, batch, num_steps):
    """Seconds per step of the jitted step alone; keeps as many steps in flight as the loop."""
    start = time.perf_counter()
    earlier = None
    for _ in range(num_steps):
        state, step_metrics = step(state, batch)
        jax.block_until_ready(earlier)
        earlier = step_metrics
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / num_steps, state


def loop_segment(step, state, batch, num_steps, writer, info, supervisor, log_period):
    """Seconds per step of the training loop."""
    progress = train_loop.Progress(writer, info, supervisor)
    start = time.perf_counter()
    steps = range(1, num_steps + 1)
    updates = train_loop.training_steps(state, step, SameBatch(batch), progress.clock, steps)
    for n, state, step_metrics in updates:  # noqa: B007  the last state is returned
        progress.add(step_metrics)
        if n % log_period == 0:
            progress.log(n, {})
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - start) / num_steps
    progress.clock.close()
    return seconds, state


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--steps", type=int, default=40, help="steps per segment")
    parser.add_argument("--log_period", type=int, default=20)
    args = parser.parse_args()
    bound, state, batch, info = build(args.batch_size)
    step = bound.compiled_train_step
    seconds: dict[str, list[float]] = {"bare": [], "loop": []}
    with tempfile.TemporaryDirectory() as model_dir, contextlib.ExitStack() as stack:
        writer = metrics.MetricsWriter(model_dir)
        supervisor = stack.enter_context(supervision.supervised(model_dir, watchdog.Watchdog()))
        for pair in range(-1, args.pairs):  # the first pair warms up
            # Either goes first as often, so that what drifts within a pair cancels out.
            for kind in ("bare", "loop") if pair % 2 else ("loop", "bare"):
                if kind == "bare":
                    taken, state = bare_segment(step, state, batch, args.steps)
                else:
                    taken, state = loop_segment(
                        step, state, batch, args.steps, writer, info, supervisor, args.log_period
                    )
                if pair >= 0:
                    seconds[kind].append(taken)
        writer.close()
    bare, loop = (statistics.median(seconds[kind]) for kind in ("bare", "loop"))
    ratios = [b / a for a, b in zip(seconds["bare"], seconds["loop"], strict=True)]
    low, middle, high = (100 * (r - 1) for r in statistics.quantiles(ratios))
    print(f"jitted step alone: {1e3 * bare:.1f} ms   in the training loop: {1e3 * loop:.1f} ms")
    print(f"overhead outside the jitted step: {100 * (loop / bare - 1):+.1f} % "
          f"(ratio of medians of {args.pairs} interleaved segments of {args.steps} steps; "
          f"pair by pair {middle:+.1f} %, quartiles {low:+.1f} to {high:+.1f} %)")  # fmt: skip


if __name__ == "__main__":
    main()
