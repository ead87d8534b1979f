"""The input pipeline side by side with its peers: images per CPU-second, and ratios of medians.

`python benchmarks/data.py [--source=256] [--pixels=84] [--rounds=3]` makes a corpus (see
`photos.py`), then measures all pipelines after each other in every round. `--resume` measures the
time to the first batch at step 10 and at step 100,000, `--quality` what scaled decoding costs,
`--memory` what large data sets and late steps cost. WebDataset is measured where it is installed.
`data.build convert` into `preshrunk` of the corpus folder adds a line.
"""

import argparse
import functools
import importlib.util
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import data_peers
import numpy as np
import photos
import tensorflow as tf

from clipa_t5x.data import (
    array_records,
    host_batches,
    input_pipeline,
    preprocessors,
    record_writer,
    tasks,
    tfrecords,
    vocabularies,
    webdataset,
)

LENGTH, BATCH = 8, 256
NUM_MEMORY_SHARDS = 16


def config(directory, pixels, vocabulary, kind="tfrecord", decode="scaled"):
    """Our data set over the corpus; `kind` is a folder of it."""
    formats = {"tar": webdataset.WebDataset(), "array_record": array_records.ArrayRecord()}
    name = tasks.image_text_task(
        f"{kind}_{pixels}_{decode}",
        f"{directory}/{kind}",
        vocabulary,
        preprocessors.InceptionCrop(decode=decode),
        shard_format=formats.get(kind, tfrecords.TFRecord()),
        text_reduction="syntax",
    )
    lengths = {"images": pixels, "text": LENGTH}
    return input_pipeline.DatasetConfig(name, lengths, "train", BATCH)


def ours(cfg, first_step=0):
    return host_batches.train(cfg, np.arange(BATCH), first_step * BATCH)


def pipelines(directory, pixels, vocabulary):
    """What makes an iterator over batches, by name; the first is what others are compared with."""
    cfgs = {
        kind: config(directory, pixels, vocabulary, kind)
        for kind in ("tfrecord", "tar", "array_record", "preshrunk")
        if (pathlib.Path(directory) / kind).exists()
    }
    task = tasks.get_task(cfgs["tfrecord"].mixture_or_task_name)
    full = config(directory, pixels, vocabulary, decode="full")
    found: dict[str, Callable[[], Any]] = {
        "CLIPA's preprocessing, tf.data": lambda: data_peers.clipa(
            directory, pixels, vocabulary, LENGTH, BATCH
        )
    }
    if importlib.util.find_spec("webdataset"):
        found["WebDataset + Pillow"] = lambda: data_peers.webdataset_pillow(
            directory, pixels, vocabulary, LENGTH, BATCH
        )
    found["ours, full decode"] = lambda: ours(full)
    found["ours behind tf.data's shuffle"] = lambda: data_peers.plain_shuffle(
        directory, pixels, task, cfgs["tfrecord"].task_feature_lengths, BATCH
    )
    found.update({f"ours, {kind}": functools.partial(ours, cfg) for kind, cfg in cfgs.items()})
    return found


def rate(batches, num_batches):
    """Images per CPU-second of this process, the start left out."""
    for _ in range(3):  # What runs ahead is running ahead by then.
        next(batches)
    start = time.process_time()
    for _ in range(num_batches):
        next(batches)
    return num_batches * BATCH / (time.process_time() - start)


def compare(found, rounds, num_batches):
    rates = {name: [] for name in found}
    for number in range(rounds):
        for name, make in found.items():
            rates[name].append(rate(make(), num_batches))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    base = statistics.median(next(iter(rates.values())))
    print(f"{'':32}{'images per CPU-second':>24}{'ratio of medians':>18}{'range':>16}")
    for name, values in rates.items():
        middle = statistics.median(values)
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"{name:32}{middle:>24,.0f}{middle / base:>17.2f}x{spread:>16}")


def resume(cfg, rounds):
    """Seconds to the first batch, the record index being there already."""
    times = {10: [], 100_000: []}
    next(ours(cfg))
    for _ in range(rounds):
        for step, values in times.items():
            start = time.perf_counter()
            next(ours(cfg, step))
            values.append(time.perf_counter() - start)
    near, far = (statistics.median(values) for values in times.values())
    print(f"first batch at step 10 after {near:.3f} s, at step 100,000 after {far:.3f} s: "
          f"{far / near:.2f}x")  # fmt: skip


