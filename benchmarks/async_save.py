"""What a save beside training costs the steps: `python benchmarks/async_save.py`.

Trains a model of some hundred MiB of state on one batch of noise, saves every few steps, and prints
the ratio of medians of the steps during which a save was under way (the call included) to the
others, of one run. Then: checksums by themselves, and restoring with verification and without.

The save takes the time that the step leaves of the processor's cores: none where the step runs on
all of them. `--step_cores` keeps it to some, as a step on an accelerator leaves the host's.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time

import jax
import numpy as np
from etils import epath

from clipa_t5x import checkpoint_folders, checkpoint_manifest, checkpoints, experiment, trainer
from clipa_t5x.data import input_pipeline

KEEP = 2
GIB = 1 << 30


def build(width: int, depth: int, batch_size: int):
    """A trainer of the digits recipe with towers of that size, a state and a batch of noise."""
    bindings = ["MODEL_DIR = 'unused'", f"BATCH_SIZE = {batch_size}", f"EMBED_DIM = {width}"]
    for tower in ("VisionTransformer", "TextTransformer"):
        bindings += [f"{tower}.{name} = {value}" for name, value in
                     (("width", width), ("depth", depth), ("mlp_dim", 4 * width))]  # fmt: skip
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
    batch = {k: rng.integers(0, 100, v.shape, v.dtype) for k, v in cfg.batch_spec().items()}
    return bound, bound.init_state(0), layout.to_global(batch, batch_size)


def is_saved(model_dir: str, step: int) -> bool:
    """Whether a step's checkpoint counts, and what it replaces is gone."""
    steps = checkpoints.all_steps(model_dir)
    return step in steps and len(steps) <= KEEP


def train(bound, state, batch, checkpointer, model_dir: str, saves: int, period: int):
    """Seconds of the steps with a save and without, of the calls, and of the saves."""
    step = bound.compiled_train_step
    seconds: dict[str, list[float]] = {"with": [], "without": [], "call": [], "save": []}
    saved, begun = 0, 0.0
    for n in range(1, saves * period + 1):
        start = time.perf_counter()
        if n % period == 0:
            checkpointer.save(n, state, {})
            seconds["call"].append(time.perf_counter() - start)
            saved, begun = n, start
        is_saving = saved and not is_saved(model_dir, saved)
        state, _ = step(state, batch)
        jax.block_until_ready(state)
        seconds["with" if is_saving else "without"].append(time.perf_counter() - start)
        if is_saving and is_saved(model_dir, saved):
            seconds["save"].append(time.perf_counter() - begun)
    del seconds["without"][0]  # warms up
    return seconds


def keep_steps_to(cores: int) -> None:
    """Starts XLA with threads on that many of the cores; the other threads may use all."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(every)[:cores])
    jax.devices()
    os.sched_setaffinity(0, every)


def timed(function):
    """Median of three."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure_restoring(bound, model_dir: str) -> None:
    """Checksums of the newest checkpoint alone, and restoring it with and without them."""
    step = checkpoints.all_steps(model_dir)[-1]
    folder = checkpoint_folders.folder_of(model_dir, step)
    files = checkpoint_manifest.read(folder)["files"]
    size = sum(entry["size"] for entry in files.values())
    checked = timed(lambda: checkpoint_manifest.check(folder, step))
    checkpointer = checkpoints.Checkpointer(model_dir, checkpoints.SaveCheckpointConfig())
    restored = timed(lambda: jax.block_until_ready(checkpointer.restore(bound.abstract_state)))
    checkpointer.close()
    print(f"checkpoint: {size / (1 << 20):.0f} MiB in {len(files)} files")
    print(f"checksums: {checked / size * GIB:.2f} s per GiB, read from memory")
    print(f"restore: {restored:.2f} s verified, {restored - checked:.2f} s unverified, "
          f"ratio {restored / (restored - checked):.2f} (medians of 3)")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--period", type=int, default=12, help="steps from save to save")
    parser.add_argument("--directory", help="on the disk to measure; default: the temporary one")
    parser.add_argument("--step_cores", type=int, help="default: all")
    args = parser.parse_args()
    if args.step_cores:
        keep_steps_to(args.step_cores)
    bound, state, batch = build(args.width, args.depth, args.batch_size)
    model_dir = tempfile.mkdtemp(dir=args.directory)
    try:
        checkpointer = checkpoints.Checkpointer(
            model_dir, checkpoints.SaveCheckpointConfig(keep=KEEP)
        )
        seconds = train(bound, state, batch, checkpointer, model_dir, args.saves, args.period)
        checkpointer.close()
        busy, free = (statistics.median(seconds[kind]) for kind in ("with", "without"))
        print(f"step: {free:.3f} s; with a save under way {busy:.3f} s; ratio of medians "
              f"{busy / free:.3f} (of {len(seconds['without'])} and {len(seconds['with'])} steps)"
              )  # fmt: skip
        print(f"the call of save: {statistics.median(seconds['call']):.3f} s of these")
        measure_restoring(bound, model_dir)
    finally:
        shutil.rmtree(epath.Path(model_dir))


if __name__ == "__main__":
    main()
