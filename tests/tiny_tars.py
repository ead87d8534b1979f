"""Tar shards of a few small images with captions."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def image(seed, height=40, width=56, kind="JPEG", mode="RGB"):
    """An encoded image of smooth colours."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.convert(mode).save(buffer, kind)
    return buffer.getvalue()


def encode(picture, kind):
    """A picture, uint8 [height, width, 3], as an encoded image."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind)
    return buffer.getvalue()


def sample(seed):
    """The files of a sample by their suffix."""
    height, width = (40, 56) if seed % 2 else (61, 40)
    metadata = {"synthetic": f"made up {seed}", "label": seed % 3, "more": ["a", f"b {seed}"]}
    return {
        "jpg": image(seed, height, width),
        "txt": f"photo number {seed}".encode(),
        "json": json.dumps(metadata).encode(),
    }


def write(path, samples):
    """Writes samples by key: {'0001': {'jpg': ..., 'txt': ...}}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for key, fields in samples.items():
            for suffix, data in fields.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))


def write_shards(folder, num_shards=3, num_records=7):
    """Writes shards of good samples; returns all of them by key."""
    samples = {}
    for shard in range(num_shards):
        numbers = range(shard * num_records, (shard + 1) * num_records)
        found = {f"{number:04d}": sample(number) for number in numbers}
        write(folder / f"{shard:05d}.tar", found)
        samples.update(found)
    return samples
