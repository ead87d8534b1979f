"""The contenders of `benchmarks/step.py`, each a process that is told by lines what to do.

'begin' builds the step and runs it once, a number runs it for so many seconds, 'end' measures the
device's matmul ceiling. Each answers with a line of JSON.
"""

import json
import os
import resource
import sys
import time
from typing import Any

import numpy as np


class Ours:
    """This package's train step, of the recipe."""

    def __init__(self, task: dict[str, Any]):
        import jax

        from clipa_t5x import flops, trainer
        from clipa_t5x.data import input_pipeline

        self._jax, self._task = jax, task
        self.device = jax.devices()[0].platform
        size = task["batch_size"] or task["batch_sizes"][self.device != "cpu"]
        arguments = build(task, size)
        cfg, partitioner = arguments["train_dataset_cfg"], arguments["partitioner"]
        bound = trainer.Trainer(
            model=arguments["model"], optimizer=arguments["optimizer"], partitioner=partitioner,
            batch_spec=cfg.batch_spec(), bad_numbers=None,
        )  # fmt: skip
        empty = {k: np.zeros(v.shape, v.dtype) for k, v in cfg.batch_spec().items()}
        rows = {**empty, **noise(task, size)}
        layout = input_pipeline.BatchLayout(partitioner.batch_sharding())
        self._batch = layout.to_global(rows, size)
        self._step, self._state = bound.compiled_train_step, bound.init_state(0)
        found = flops.forward_flops(arguments["model"], task["pixels"], task["text_length"])
        self.sizes = {
            "batch_size": size, "train_flops": found.training, "image_tokens": found.image_tokens,
            "text_length": found.text_tokens,
        }  # fmt: skip

    def step(self) -> None:
        """Dispatches one."""
        self._state, _ = self._step(self._state, self._batch)

    def wait(self) -> None:
        """For all that was dispatched."""
        self._jax.block_until_ready(self._state)

    def matmul(self, n: int) -> Any:
        """A function of one product of n x n matrices."""
        dtype = self._task["precision"]
        x = self._jax.numpy.ones((n, n), dtype)
        product = self._jax.jit(lambda a: a @ a)
        return lambda: product(x).block_until_ready()

    def peak_bytes(self) -> int | None:
        """Of the device, None where it is the host's."""
        stats = self._jax.devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] if stats else None


class OpenClip:
    """OpenCLIP's model, loss and AdamW, built of the same sizes."""

    def __init__(self, task: dict[str, Any], is_compiled: bool):
        import open_clip  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]

        from clipa_t5x.weights import open_clip_config

        self._torch, self._task = torch, task
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(task["cores"])
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        size = task["batch_size"] or task["batch_sizes"][self.device != "cpu"]
        model_here = build(task, size)["model"]
        pixels, length = task["pixels"], task["text_length"]
        config = open_clip_config.config(model_here, pixels, length, "squash")["model_cfg"]
        config["vision_cfg"]["patch_dropout"] = model_here.image_tower.mask_ratio
        self._model = open_clip.CLIP(**config).to(self.device).train()
        self._forward = torch.compile(self._model) if is_compiled else self._model
        self._loss = open_clip.ClipLoss()
        decayed = [p for p in self._model.parameters() if p.ndim >= 2]
        others = [p for p in self._model.parameters() if p.ndim < 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}],
            lr=1e-4, betas=(0.9, 0.95),
        )  # fmt: skip
        rows = noise(task, size)
        images = np.moveaxis(rows["images"], -1, 1) / np.float32(255)
        self._images = torch.from_numpy(images.astype(np.float32)).to(self.device)
        self._text = torch.from_numpy(rows["text"].astype(np.int64)).to(self.device)
        self.sizes = {"batch_size": size}

    def step(self) -> None:
        """As OpenCLIP's trainer: autocast, loss, backward, update, clamp of the logit scale."""
        torch = self._torch
        self._optimizer.zero_grad()
        is_mixed = self._task["precision"] == "bfloat16"
        with torch.autocast(self.device, torch.bfloat16, enabled=is_mixed):
            images, texts, scale = self._forward(self._images, self._text)[:3]
            loss = self._loss(images, texts, scale)
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            self._model.logit_scale.clamp_(0, np.log(100))

    def wait(self) -> None:
        """For all that was dispatched."""
        if self.device == "cuda":
            self._torch.cuda.synchronize()

    def matmul(self, n: int) -> Any:
        """A function of one product of n x n matrices."""
        torch = self._torch
        x = torch.ones((n, n), dtype=getattr(torch, self._task["precision"]), device=self.device)

        def product() -> None:
            torch.mm(x, x)
            self.wait()

        return product

    def peak_bytes(self) -> int | None:
        """Of the device, None where it is the host's."""
        return self._torch.cuda.max_memory_allocated() if self.device == "cuda" else None


