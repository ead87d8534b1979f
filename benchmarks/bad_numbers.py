"""What the check for bad numbers costs a step: `python benchmarks/bad_numbers.py`.

Compiles the digits recipe's step without the check, with it and with spikes, prints the memory of
each, and runs them segment after segment in turn: ratios of the medians.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from clipa_t5x import bad_numbers, experiment, trainer
from clipa_t5x.data import input_pipeline

POLICIES = {
    "off": None,
    "skip": bad_numbers.Policy("skip"),
    "skip, spikes": bad_numbers.Policy("skip", spike_sigmas=6.0),
}


class Run:
    """A compiled step, its state and one batch of noise."""

    def __init__(self, arguments, policy):
        cfg, partitioner = arguments["train_dataset_cfg"], arguments["partitioner"]
        bound = trainer.Trainer(
            model=arguments["model"],
            optimizer=arguments["optimizer"],
            partitioner=partitioner,
            batch_spec=cfg.batch_spec(),
            bad_numbers=policy,
        )
        rng = np.random.default_rng(0)
        spec = cfg.batch_spec()
        batch = {k: rng.integers(0, 100, v.shape, v.dtype) for k, v in spec.items()}
        layout = input_pipeline.BatchLayout(partitioner.batch_sharding())
        self.batch = layout.to_global(batch, len(batch["images"]))
        self.step, self.state = bound.compiled_train_step, bound.init_state(0)
        self.seconds = []

    def segment(self, num_steps):
        """Runs some steps and keeps the seconds of each on the average."""
        start = time.perf_counter()
        for _ in range(num_steps):
            self.state, _ = self.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        self.seconds.append((time.perf_counter() - start) / num_steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=5, help="steps per segment")
    args = parser.parse_args()
    bindings = ["MODEL_DIR = 'unused'", f"BATCH_SIZE = {args.batch_size}"]
    experiment.parse(["gin/digits_stage1.gin"], bindings, ["gin"])
    arguments = experiment.arguments()
    runs = {name: Run(arguments, policy) for name, policy in POLICIES.items()}
    for number in range(-1, args.rounds):  # the first round warms up
        # Either end goes first as often, so that what drifts within a round cancels out.
        for run in list(runs.values())[:: 1 if number % 2 else -1]:
            run.segment(args.steps)
    for name, run in runs.items():
        seconds, off = run.seconds[1:], runs["off"].seconds[1:]
        ratios = [a / b for a, b in zip(seconds, off, strict=True)]
        low, middle, high = (100 * (r - 1) for r in statistics.quantiles(ratios))
        memory = run.step.memory_analysis()
        print(
            f"{name:13} {1e3 * statistics.median(seconds):6.1f} ms a step, round by round "
            f"{middle:+.1f} % (quartiles {low:+.1f} to {high:+.1f} %); temporaries "
            f"{memory.temp_size_in_bytes / 2**20:.1f} MiB, state written in place "
            f"{memory.alias_size_in_bytes / 2**20:.1f} MiB"
        )


if __name__ == "__main__":
    main()
