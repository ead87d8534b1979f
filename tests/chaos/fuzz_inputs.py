"""Malformed inputs by (kind, seed): small valid files, spoilt; half of them behind right checksums.

An input is a few files by their path within a folder of its own. `VALID` has what they are made of.
"""

import functools
import io
import json
import os
import pathlib
import random
import struct
import tarfile
import tempfile

import numpy as np
import sample_sets
import tiny_records
from chaos import fuzz_mutations as mutations
from chaos import fuzz_runs, fuzz_weights
from PIL import Image

from clipa_t5x.data import formats, record_index, record_writer, tfrecords, word_classes

GIN = pathlib.Path(__file__).resolve().parents[2] / "gin"
_COUNT = 5
INDEXED_AT_NS = 10**18


def make(kind, seed):
    """Files by path; the same for the same arguments."""
    rng = random.Random(f"{kind} {seed}")
    return _MAKERS[kind](rng)


def valid(kind):
    """The files that a kind's malformed ones are made of: readers must like them."""
    return VALID[kind]()


@functools.cache
def _samples(kind):
    """Valid shards of a format, by path."""
    with tempfile.TemporaryDirectory() as folder:
        sample_sets.write(pathlib.Path(folder), kind, _COUNT)
        paths = [p for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file()]
        return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def _spoil_shard(rng, kind):
    files = dict(_samples(kind))
    path = rng.choice([path for path in files if path.count("/") == 1])  # no image of a table's
    return files, path


def _raw(kind):
    def spoil(rng):
        files, path = _spoil_shard(rng, kind)
        return {**files, path: mutations.spoil(rng, files[path], list(files.values()))}

    return spoil


def _framed(payload):
    """A record of a TFRecord file."""
    length = struct.pack("<Q", len(payload))
    checksums = [struct.pack("<I", tfrecords.masked_crc32c(part)) for part in (length, payload)]
    return length + checksums[0] + payload + checksums[1]


def _tfrecord(rng):
    if rng.random() < 0.4:
        return _raw("tfrecord")(rng)
    files, path = _spoil_shard(rng, "tfrecord")
    payloads = sample_sets.examples(range(_COUNT))
    place = rng.randrange(_COUNT)
    if rng.random() < 0.7:
        payloads[place] = mutations.spoil(rng, payloads[place])
    records = [_framed(payload) for payload in payloads]
    if rng.random() < 0.4:
        length = mutations.number_field(rng, 8)
        crc = struct.pack("<I", tfrecords.masked_crc32c(length))
        records[place] = length + crc + records[place][12:]
    return {path: b"".join(records)}


def _tar(rng):
    if rng.random() < 0.4:
        return _raw("tar")(rng)
    files, path = _spoil_shard(rng, "tar")
    data = bytearray(files[path])
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    for at in rng.sample(headers, rng.choice((1, 1, 3))):
        _spoil_header(rng, data, at)
        total = sum(data[at : at + 512]) - sum(data[at + 148 : at + 156]) + 8 * 32
        data[at + 148 : at + 156] = b"%06o\0 " % (total & 0o777777)
    return {**files, path: bytes(data)}


_SIZES = (b"-1000", b"-0000000777", b"77777777777", b"0o17", b"1_0", b"+7", b"", b"\xff" * 12,
          b"\x80" + b"\0" * 11, b"\x80" + b"\xff" * 11)  # fmt: skip
_NAMES = (b"../../canary", b"/tmp/canary", b"a/../../b.jpg", b"\xff\xfe.jpg", b".", b"", b"a" * 100,
          b"0000.", b".jpg", b"a.b.c.d.json", b"0000.json:x")  # fmt: skip


def _spoil_header(rng, data, at):
    field = rng.randrange(4)
    if field == 0:
        value = rng.choice((*_SIZES, b"%011o" % (2 ** rng.randrange(33))))
        data[at + 124 : at + 136] = value.ljust(12, b"\0")[:12]
    elif field == 1:
        data[at : at + 100] = rng.choice(_NAMES).ljust(100, b"\0")
    elif field == 2:
        data[at + 156 : at + 157] = rng.choice(
            (b"L", b"K", b"x", b"g", b"1", b"2", b"5", b"S", b"\0")
        )
    else:
        start = rng.randrange(512)
        data[at + start : at + start + 4] = rng.randbytes(4)[: 512 - start]


def _tar_of_spoilt_files(rng):
    """A sound archive of files that are not."""
    if rng.random() < 0.7:
        return _tar(rng)
    buffer = io.BytesIO()
    metadata = {"caption": "a", "label": 1, "more": ["a", {"b": None}]}
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for i in range(_COUNT):
            sample_sets.add_member(archive, f"{i:04d}.jpg", _spoilt_image(rng, ".jpg"))
            sample_sets.add_member(
                archive, f"{i:04d}.txt", mutations.spoil(rng, b"a photo of a cat")
            )
            content = mutations.spoil_json(rng, metadata)
            if rng.random() < 0.2:
                content = mutations.spoil(rng, content)
            sample_sets.add_member(archive, f"{i:04d}.json", content)
    return {"train/00000.tar": buffer.getvalue()}


