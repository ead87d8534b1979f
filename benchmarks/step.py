"""A train step here and OpenCLIP's, side by side: `python benchmarks/step.py [--shapes=tiny,...]`.

Forward, backward and AdamW on one batch of noise, of the same widths, depths, tokens, batch and
precision; each contender in a process of its own, segment after segment in turn. Printed are
medians of images per second and per CPU-second, the ratio to OpenCLIP, the share of the device's
measured matmul ceiling that model FLOPs get (MFU), and peak memory. OpenCLIP's step needs open_clip
and torch (extra `interop`), and runs on the same device.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

WORKERS = pathlib.Path(__file__).parent / "step_workers.py"
OURS = "ours"
PEERS = ("eager", "compiled")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A step to measure.

    Attributes:
      recipe: gin file of the model.
      pixels, text_length: of an example.
      batch_size: on a CPU and on a GPU, where none is asked for.
      bindings: what differs from the recipe.
    """

    recipe: str
    pixels: int
    text_length: int
    batch_size: tuple[int, int]
    bindings: tuple[str, ...] = ()


def _towers(**sizes: Any) -> tuple[str, ...]:
    towers = ("VisionTransformer", "TextTransformer")
    return tuple(f"{tower}.{name} = {value}" for tower in towers for name, value in sizes.items())


SHAPES = {
    "tiny": Shape(
        "gin/L14_stage1.gin", 84, 8, (64, 4096),
        (*_towers(width=192, depth=12, mlp_dim=768, num_heads=3), "EMBED_DIM = 192"),
    ),
    "B16": Shape("gin/B16_64_stage1.gin", 64, 16, (32, 4096)),
    "L14": Shape("gin/L14_stage1.gin", 84, 8, (16, 2048)),
    "H14": Shape("gin/H14_stage1.gin", 84, 8, (8, 1024)),
    "bigG14": Shape("gin/bigG14_stage1.gin", 84, 8, (8, 512), _towers(depth=4)),
    "L14_224": Shape("gin/L14_stage2.gin", 224, 32, (4, 512), ("IMAGE_MASK_RATIO = 0.3",)),
}  # fmt: skip


class Worker:
    """A contender's process, which answers lines with JSON."""

    def __init__(self, name: str, shape: Shape, args: argparse.Namespace, precision: str):
        """Starts it; `name` is 'ours' or one of OpenCLIP's."""
        self.name = name
        task = {
            **dataclasses.asdict(shape), "precision": precision, "remat": args.remat,
            "cores": args.cores, "batch_size": args.batch_size, "batch_sizes": shape.batch_size,
            "extra_bindings": args.gin_bindings,
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, str(WORKERS), name, json.dumps(task)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(args.cores), "OMP_WAIT_POLICY": "passive"},
        )  # fmt: skip

    def ask(self, line: str) -> dict[str, Any]:
        """What it answers to a line; ends this program where it has died."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        for answer in self._process.stdout:  # Libraries print, too.
            if answer.startswith("{"):
                return json.loads(answer)
        sys.exit(f"{self.name} ended with status {self._process.wait()}; see above.")

    def close(self) -> None:
        """Ends it."""
        self._process.communicate("")


def measure(name: str, precision: str, args: argparse.Namespace) -> None:
    """Prints a table of one shape in one precision."""
    names = [OURS, *args.peers]
    workers = []
    for each in names:
        workers.append(Worker(each, SHAPES[name], args, precision))
        begun = workers[-1].ask("begin")
        if each == OURS:
            sizes = begun
        print(f"  {each}: {begun['device']}, first step after {begun['seconds']:.0f} s", flush=True)
    rounds: dict[str, list[dict[str, Any]]] = {each: [] for each in names}
    for _ in range(args.rounds):
        for worker in workers:
            rounds[worker.name].append(worker.ask(f"{args.seconds}"))
    ends = {worker.name: worker.ask("end") for worker in workers}
    for worker in workers:
        worker.close()
    ceiling = max(end["ceiling"] for end in ends.values())
    print(
        f"{name}, {precision}, batch {sizes['batch_size']}, {sizes['image_tokens']} + "
        f"{sizes['text_length']} tokens, {sizes['train_flops'] / 1e9:.2f} GFLOP an example; "
        f"matmul ceiling {ceiling / 1e12:.3f} TFLOP/s; {args.cores} cores on a CPU"
    )
    # Of a CPU that others use, too, what was left over says nothing: seconds of its own do.
    clock, cores = ("cpu", args.cores) if sizes["device"] == "cpu" else ("wall", 1)

    def rates(each: str, clock: str) -> list[float]:
        return [r["images"] / r[clock] for r in rounds[each]]

    medians = {each: statistics.median(rates(each, clock)) for each in names}
    for each in names:
        wall, busy = (statistics.median(rates(each, kind)) for kind in ("wall", "cpu"))
        mfu = medians[each] * cores * sizes["train_flops"] / ceiling
        print(
            f"  {each:9s} {wall:9.1f} images/s  {busy:9.1f} images/CPU-s  MFU {mfu:5.1%}  "
            f"peak {ends[each]['peak_bytes'] / 2**30:.2f} GiB"
        )
    for peer in args.peers:
        both = zip(rates(OURS, clock), rates(peer, clock), strict=True)
        ratios = [ours / theirs for ours, theirs in both]
        print(
            f"  ours / OpenCLIP {peer}: {medians[OURS] / medians[peer]:.2f} "
            f"(rounds {min(ratios):.2f} to {max(ratios):.2f})"
        )


def _list(allowed: tuple[str, ...]):
    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        if unknown := set(names) - set(allowed):
            raise argparse.ArgumentTypeError(f"{unknown} is none of {allowed}")
        return names

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--shapes", type=_list(tuple(SHAPES)), default=["tiny"], help=", ".join(SHAPES))
    add("--precisions", type=_list(("float32", "bfloat16")), default=["float32", "bfloat16"])
    add("--peers", type=_list(PEERS), default=["eager"], help="OpenCLIP's steps; '' for none")
    add("--rounds", type=int, default=7)
    add("--seconds", type=float, default=4.0, help="of one segment")
    add("--batch_size", type=int, help="default: by shape and device")
    add("--cores", type=int, default=1, help="of a CPU, for each")
    add("--remat", default="none", help="remat policy of both towers here; OpenCLIP keeps all")
    add("--gin_bindings", action="append", default=[], help="of ours")
    args = parser.parse_args()
    for name in args.shapes:
        for precision in args.precisions:
            measure(name, precision, args)


if __name__ == "__main__":
    main()
