"""What memory an export takes beside reading its checkpoint: `python benchmarks/export_memory.py`.

Writes a checkpoint of random parameters with scanned layers, then reads it parameter by parameter,
and exports it without the probe, each in a process of its own, and prints their peaks.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import tiny_records
import trap_weights
from flax import traverse_util

from clipa_t5x import checkpoints, export, models, stage_handover, train_state
from clipa_t5x.data import preprocessors
from clipa_t5x.towers import text_transformer, vision_transformer

PIXELS, MIB = 56, 1 << 20


def clip(width: int, depth: int) -> models.ClipModel:
    """CLIPA-shaped towers with 16 heads."""
    sizes: Any = {
        "width": width,
        "depth": depth,
        "mlp_dim": 4 * width,
        "num_heads": 16,
        "out_dim": 512,
    }
    return models.ClipModel(
        vision_transformer.VisionTransformer(**sizes, patch_size=14),
        text_transformer.TextTransformer(**sizes),
    )


def write_checkpoint(model: models.ClipModel, model_dir: str) -> dict[str, int]:
    """Bytes of every parameter, by name."""
    weights = trap_weights.make(model, PIXELS, tiny_records.LENGTHS["text"])
    state = train_state.TrainState(
        step=jnp.int32(1),
        params=jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(weights, sep="/")),
        opt_state={},
        rng=jnp.zeros(2, jnp.uint32),
    )
    checkpointer = checkpoints.Checkpointer(model_dir, checkpoints.SaveCheckpointConfig())
    checkpointer.save(1, state, {})
    checkpointer.close()
    return {name: array.nbytes for name, array in weights.items()}


def work(what: str, model: models.ClipModel, folder: pathlib.Path) -> None:
    """Reads, or exports, and prints the peak of this process's resident memory, in bytes."""
    model_dir = str(folder / "run")
    lengths = {"images": PIXELS, "text": tiny_records.LENGTHS["text"]}
    data = folder / what
    data.mkdir()
    name = tiny_records.task("export_memory", data, preprocessors.squash)
    cfg = tiny_records.config(name, task_feature_lengths=lengths)
    if what == "read":
        checkpoint = stage_handover.open_checkpoint(model_dir, 1)
        for parameter in checkpoint.saved:
            checkpoint.read(parameter)
    else:
        export.export(
            model=model, train_dataset_cfg=cfg, train_eval_dataset_cfg=cfg, model_dir=model_dir,
            output_dir=str(folder / what), export_format=what, probe_rows=0,
        )  # fmt: skip
    # Not getrusage's, which begins with what the parent had.
    status = pathlib.Path("/proc/self/status").read_text()
    print(1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]))  # pyright: ignore


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = clip(args.width, args.depth)
    if args.work:
        work(args.work[0], model, pathlib.Path(args.work[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        sizes = write_checkpoint(model, f"{folder}/run")
        name, largest = max(sizes.items(), key=lambda item: item[1])
        print(f"{sum(sizes.values()) / MIB:.0f} MiB of parameters, the largest {name}, "
              f"{largest / MIB:.0f} MiB")  # fmt: skip
        peaks = {}
        for what in ("read", "open_clip", "clipa"):
            command = [
                *(sys.executable, __file__, f"--width={args.width}", f"--depth={args.depth}"),
                *("--work", what, folder),
            ]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            peaks[what] = int(out.splitlines()[-1])
            over = (peaks[what] - peaks["read"]) / largest
            print(f"{what}: peak {peaks[what] / MIB:.0f} MiB, {over:.2f} of the largest parameter "
                  "above reading alone")  # fmt: skip


if __name__ == "__main__":
    main()
