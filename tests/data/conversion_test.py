import io
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import sample_sets
import tensorflow as tf
import tiny_tars
from array_record.python import array_record_module
from PIL import Image

from clipa_t5x.data import conversion, manifests, shard_conversion
from clipa_t5x.errors import UserError

TFRECORD = {"output_format": "tfrecord"}


def convert(source, output_dir, *, num_workers=0, options=None, records_per_shard=5, **arguments):
    return conversion.convert(
        str(source),
        str(output_dir),
        num_workers=num_workers,
        records_per_shard=records_per_shard,
        options=shard_conversion.Options(**{**TFRECORD, **(options or {})}),
        progress_stream=io.StringIO(),
        **arguments,
    )


def records(output_dir, split="train"):
    """All records in their order: name -> list of values."""
    found = []
    for path in sorted((output_dir / split).iterdir()):
        if path.suffix == ".array_record":
            reader = array_record_module.ArrayRecordReader(str(path))
            found += reader.read_all()
        else:
            found += [record.numpy() for record in tf.data.TFRecordDataset(str(path))]
    examples = [tf.train.Example.FromString(record).features.feature for record in found]
    return [
        {name: list(f.bytes_list.value or f.int64_list.value) for name, f in features.items()}
        for features in examples
    ]


def output(directory):
    """What has to be the same for the same input: times of files are in the index."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and ".record_index" not in path.parts
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    tiny_tars.write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """The source in TFRecords, by no other process."""
    folder = tmp_path_factory.mktemp("converted")
    convert(source, folder)
    return folder


@pytest.mark.parametrize("output_format", ["tfrecord", "array_record"])
def test_records_are_the_sources_under_img2datasets_names(source, tmp_path, output_format):
    keys = {"caption_keys": ("txt", "json:synthetic", "json:more"), "label_key": "json:label"}
    facts = convert(source, tmp_path, options={"output_format": output_format, **keys})
    found = records(tmp_path)
    for number, record in enumerate(found):
        files = tiny_tars.sample(number)
        image = Image.open(io.BytesIO(files["jpg"]))
        assert record == {
            "key": [b"%04d" % number],
            "jpg": [files["jpg"]],
            "txt": [files["txt"]],
            "synthetic": [b"made up %d" % number],
            "more": [b"a", b"b %d" % number],
            "width": [image.width],
            "height": [image.height],
            "label": [number % 3],
        }
    assert facts["records"] == len(found) == 21
    # Shards are cut by number, whatever the input's are.
    names = [f"{i:05d}.{output_format}" for i in range(5)]
    assert [(s["file"], s["records"]) for s in facts["shards"]] == list(
        zip(names, [5, 5, 5, 5, 1], strict=True)
    )


@pytest.mark.parametrize("kind", sample_sets.FORMATS)
def test_every_format_is_converted(tmp_path, kind):
    source = sample_sets.write(tmp_path / "set", kind)
    # Class folders are shards themselves.
    pattern = "train" if kind == "folder" else None
    facts = convert(source, tmp_path / "x", pattern=pattern)
    found = records(tmp_path / "x")
    assert facts["records"] == len(found) == sample_sets.COUNT and not facts["bad"]
    assert [r["jpg"] for r in found] == [[sample_sets.image(i)] for i in range(len(found))]
    captions = [r["txt"][0].decode() for r in found]
    assert captions == [sample_sets.caption(i) for i in range(len(found))]


def test_the_manifest_tells_the_truth(converted):
    facts = manifests.read(converted)["splits"]["train"]
    assert facts["bytes"] == sum(p.stat().st_size for p in (converted / "train").iterdir())
    assert facts["short_side"] == {
        **dict.fromkeys(("min", "max", "p5", "p25", "p50", "p75", "p95"), 40),
        "mean": 40.0,
    }
    assert (facts["height"]["min"], facts["height"]["max"]) == (40, 61)
    assert facts["caption_words"]["mean"] == 3
    assert (facts["bad"], facts["input_records"]) == ({}, 21)
    shards = [str(path) for path in sorted((converted / "train").iterdir())]
    assert manifests.check_sums(shards) == "5 checksums agree"


def test_the_index_is_where_the_source_looks_for_it(converted):
    kept = json.loads((converted / ".record_index" / "train.json").read_text())
    assert kept["ends"] == [5, 10, 15, 20, 21]
    assert {path.name for path in converted.iterdir()} == {
        "train",
        "manifest.json",
        ".record_index",
    }


def test_any_number_of_workers_leaves_the_same_bytes(source, converted, tmp_path):
    convert(source, tmp_path / "three", num_workers=3)
    assert output(tmp_path / "three") == output(converted)


@pytest.mark.slow
@pytest.mark.parametrize("output_format", ["tfrecord", "array_record"])
def test_one_worker_is_as_good_as_four(source, tmp_path, output_format):
    options = {"output_format": output_format, "short_side": 24}
    for workers in (1, 4):
        convert(source, tmp_path / str(workers), num_workers=workers, options=options)
    assert output(tmp_path / "1") == output(tmp_path / "4")


def _command(source, output_dir):
    return [
        sys.executable, "-m", "clipa_t5x.data.build", "convert", f"--source={source}",
        f"--output_dir={output_dir}", "--output_format=tfrecord", "--short_side=24",
        "--records_per_shard=5", "--num_workers=2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "finished", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 20, 60))]
)
def test_killed_and_started_again_is_as_if_nothing_had_been(tmp_path, finished):
    tiny_tars.write_shards(tmp_path / "tars", num_shards=4, num_records=100)
    options = {"short_side": 24, "image_key": "jpg;jpeg;png;webp"}
    convert(tmp_path / "tars", tmp_path / "whole", options=options)

    broken = tmp_path / "broken"
    process = subprocess.Popen(_command(tmp_path / "tars", broken), stderr=subprocess.DEVNULL)
    begun = broken / ".convert-train" / "input.npy"
    while process.poll() is None:
        if begun.exists() and len(list(broken.glob("train/0*.tfrecord"))) >= finished:
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # The workers end with it, and what they were at is not taken for finished.
    time.sleep(1)
    before = {path: path.stat().st_mtime_ns for path in broken.glob(".convert-train/[0-9]*.json")}
    assert not (broken / "manifest.json").exists()
    convert(tmp_path / "tars", broken, options=options)
    assert output(broken) == output(tmp_path / "whole")
    assert len(before) >= finished - 2


def test_finished_shards_are_not_written_again(source, converted, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def keep(place, number, facts):
        if number == 3:
            raise Killed
        original(place, number, facts)

    original = conversion.conversion_journal.SplitFolder.keep
    with monkeypatch.context() as patched:
        patched.setattr(conversion.conversion_journal.SplitFolder, "keep", keep)
        with pytest.raises(Killed):
            convert(source, tmp_path / "x")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x/train").iterdir()}
    assert len(times) == 4
    convert(source, tmp_path / "x")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x/train").iterdir()}
    # The fourth had its name, but no entry in the journal.
    assert [name for name in times if times[name] != after[name]] == ["00003.tfrecord"]
    assert output(tmp_path / "x") == output(converted)


def test_a_finished_split_is_left_alone_and_others_join_it(source, tmp_path):
    assert convert(source, tmp_path) is not None
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert convert(source, tmp_path) is None
    assert before == {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()
    }
    convert(source, tmp_path, pattern="00001.tar", split="validation")
    manifest = manifests.read(tmp_path)
    assert {name: facts["records"] for name, facts in manifest["splits"].items()} == {
        "train": 21,
        "validation": 7,
    }


def test_changed_arguments_are_refused_with_the_difference(source, tmp_path):
    convert(source, tmp_path)
    with pytest.raises(UserError, match=r"\(short_side None -> 24\).*--overwrite"):
        convert(source, tmp_path, options={"short_side": 24})
    assert {r["width"][0] for r in records(tmp_path)} == {40, 56}
    convert(source, tmp_path, options={"short_side": 24}, overwrite=True, records_per_shard=9)
    assert {r["width"][0] for r in records(tmp_path)} == {24, 34}
    assert len(list((tmp_path / "train").iterdir())) == 3


def test_a_changed_input_is_refused(tmp_path):
    tiny_tars.write_shards(tmp_path / "tars")
    convert(tmp_path / "tars", tmp_path / "x")
    tiny_tars.write(tmp_path / "tars" / "00003.tar", {"9": tiny_tars.sample(9)})
    with pytest.raises(UserError, match="input 3 shards .* -> 4 shards"):
        convert(tmp_path / "tars", tmp_path / "x")


def test_a_lost_shard_is_named(source, tmp_path):
    convert(source, tmp_path)
    before = output(tmp_path)
    (tmp_path / "train" / "00002.tfrecord").unlink()
    with pytest.raises(UserError, match="train/00002.tfrecord is missing"):
        convert(source, tmp_path)
    convert(source, tmp_path, overwrite=True)
    assert output(tmp_path) == before


def test_bad_records_are_left_out_counted_and_named(tmp_path):
    jpeg = tiny_tars.image(0)
    bad = {
        "a": {"jpg": b"not an image at all", "txt": b"x"},
        "b": {"jpg": tiny_tars.image(0, 200, 300)[:1500], "txt": b"x"},
        "c": {"jpg": jpeg, "txt": b"  "},
        "d": {"jpg": jpeg},
        "e": {"txt": b"x"},
        "f": {"jpg": b"", "txt": b"x"},
        "g": {"jpg": tiny_tars.image(0, 1, 1), "txt": b"x"},
    }
    good = {
        "h": tiny_tars.sample(1),
        "i": {"png": tiny_tars.image(2, kind="PNG"), "txt": "\u00e9t\u00e9".encode()},
        "j": {"jpg": tiny_tars.image(3, mode="CMYK"), "txt": b"\xff broken"},
    }
    tiny_tars.write(tmp_path / "tars" / "0.tar", {**bad, **good})
    facts = convert(tmp_path / "tars", tmp_path / "x", records_per_shard=4)
    assert facts["bad"] == {
        "empty caption": 1,
        "empty image": 1,
        "missing caption": 1,
        "missing image": 1,
        "not an image": 1,
        "too few pixels": 1,
        "truncated image": 1,
    }
    assert facts["mended"] == {"CMYK": 1, "invalid UTF-8": 1}
    assert any("record 2 of" in line and "empty caption" in line for line in facts["bad_examples"])
    # The first four are all bad: there is no file of them.
    assert [s["file"] for s in facts["shards"]] == ["00001.tfrecord", "00002.tfrecord"]
    found = records(tmp_path / "x")
    assert [record["key"] for record in found] == [[b"h"], [b"i"], [b"j"]]
    assert found[1]["jpg"] == [good["i"]["png"]]
    assert Image.open(io.BytesIO(found[2]["jpg"][0])).mode == "RGB"
    assert found[2]["txt"] == ["\ufffd broken".encode()]
    text = conversion.describe(facts, "x", "train")
    assert "3 records in 2 shards" in text and "left out 7 of 10 records" in text


def test_a_truncated_input_shard_is_named(source, tmp_path):
    data = (source / "00000.tar").read_bytes()
    (tmp_path / "tars").mkdir()
    within = data.index(tiny_tars.sample(3)["jpg"]) + 100
    (tmp_path / "tars" / "00000.tar").write_bytes(data[:within])
    facts = convert(tmp_path / "tars", tmp_path / "x")
    assert facts["records"] == 3
    assert "input shards are damaged" in conversion.describe(facts, "x", "train")


def test_larger_images_are_shrunk_and_smaller_ones_are_not_touched(tmp_path):
    samples = {
        "large": {"jpg": tiny_tars.image(0, 300, 480), "txt": b"x"},
        "high": {"jpg": tiny_tars.image(1, 500, 101), "txt": b"x"},
        "exact": {"jpg": tiny_tars.image(2, 50, 70), "txt": b"x"},
        "small": {"jpg": tiny_tars.image(3, 30, 700), "txt": b"x"},
    }
    tiny_tars.write(tmp_path / "tars" / "0.tar", samples)
    convert(tmp_path / "tars", tmp_path / "x", options={"short_side": 50})
    large, high, exact, small = records(tmp_path / "x")
    assert (large["height"], large["width"]) == ([50], [80])
    assert (high["height"], high["width"]) == ([248], [50])
    assert exact["jpg"] == [samples["exact"]["jpg"]] and small["jpg"] == [samples["small"]["jpg"]]
    for record, name in ((large, "large"), (high, "high")):
        shrunk = Image.open(io.BytesIO(record["jpg"][0]))
        assert shrunk.size == (record["width"][0], record["height"][0])
        whole = Image.open(io.BytesIO(samples[name]["jpg"]))
        expected = np.asarray(whole.resize(shrunk.size, Image.Resampling.LANCZOS), float)
        error = np.square(np.asarray(shrunk, float) - expected).mean()
        assert 10 * np.log10(255**2 / error) > 32


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"source": "nowhere"}, "no shards match nowhere: nowhere does not exist"),
        ({"pattern": "*.tfrecord"}, r"no shards match .*\*.tfrecord: .* holds 00000.tar"),
        ({"options": {"image_key": "image"}}, "no field 'image'.*jpg, json, .*txt.*--image_key"),
        ({"options": {"caption_keys": ("text",)}}, "no field 'text'.*--caption_key"),
        ({"options": {"label_key": "json:class"}}, "no field 'json:class'.*--label_key"),
        ({"output_dir": "gs://bucket/x"}, "not a local directory"),
        ({"output_dir": "/dev/null/x"}, "--output_dir=/dev/null/x can be written"),
        ({"split": "a/b"}, "--split='a/b'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_and_leave_nothing_behind(source, tmp_path, arguments, message):
    given = {"source": source, "output_dir": tmp_path / "x", **arguments}
    with pytest.raises(UserError, match=message) as error:
        convert(given.pop("source"), given.pop("output_dir"), **given)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_not_mixed_with(source, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that this command has not written"):
        convert(source, tmp_path, overwrite=True)
    assert output(tmp_path) == {"train/notes.txt": b"mine"}


def test_formats_are_not_mixed(source, converted, tmp_path):
    for path in (source / "00000.tar", converted / "train" / "00000.tfrecord"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="shards of several formats"):
        convert(tmp_path, tmp_path / "x", pattern="0*")


def test_an_input_without_a_good_record(tmp_path):
    tiny_tars.write(tmp_path / "tars" / "0.tar", {"a": {"jpg": b"none", "txt": b"x"}})
    with pytest.raises(
        UserError, match="all 1 records .* bad .not an image 1; the first: record 0"
    ):
        convert(tmp_path / "tars", tmp_path / "x")


@pytest.mark.parametrize("output_format", ["tfrecord", "array_record"])
@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line(source, tmp_path, output_format, num_workers):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*00000\..*make room"):
            options = {"output_format": output_format}
            convert(source, tmp_path / "x", options=options, num_workers=num_workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_progress_is_told(source, tmp_path):
    stream = io.StringIO()
    conversion.convert(str(source), str(tmp_path), num_workers=0, progress_stream=stream)
    assert stream.getvalue().splitlines()[-1].startswith("21/21 records, ")
