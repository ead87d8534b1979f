"""How fast an experiment's data come, stage by stage, without a model.

    python -m clipa_t5x.data.benchmark --gin_file=gin/shapes_stage1.gin

Each stage includes those before it. Images per CPU-second are what to buy cores by; those per
second are what this host gives, all its cores together.
"""

import dataclasses
import functools
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tensorflow as tf

from clipa_t5x.data import host_batches, input_pipeline, sources, tasks

# A stage is measured in so many turns, all stages after each other in each, and told by medians.
ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Rate:
    """Of one stage.

    Attributes:
      name: what it does beyond the stage before.
      per_second: images.
      per_cpu_second: images.
    """

    name: str
    per_second: float
    per_cpu_second: float


def run(cfg: input_pipeline.DatasetConfig, seconds: float = 3.0, num_images: int = 4096) -> str:
    """Measures the training data of an experiment.

    Args:
      cfg: which data.
      seconds: of one measurement, at least.
      num_images: most of a batch: a host of many has no more rows of the global one than that.

    Returns:
      A table.

    Raises:
      UserError: the data are missing or damaged.
    """
    cfg.check()
    rows = np.arange(min(cfg.batch_size, num_images))
    rates = measure(_stages(cfg, rows), len(rows), seconds)
    lengths = cfg.task_feature_lengths
    head = (
        f"{cfg.mixture_or_task_name}: {input_pipeline.num_examples(cfg):,} records to "
        f"{lengths['images']} px and {lengths['text']} tokens, batches of {len(rows)}"
    )
    lines = [f"  {'':<28}{'images/s':>10}{'per CPU-second':>16}{'CPU us/image, own':>19}"]
    before = 0.0
    for rate in rates:
        cost = 1e6 / rate.per_cpu_second
        lines.append(
            f"  {rate.name:<28}{rate.per_second:>10,.0f}{rate.per_cpu_second:>16,.0f}"
            f"{max(cost - before, 0):>19,.0f}"
        )
        before = cost
    bad = tasks.get_source(cfg.mixture_or_task_name).records.counts()
    notes = [f"  {name}: {count}" for name, count in bad.items()]
    return "\n".join([head, *lines, *notes])


def measure(
    stages: dict[str, Callable[[], Iterator[Any]]], batch_size: int, seconds: float
) -> list[Rate]:
    """Rates of iterators over batches, each stage anew in every round.

    Args:
      stages: what makes an iterator, by the stage's name.
      batch_size: images of a batch.
      seconds: how long to take batches, at least one.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in stages}
    for _ in range(ROUNDS):
        for name, make in stages.items():
            found[name].append(_rates(make(), batch_size, seconds))
    return [
        Rate(name, *(statistics.median(values) for values in zip(*rounds, strict=True)))
        for name, rounds in found.items()
    ]


def _rates(batches: Iterator[Any], batch_size: int, seconds: float) -> tuple[float, float]:
    """(images per second, images per CPU-second), the start left out."""
    next(batches)
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - wall) < seconds or not count:
        next(batches)
        count += batch_size
    return count / elapsed, count / max(time.process_time() - cpu, 1e-9)


def _stages(
    cfg: input_pipeline.DatasetConfig, rows: np.ndarray
) -> dict[str, Callable[[], Iterator[Any]]]:
    """Iterators over batches of ever more of the pipeline."""
    task = tasks.get_task(cfg.mixture_or_task_name)
    source = tasks.get_source(cfg.mixture_or_task_name)
    read = functools.partial(source.examples_at, cfg.split, shuffle=cfg.shuffle, seed=cfg.seed)

    def up_to(number: int) -> Iterator[Any]:
        indices = host_batches.indices(rows, 0, cfg.batch_size, None)
        ds = sources.fetch(read, indices, source.feature_names())
        known = {
            "sequence_length": cfg.task_feature_lengths,
            "output_features": task.output_features,
        }
        for function in task.preprocessors[:number]:
            wanted = inspect.signature(function).parameters
            ds = function(ds, **{name: v for name, v in known.items() if name in wanted})
        batched = next(iter(ds.element_spec.values())).shape.rank  # pyright: ignore
        ds = ds.unbatch() if batched else ds
        options = tf.data.Options()
        options.autotune.enabled = False
        return iter(ds.batch(len(rows)).with_options(options))

    def to_device() -> Iterator[Any]:
        mesh = jax.sharding.Mesh(np.asarray(jax.local_devices()), ("data",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        layout = input_pipeline.BatchLayout(sharding)
        for batch in host_batches.train(cfg, rows, 0):
            yield jax.block_until_ready(layout.to_global(batch, len(rows)))

    names = [_name(function) for function in task.preprocessors]
    stages: dict[str, Callable[[], Iterator[Any]]] = {"read, check": lambda: up_to(0)}
    for number, name in enumerate(names, 1):
        stages[f"+ {name}"] = functools.partial(up_to, number)
    stages["+ batches of this host"] = functools.partial(host_batches.train, cfg, rows, 0)
    stages["+ to the devices"] = to_device
    return stages


def _name(function: Any) -> str:
    """'decode images' of a preprocessor of that name."""
    return getattr(function, "func", function).__name__.replace("_", " ")


if __name__ == "__main__":
    from clipa_t5x import main

    main.run("benchmark")
