"""Time from the command to the first step: by `launch.local`, and by the trainer's own commands.

`python benchmarks/launch.py [--num_processes=2 --devices_per_process=4]` starts both in turn, with
a warm compilation cache, and takes the time until metrics.jsonl has the first step. The trainer's
own commands are those that `launch.local --dry_run` prints. The data set must exist.
"""

import argparse
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time


def first_step(commands, model_dir):
    """Seconds until the first step is in the metrics; then the commands come to their end."""
    shutil.rmtree(model_dir, ignore_errors=True)
    metrics = model_dir / "metrics.jsonl"
    begin, seconds = time.perf_counter(), None
    with tempfile.TemporaryFile("w+") as log:
        processes = [subprocess.Popen(each, stdout=log, stderr=log) for each in commands]
        while any(process.poll() is None for process in processes):
            if seconds is None and metrics.exists() and '"group": "train"' in metrics.read_text():
                seconds = time.perf_counter() - begin
            time.sleep(0.01)
        log.seek(0)
        if seconds is None or any(process.returncode for process in processes):
            sys.exit(log.read())
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gin_file", default="gin/shapes_stage1.gin")
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--devices_per_process", type=int, default=1)
    parser.add_argument("--starts", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model_dir = pathlib.Path(folder, "run")
        launched = [
            sys.executable, "-m", "launch.local", f"--gin_file={args.gin_file}",
            f"--model_dir={model_dir}", f"--arguments=--compilation_cache_dir={folder}/cache",
            f"--num_processes={args.num_processes}",
            f"--devices_per_process={args.devices_per_process}",
            "--gin.TRAIN_STEPS=1", "--gin.LOG_PERIOD=1", "--gin.WARMUP_STEPS=0",
            "--gin.EVALUATORS={}", "--gin.TRAIN_EVAL_DATASET=None",
        ]  # fmt: skip
        plan = subprocess.run([*launched, "--dry_run"], capture_output=True, text=True, check=True)
        lines = [line for line in plan.stdout.splitlines() if not line.startswith("#")]
        bare = [["sh", "-c", f"exec {line}"] for line in lines]
        first_step(bare, model_dir)  # Fills the cache.
        times = {"trainer": [], "launch.local": []}
        for _ in range(args.starts):
            times["trainer"].append(first_step(bare, model_dir))
            times["launch.local"].append(first_step([launched], model_dir))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        all_of_them = ", ".join(f"{each:.1f}" for each in seconds)
        print(f"{name}: first step after {medians[name]:.1f} s (median of {all_of_them})")
    difference = medians["launch.local"] - medians["trainer"]
    print(
        f"launch.local, {args.num_processes} process(es) of {args.devices_per_process} devices: "
        f"{difference:+.1f} s, {medians['launch.local'] / medians['trainer']:.2f} x"
    )


if __name__ == "__main__":
    main()