def build(task: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """The arguments of `train.train` for a shape."""
    from clipa_t5x import experiment

    lengths = {"images": task["pixels"], "text": task["text_length"]}
    bindings = [
        *experiment.NO_PLACES,
        f"TASK_FEATURE_LENGTHS = {lengths}",
        f"BATCH_SIZE = {batch_size}",
        f"ACTIVATION_DTYPE = {task['precision']!r}",
        f"IMAGE_REMAT_POLICY = {task['remat']!r}",
        f"TEXT_REMAT_POLICY = {task['remat']!r}",
        *("AUGMENTATION = None", "LOSS_CHUNKS = 1", "MU_DTYPE = 'float32'"),
        *("DATA_DIR = 'unused'", "VOCABULARY_PATH = 'unused'"),
        *task["bindings"],
        *task["extra_bindings"],
    ]
    experiment.parse([task["recipe"]], bindings, ["gin"])
    return experiment.arguments()


def noise(task: dict[str, Any], rows: int) -> dict[str, np.ndarray]:
    """A batch of random pixels and token ids."""
    rng = np.random.default_rng(0)
    shape = (rows, task["pixels"], task["pixels"], 3)
    return {
        "images": rng.integers(0, 256, shape, np.uint8),
        "text": rng.integers(1, 30_000, (rows, task["text_length"]), np.int32),
    }


def run(contender: Any, seconds: float) -> dict[str, float]:
    """Steps for so long: images, and seconds of the clock and of all processors."""
    images = 0
    wall, cpu = time.perf_counter(), time.process_time()
    while not images or time.perf_counter() - wall < seconds:
        contender.step()
        contender.wait()
        images += contender.sizes["batch_size"]
    return {
        "images": images, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu,
    }  # fmt: skip


def ceiling(contender: Any, cores: int) -> float:
    """FLOP/s of the best of some large products; of a CPU by its own seconds, over all cores."""
    is_cpu = contender.device == "cpu"
    n = 2048 if is_cpu else 8192
    product, best = contender.matmul(n), 0.0
    product()
    for _ in range(10):
        wall, cpu = time.perf_counter(), time.process_time()
        product()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        best = max(best, 2 * n**3 / (cpu / cores if is_cpu else wall))
    return best


def main() -> None:
    name, task = sys.argv[1], json.loads(sys.argv[2])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task["cores"]])
    begun, contender = time.perf_counter(), None
    for line in map(str.strip, sys.stdin):
        if line == "begin":
            contender = Ours(task) if name == "ours" else OpenClip(task, name == "compiled")
            run(contender, 0.0)
            answer = {"seconds": time.perf_counter() - begun, "device": contender.device}
            answer |= contender.sizes
        elif line == "end":
            peak = contender.peak_bytes() if contender else None
            host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            answer = {"peak_bytes": peak or host, "ceiling": ceiling(contender, task["cores"])}
        else:
            answer = run(contender, float(line))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
