"""Compile time of the first step, cold and from the compilation cache.

`python benchmarks/start_up.py [--gin_file=gin/shapes_stage1.gin]` starts the training command in
new processes: cold and warm in turn, each cold one with an empty cache. The data set must exist.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time


def start(gin_file, cache_dir):
    """(seconds to compile the train step, seconds of the whole one-step run)."""
    with tempfile.TemporaryDirectory() as model_dir:
        begin = time.perf_counter()
        result = subprocess.run(
            [
                sys.executable, "-m", "clipa_t5x.train", f"--gin_file={gin_file}",
                f"--gin.MODEL_DIR={model_dir!r}", f"--compilation_cache_dir={cache_dir}",
                "--gin.TRAIN_STEPS=1", "--gin.WARMUP_STEPS=0", "--gin.EVALUATORS={}",
                "--gin.TRAIN_EVAL_DATASET=None",
            ],
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
    if result.returncode:
        sys.exit(result.stderr)
    (compiled,) = re.findall(r"Compiled the train step in ([0-9.]+) s", result.stderr)
    return float(compiled), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gin_file", default="gin/shapes_stage1.gin")
    parser.add_argument("--starts", type=int, default=3)
    args = parser.parse_args()
    cold, warm = [], []
    for _ in range(args.starts):
        with tempfile.TemporaryDirectory() as cache_dir:
            cold.append(start(args.gin_file, cache_dir))
            warm.append(start(args.gin_file, cache_dir))
    for name, runs in (("cold", cold), ("warm", warm)):
        compiled, whole = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{name}: train step compiled in {compiled:.1f} s; one step and exit {whole:.1f} s")
    ratio = statistics.median(w[0] for w in warm) / statistics.median(c[0] for c in cold)
    print(f"warm / cold compile time: {ratio:.2f} (medians of {args.starts} interleaved starts)")


if __name__ == "__main__":
    main()
