"""Malformed files that a run left behind, for its report, and data sets for evaluators."""

import functools
import io
import json
import pathlib
import tempfile

import numpy as np
import run_files
import tiny_records
import tiny_tars
from chaos import fuzz_mutations as mutations

_SHARDING = {
    "mesh": {"data": 4, "model": 2},
    "parameters": [
        {"parameter": "text_tower/head/kernel", "shape": [8, 4], "dtype": "float32",
         "sharding": ["data", ["replica", "model"]], "bytes": 64},
        {"parameter": "logit_scale", "shape": [], "dtype": "float32", "sharding": [], "bytes": 4},
    ],
}  # fmt: skip
_CONFUSION = {
    "name": "digit", "num_examples": 20, "num_classes": 10, "accuracy": 0.75,
    "worst": [{"class": "one", "examples": 4, "correct": 1,
               "confused_with": [{"class": "seven", "examples": 3}]}],
}  # fmt: skip
_GALLERY_ITEM = {
    "caption": "a",
    "results": [{"image": "iVBORw0KGgo=", "score": 0.5, "caption": "b", "match": True}],
}
_EVALUATION = {
    "step": 3, "time": 1.7e9,
    "results": {"inference_eval/digit": {"accuracy": 0.75, "num_examples": 20.0},
                "training_eval/validation": {"loss": 1.5}},
}  # fmt: skip


@functools.cache
def _run_files():
    metrics = "".join(run_files.line(step, loss=1.0 / step, samples=64 * step) for step in (1, 2))
    info = {"completed": True, "model": "VisionTransformer", "num_params": 36, "image_size": 84,
            "text_length": 8, "batch_size": 64, "total_steps": 3, "devices": "8 x cpu",
            "train_flops_per_example": 1000}  # fmt: skip
    contents = {
        "stage.json": info,
        "sharding.json": _SHARDING,
        "confusion_digit.json": _CONFUSION,
        "gallery.json": {"items": [_GALLERY_ITEM]},
        "evaluations/3.json": _EVALUATION,
    }
    files = {f"stage1/{name}": json.dumps(content).encode() for name, content in contents.items()}
    return {
        **files,
        "stage1/metrics.jsonl": metrics.encode(),
        "stage1/goodput.jsonl": json.dumps(_GOODPUT).encode() + b"\n",
        "stage2/metrics.jsonl": run_files.line(1, "inference_eval/digit", accuracy=0.5).encode(),
        "schedule.json": b'{"stages": ["stage1", "stage2"]}',
    }


_GOODPUT = {"start": 1.7e9, "time": 1.7e9 + 9, "resumes": 0, "from": 0, "step": 2,
            "seconds": {"init": 5.0, "step": 4.0}, "ended": True}  # fmt: skip
_NAMES = ("evaluations/03.json", "evaluations/x.json", f"evaluations/{10**17}.json",
          f"evaluations/{10**40}.json", "evaluations/-1.json", "confusion_.json",
          "confusion_\x1b[2J.json", "confusion_" + "a" * 200 + ".json")  # fmt: skip


def _run_json(rng):
    files = dict(_run_files())
    if rng.random() < 0.1:
        return mutations.spoil_folder(rng, files, keep="stage2/metrics.jsonl")
    name = rng.choice(list(files))
    if name.endswith(".jsonl"):
        lines = files[name].decode().splitlines()
        place = rng.randrange(len(lines))
        lines[place] = mutations.spoil_json(rng, json.loads(lines[place])).decode()
        data = "\n".join(lines).encode() + b"\n"
    else:
        data = mutations.spoil_json(rng, json.loads(files[name]))
    if rng.random() < 0.3:
        data = mutations.spoil(rng, data)
    if rng.random() < 0.1:
        files[f"stage1/{rng.choice(_NAMES)}"] = data
    return {**files, name: data}


_COUNT = 4
_TYPES = ("classification", "multilabel", "retrieval")
_OTHER_TYPES = ("Retrieval\n", "classification\nretrieval", "captioning", "", " ", "\x1b[2J")


@functools.cache
def _encoded(number):
    return tiny_tars.encode(tiny_records.picture(number), "PNG")


def _npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _shard(rng):
    """A sample's image, and what any type of data set has beside it; one part of it may be bad."""
    samples = {}
    for number in range(_COUNT):
        fields = {
            "png": _encoded(number),
            "cls": str(number % 2).encode(),
            "npy": _npy(np.eye(2)[number % 2]),
            "txt": f"a photo\nof {number}".encode(),
        }
        if rng is not None and rng.random() < 0.3:
            field = rng.choice(list(fields))
            fields[field] = rng.choice(
                (mutations.spoil(rng, fields[field]), b"", b"-1", b"99", b"1.5", b"1 0",
                 str(rng.choice(mutations.NUMBERS)).encode(), _npy(np.ones((2, 2))),
                 _npy(np.full(2, np.nan)), _npy(np.ones(2**10, np.int8)), b"\xff\xfe")
            )  # fmt: skip
        samples[f"s{number:07d}"] = fields
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "0.tar"
        tiny_tars.write(path, samples)
        return path.read_bytes()


def _clip_benchmark_files(kind="classification", rng=None):
    return {
        "classnames.txt": b"red cat\nblue dog\n",
        "zeroshot_classification_templates.txt": b"a photo of a {c}\n{c}\n",
        "dataset_type.txt": kind.encode(),
        "test/nshards.txt": b"1",
        "test/0.tar": _shard(rng),
    }


def _clip_benchmark(rng):
    kind = rng.choice(_TYPES)
    files = _clip_benchmark_files(kind, rng if rng.random() < 0.5 else None)
    way = rng.randrange(5)
    if way == 0:
        files = mutations.spoil_folder(rng, files, keep="")
    elif way == 1:
        files["dataset_type.txt"] = rng.choice(_OTHER_TYPES).encode()
    elif way == 2:
        files["test/nshards.txt"] = rng.choice(
            (b"", b"0", b"01", b"-1", b"1\n2", b"\xff", b"9" * 3000, b" 1 ", b"1.0")
        )
    else:
        name = rng.choice(list(files))
        files[name] = mutations.spoil(rng, files[name])
    return files


VALID = {"run_json": _run_files, "clip_benchmark": _clip_benchmark_files}
MAKERS = {"run_json": _run_json, "clip_benchmark": _clip_benchmark}