def _encoded(kind, mode="RGB", size=(40, 24), **options):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if options.get("save_all"):
        options["append_images"] = [image.rotate(90).convert(mode), image.rotate(180).convert(mode)]
    wide = mode in ("I;16", "F")
    (image.convert("L") if wide else image).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


# A program in PostScript: what draws it runs it.
_POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 24\n(canary) (w) file closefile\n"


@functools.cache
def _images():
    images = {
        "0.jpg": _encoded("JPEG"),
        "1.jpg": _encoded("JPEG", progressive=True),
        "2.jpg": _encoded("JPEG", "CMYK"),
        "3.jpg": _encoded("JPEG", "L"),
        "0.png": _encoded("PNG"),
        "1.png": _encoded("PNG", "P"),
        "2.png": _encoded("PNG", "RGBA"),
        "3.png": _encoded("PNG", "I;16"),
        "4.png": _encoded("PNG", save_all=True),
        "0.gif": _encoded("GIF", "P"),
        "1.gif": _encoded("GIF", "P", save_all=True),
        "0.webp": _encoded("WEBP"),
        "1.webp": _encoded("WEBP", "RGBA", lossless=True),
        "2.webp": _encoded("WEBP", save_all=True),
        "0.bmp": _encoded("BMP"),
        "1.bmp": _encoded("BMP", "P"),
        "0.tiff": _encoded("TIFF"),
        "1.tiff": _encoded("TIFF", compression="tiff_lzw"),
        "2.tiff": _encoded("TIFF", "F"),
        "0.ppm": _encoded("PPM"),
        "0.jp2": _encoded("JPEG2000"),
    }
    return {**images, "0.eps": _POSTSCRIPT}


def _spoilt_image(rng, suffix=""):
    name = rng.choice([name for name in _images() if name.endswith(suffix)])
    data = _images()[name]
    if rng.random() < 0.3:
        data = _with_other_size(rng, data)
    if rng.random() < 0.8:
        data = mutations.spoil(rng, data, list(_images().values()))
    return mutations.with_checksums_of_png(data) if rng.random() < 0.5 else data


def _with_other_size(rng, data):
    """Width and height are others, where the format has them."""
    if data.startswith(b"\x89PNG"):
        return data[:16] + mutations.number_field(rng, 4, "big") * 2 + data[24:]
    if data.startswith(b"BM"):
        return (
            data[:18] + mutations.number_field(rng, 4) + mutations.number_field(rng, 4) + data[26:]
        )
    if data.startswith(b"GIF"):
        return (
            data[:6] + mutations.number_field(rng, 2) + mutations.number_field(rng, 2) + data[10:]
        )
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    if data.startswith(b"\xff\xd8") and frame > 0:
        size = mutations.number_field(rng, 2, "big") + mutations.number_field(rng, 2, "big")
        # A marker without a length before it: parsers that expect one go astray.
        stray = rng.choice((b"", b"\xff\xd0", b"\xff\x01", b"\xff\xff"))
        return data[:frame] + stray + data[frame : frame + 5] + size + data[frame + 9 :]
    return data


def _image(rng):
    return {"image": _spoilt_image(rng)}


@functools.cache
def _recipes():
    """Every gin file by its path below gin/."""
    return {str(p.relative_to(GIN)): p.read_text() for p in sorted(GIN.rglob("*.gin"))}


def _gin(rng):
    """A recipe, or a file that it includes, spoilt; the others are those of the project."""
    names = ["shapes_stage1.gin", "digits_stage2.gin", "bigG14_stage1.gin", "H14_stage3.gin"]
    parts = ["engine/train.gin", "models/clip.gin", "models/tiny.gin", "data/image_text.gin",
             "data/digits.gin", "evals/digits.gin", "stages/stage1.gin"]  # fmt: skip
    recipe = rng.choice(names)
    spoilt = rng.choice([recipe, recipe, *parts])
    text = _recipes()[spoilt]
    if rng.random() < 0.7:
        data = mutations.spoil_text(rng, text).encode("utf-8", "surrogatepass")
    else:
        data = mutations.spoil(rng, text.encode())
    # The recipe comes along, so that what it includes is looked for beside the spoilt file.
    return {"recipe": recipe.encode(), recipe: _recipes()[recipe].encode(), spoilt: data}


def _vocabulary_bytes():
    return "\n".join(["[PAD]", "[UNK]", "[CLS]", *tiny_records.WORDS]).encode() + b"\n"


