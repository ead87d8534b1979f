"""What a train step holds beside its state, by number of microbatches.

`python benchmarks/microbatch_memory.py [--num_devices=8]` compiles the step of a mid-sized model
and prints XLA's own account of its temporaries on each device; nothing is run.
"""

import argparse
from typing import Any

import jax
import numpy as np

from clipa_t5x import models, optimizers, partitioning, schedules, trainer
from clipa_t5x.towers import text_transformer, vision_transformer

LENGTH, PIXELS = 32, 96


def temporaries(num_microbatches: int, batch_size: int, devices) -> int:
    """Bytes on each device, for two towers of width 128 and depth 6 on 145 and 32 tokens."""
    sizes: dict[str, Any] = {
        "width": 128,
        "depth": 6,
        "mlp_dim": 512,
        "num_heads": 4,
        "out_dim": 64,
    }
    bound = trainer.Trainer(
        model=models.ClipModel(
            image_tower=vision_transformer.VisionTransformer(
                **sizes, patch_size=8, drop_path_rate=0.1
            ),
            text_tower=text_transformer.TextTransformer(**sizes, vocab_size=64),
        ),
        optimizer=optimizers.adamw(schedules.warmup_cosine(1e-3, 10)),
        partitioner=partitioning.PjitPartitioner(
            devices=devices,
            logical_axis_rules=partitioning.standard_logical_axis_rules(1, 2),
        ),
        batch_spec={
            "images": jax.ShapeDtypeStruct((batch_size, PIXELS, PIXELS, 3), np.uint8),
            "text": jax.ShapeDtypeStruct((batch_size, LENGTH), np.int32),
        },
        num_microbatches=num_microbatches,
    )
    return bound.compiled_train_step.memory_analysis().temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_devices", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--num_microbatches", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.num_devices)
    devices = jax.devices()[: args.num_devices]
    print(f"{'microbatches':>12} {'temporaries':>12} {'x count':>8}")
    first = None
    for count in args.num_microbatches:
        size = temporaries(count, args.batch_size, devices)
        first = first or size * count
        print(f"{count:>12} {size / 2**20:>8.0f} MiB {size * count / first:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
