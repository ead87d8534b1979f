"""Runs experiments as users do: gin files and overrides, in this process or in new ones."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import jaxlib
import numpy as np

from clipa_t5x import checkpoints, gin_utils
from clipa_t5x.data import build

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
GIN = REPOSITORY / "gin"
TRAIN = "clipa_t5x.train.train"

# A model that compiles in seconds, for the digits recipe.
_MODEL = (
    "BATCH_SIZE = 64",
    "WARMUP_STEPS = 0",
    "LOG_PERIOD = 2",
    "EMBED_DIM = 32",
    "VisionTransformer.width = 32",
    "VisionTransformer.depth = 2",
    "VisionTransformer.mlp_dim = 64",
    "TextTransformer.width = 32",
    "TextTransformer.depth = 1",
    "TextTransformer.mlp_dim = 64",
)

MINIATURE = (*_MODEL, "EVAL_BATCH_SIZE = 128")

# For tests that ask nothing of evaluation: it takes longer than a few steps do.
UNEVALUATED = (*_MODEL, "EVALUATORS = {}", "TRAIN_EVAL_DATASET = None")


@functools.cache
def digits_dir(parent: str) -> str:
    """A folder under `parent` with data/digits in it, built once."""
    assert build.main(["digits", f"--output_dir={parent}/data/digits"]) == 0
    return parent


def parse(experiment: str, *bindings: str) -> None:
    """Parses gin/<experiment>.gin with overrides."""
    gin_utils.parse([str(GIN / f"{experiment}.gin")], bindings, [str(GIN)], root=TRAIN)


def train(experiment: str, *bindings: str):
    """Trains in this process and returns the final state."""
    parse(experiment, *bindings)
    return gin_utils.get_root(TRAIN)()


def command(verb: str, *arguments: str) -> list[str]:
    """A command line of one of the doors."""
    return [sys.executable, "-m", f"clipa_t5x.{verb}", f"--gin_search_paths={GIN}", *arguments]


def environment(num_devices: int, optimized: bool = False) -> dict[str, str]:
    """An environment with that many virtual CPU devices; unoptimized programs compile faster."""
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    fast = {} if optimized else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    if not optimized and jaxlib.__version__.startswith("0.10."):  # as conftest.compile_fast
        flags += " --xla_cpu_use_fusion_emitters=false"
    return {**os.environ, **fast, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


def run(
    arguments: list[str],
    cwd: str,
    num_devices: int = 1,
    timeout: int = 300,
    optimized: bool = False,
):
    """Runs a command to its end."""
    return subprocess.run(
        arguments,
        cwd=cwd,
        env=environment(num_devices, optimized),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_processes(arguments: list[str], cwd: str, count: int, num_devices: int) -> list[str]:
    """Runs a command as `count` processes that join over loopback; returns their stderr."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [
        subprocess.Popen(
            [
                *arguments,
                f"--coordinator_address=127.0.0.1:{port}",
                f"--process_count={count}",
                f"--process_index={i}",
            ],
            cwd=cwd,
            env=environment(num_devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error[-4000:]
    return errors


def records(model_dir: str, group: str) -> dict[int, dict[str, float]]:
    """Values of a group in metrics.jsonl, by step; the last record of a step wins."""
    lines = (pathlib.Path(model_dir) / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return {r["step"]: r["values"] for r in parsed if r["group"] == group}


def saved_state(model_dir: str, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by name, as NumPy."""
    import orbax.checkpoint as ocp

    path = pathlib.Path(model_dir).absolute() / f"{checkpoints.PREFIX}_{step}" / "state"
    handler = ocp.PyTreeCheckpointHandler()
    checkpointer = ocp.Checkpointer(handler)
    tree = checkpointer.metadata(path).item_metadata.tree
    import jax

    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return checkpoints.flatten(checkpointer.restore(path, restore_args=args))