def quality(directory, pixels, count=200):
    """PSNR of scaled against full decoding, on crops of whole pixels at every scale."""
    values = []
    for i, (_, image, _) in enumerate(photos.samples(count, 256)):
        image = tf.constant(image)
        size = tf.io.extract_jpeg_shape(image)[:2].numpy()
        rng = np.random.default_rng(i)
        sides = (size * rng.uniform(0.63, 1.0, 2)).astype(int) // 8 * 8
        box = tf.constant([*(rng.integers(0, size - sides + 1) // 8 * 8), *sides], tf.int32)
        full = preprocessors.full_decode(image, box, pixels).numpy().astype(float)
        error = np.mean((full - preprocessors.scaled_decode(image, box, pixels).numpy()) ** 2)
        values.append(10 * np.log10(255**2 / error))
    low, middle = np.percentile(values, [5, 50])
    print(f"scaled against full decoding at {pixels} px: PSNR {middle:.1f} dB, of the worst 5 % "
          f"{low:.1f} dB")  # fmt: skip


def memory(work_dir, counts=(2_000, 200_000), num_batches=40):
    """Resident memory of processes that read small and large data sets, early and late."""
    image = photos.jpeg(photos.photo(np.random.default_rng(0), 24, 24, 1.7, 0.0))
    record = record_writer.serialize({"jpg": image, "txt": "a"})
    for count in counts:
        directory = pathlib.Path(work_dir) / f"memory_{count}"
        if not directory.exists():
            record_writer.write_shards(directory / "train", [record] * count, NUM_MEMORY_SHARDS)
        for step in (0, 1_000_000):
            code = (
                "import data, itertools, resource, sys; cfg = data.images_alone(sys.argv[1]); "
                f"list(itertools.islice(data.ours(cfg, {step}), {num_batches})); "
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
            )
            command = [sys.executable, "-c", code, str(directory)]
            here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            output = subprocess.run(command, env=here, capture_output=True, text=True, check=True)
            kib = int(output.stdout.split()[-1])
            print(f"{count:>9,} records, from step {step:>9,}: {kib / 1024:,.0f} MiB resident")


def images_alone(directory):
    name = tasks.image_text_task("memory", directory, None, window_bytes=2**20)
    return input_pipeline.DatasetConfig(name, {"images": 16, "text": 8}, "train", BATCH)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=int, default=256, help="short side of the JPEGs")
    parser.add_argument("--pixels", type=int, default=84)
    parser.add_argument("--count", type=int, default=2000, help="images of the corpus")
    parser.add_argument(
        "--smooth", action="store_true", help="images with less detail, half as big"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=8, help="of a measurement")
    parser.add_argument("--only", nargs="*", help="parts of names of pipelines")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--work_dir", default=f"{tempfile.gettempdir()}/clipa_t5x_benchmark")
    args = parser.parse_args()
    if args.memory:
        memory(args.work_dir)
        return
    name = f"{args.source}{'_smooth' if args.smooth else ''}_{args.count}"
    directory = pathlib.Path(args.work_dir) / name
    mean = photos.write(directory, args.count, args.source, args.smooth)
    print(f"{args.count} JPEGs of {args.source} px, {mean / 1024:.1f} KiB on average, to "
          f"{args.pixels} px and {LENGTH} tokens; {os.cpu_count()} cores")  # fmt: skip
    vocabulary = vocabularies.BertVocabulary(str(directory / "vocab.txt"))
    if args.quality:
        quality(directory, args.pixels)
    elif args.resume:
        resume(config(directory, args.pixels, vocabulary), args.rounds)
    else:
        found = pipelines(directory, args.pixels, vocabulary)
        first = next(iter(found))
        wanted = {
            name: make
            for name, make in found.items()
            if not args.only or name == first or any(part in name for part in args.only)
        }
        compare(wanted, args.rounds, args.batches)


if __name__ == "__main__":
    main()
