"""Photo-like JPEGs with captions, the corpus of `benchmarks/data.py`: TFRecord and tar shards.

Images have the spectrum of photographs (amplitude falling as a power of frequency), grain, and the
weight of what web crawls hold: at 256 px on the short side and quality 95, 26 KiB on average. Most
photographs that image libraries ship as samples weigh more at that size.
"""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image

from clipa_t5x.data import record_writer, word_classes, wordpiece

# By how much amplitudes fall with frequency, and the grain added: together they set the bytes.
SLOPE, GRAIN = 1.76, 1.0
SMOOTH_SLOPE, SMOOTH_GRAIN = 2.25, 0.0
NUM_SHARDS = 4


def photo(rng, height, width, slope, grain):
    """uint8 [height, width, 3]: three planes that share most of their waves."""
    waves = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    waves[0, 0] = 1.0

    def plane():
        noise = rng.normal(size=(height, width))
        return np.fft.irfft2(np.fft.rfft2(noise) / waves**slope, (height, width))

    shared = plane()
    planes = []
    for channel in range(3):
        values = shared + 0.5 * plane()
        values = (values - values.mean()) / values.std() * 55 + 120 + 10 * channel
        planes.append(values)
    image = np.stack(planes, -1) + rng.normal(size=(height, width, 1)) * grain
    return np.clip(image, 0, 255).astype(np.uint8)


def jpeg(image, quality=95):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def samples(count, short_side, smooth=False, seed=0):
    """Yields (key, JPEG, caption); sides are 1 to 1.5 in ratio, either way round."""
    rng = np.random.default_rng(seed)
    words = vocabulary_words()
    slope, grain = (SMOOTH_SLOPE, SMOOTH_GRAIN) if smooth else (SLOPE, GRAIN)
    for i in range(count):
        long_side = int(short_side * rng.uniform(1, 1.5))
        sides = (short_side, long_side) if i % 2 else (long_side, short_side)
        caption = " ".join(rng.choice(words, rng.integers(6, 15)))
        yield f"{i:09d}", jpeg(photo(rng, *sides, slope, grain)), caption


def vocabulary_words():
    """3,000 made-up words."""
    rng = np.random.default_rng(7)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return sorted({"".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(3000)})


def write(directory, count, short_side, smooth=False):
    """Writes the corpus where it is not yet; returns its mean JPEG's bytes.

    `tfrecord/train` and `tar/train` hold the same samples in the same order, `vocab.txt` and its
    table of word classes the captions' words.
    """
    directory = pathlib.Path(directory)
    done = directory / "mean_bytes.txt"
    if not done.exists():
        everything = list(samples(count, short_side, smooth))
        _write_vocabulary(directory)
        # As `write_shards` deals records out in turn, so here.
        records = [
            record_writer.serialize({"key": k, "jpg": j, "txt": t}) for k, j, t in everything
        ]
        record_writer.write_shards(directory / "tfrecord" / "train", records, NUM_SHARDS)
        for shard in range(NUM_SHARDS):
            _write_tar(
                directory / "tar" / "train" / f"{shard:05d}.tar", everything[shard::NUM_SHARDS]
            )
        done.write_text(str(np.mean([len(j) for _, j, _ in everything])))
    return float(done.read_text())


def _write_vocabulary(directory):
    words = vocabulary_words()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "vocab.txt"
    pieces = wordpiece.build_vocabulary(words)
    wordpiece.write_vocabulary(path, pieces)
    lists = {"noun": words[::2], "adjective": words[1::4]}
    word_classes.write(str(path), word_classes.classify_listed(pieces, lists), "made up", "1")


def _write_tar(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, image, caption in entries:
            for name, data in ((f"{key}.jpg", image), (f"{key}.txt", caption.encode()),
                               (f"{key}.json", b'{"status": "success"}')):  # fmt: skip
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