def _vocabulary(rng):
    data = _vocabulary_bytes()
    if rng.random() < 0.5:
        data = mutations.spoil_text(rng, data.decode()).encode("utf-8", "surrogatepass")
    else:
        data = mutations.spoil(rng, data)
    return {"vocab.txt": data}


@functools.cache
def _word_class_table():
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = tiny_records.vocabulary(pathlib.Path(folder))
        tiny_records.write_word_classes(vocabulary)
        return json.loads(pathlib.Path(word_classes.table_path(vocabulary.path)).read_text())


def _json_file(name, content, others):
    """A maker of a JSON file among others that are sound."""

    def spoil(rng):
        data = mutations.spoil_json(rng, content())
        if rng.random() < 0.25:
            data = mutations.spoil(rng, data)
        return {**others(), name: data}

    return spoil


_CLASS_NAMES = {"classes.txt": b"cat\ndog\n", "templates.txt": b"a photo of a {}\n{} big\n"}


def _class_names(rng):
    name = rng.choice(list(_CLASS_NAMES))
    return {**_CLASS_NAMES, name: mutations.spoil(rng, _CLASS_NAMES[name])}


@functools.cache
def _manifest():
    with tempfile.TemporaryDirectory() as folder:
        train = pathlib.Path(folder) / "train"
        shards = record_writer.write_shards(train, sample_sets.examples(range(_COUNT)), 2)
        files = {f"train/{p.name}": p.read_bytes() for p in sorted(train.iterdir())}
    facts = [{"file": s.file, "records": s.records, "bytes": s.bytes, "sha256": s.sha256}
             for s in shards]  # fmt: skip
    content = {
        "generator": "clipa_t5x.data.build",
        "splits": {"train": {"records": _COUNT, "shards": facts}},
    }
    return files, content


def shard_in(paths):
    """The shard among an input's paths."""
    return next(path for path in paths if path.startswith("train/") and path.count("/") == 1)


@functools.cache
def _index_files(kind):
    """What is kept of the index of a shard; readers give the shard its time."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        sample_sets.write(root, kind, _COUNT)
        shard = str(root / shard_in(_samples(kind)))
        os.utime(shard, ns=(INDEXED_AT_NS, INDEXED_AT_NS))
        record_index.load([shard], str(root / "index"), formats.by_path(shard))
        return (root / "index.json").read_bytes(), (root / "index.npy").read_bytes()


def _record_index(rng):
    """An index that claims to be of the shard that lies there."""
    kind = rng.choice(("tar", "tfrecord", "array_record", "csv", "parquet"))
    description, rows = _index_files(kind)
    if rng.random() < 0.5:
        description = mutations.spoil_json(rng, json.loads(description))
    elif rng.random() < 0.5:
        rows = mutations.spoil(rng, rows)
    else:  # the header of the array stays as it is
        rows = rows[:128] + mutations.set_field(rng, rows[128:])
    return {**_samples(kind), "index.json": description, "index.npy": rows}


VALID = {
    "gin": lambda: {"recipe": b"shapes_stage1.gin"},
    "tfrecord": lambda: _samples("tfrecord"),
    "tar": lambda: _samples("tar"),
    "array_record": lambda: _samples("array_record"),
    "csv": lambda: _samples("csv"),
    "parquet": lambda: _samples("parquet"),
    "image": lambda: {"image": _images()["0.jpg"]},
    "vocabulary": lambda: {"vocab.txt": _vocabulary_bytes()},
    "word_classes": lambda: {
        "vocab.txt": _vocabulary_bytes(),
        "vocab.tags.json": json.dumps(_word_class_table()).encode(),
    },
    "class_names": lambda: _CLASS_NAMES,
    "manifest": lambda: {**_manifest()[0], "manifest.json": json.dumps(_manifest()[1]).encode()},
    "record_index": lambda: {
        **_samples("tar"), "index.json": _index_files("tar")[0], "index.npy": _index_files("tar")[1]
    },
    **fuzz_weights.VALID,
    **fuzz_runs.VALID,
}  # fmt: skip
_MAKERS = {
    "gin": _gin,
    "tfrecord": _tfrecord,
    "tar": _tar_of_spoilt_files,
    "array_record": _raw("array_record"),
    "csv": _raw("csv"),
    "parquet": _raw("parquet"),
    "image": _image,
    "vocabulary": _vocabulary,
    "word_classes": _json_file(
        "vocab.tags.json", _word_class_table, lambda: {"vocab.txt": _vocabulary_bytes()}
    ),
    "class_names": _class_names,
    "manifest": _json_file("manifest.json", lambda: _manifest()[1], lambda: _manifest()[0]),
    "record_index": _record_index,
    **fuzz_weights.MAKERS,
    **fuzz_runs.MAKERS,
}
KINDS = tuple(_MAKERS)


def write(files, folder):
    """Writes an input's files."""
    for name, data in files.items():
        path = pathlib.Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
