import contextlib
import json
import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from absl import logging

from clipa_t5x.data import record_index, tfrecords
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.errors import UserError

SIZES = (0, 1, 7, 1000, 70_000, 3)


def write_shard(path, records):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return str(path)


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    return [
        write_shard(tmp_path / f"{i:05d}.tfrecord", [rng.bytes(n) for n in SIZES[: i + 1]])
        for i in range(len(SIZES))
    ]


class RawRecords(tfrecords.TFRecord):
    """TFRecords of any bytes, as the field 'data'; counts the shards that were scanned."""

    scanned: list[str] = []

    def scan(self, path):
        self.scanned.append(path)
        return super().scan(path)

    @contextlib.contextmanager
    def open(self, path, cache=None):
        with super().open(path, cache) as shard:
            shard.read = lambda row: {"data": [shard.data(row)]}
            yield shard


@pytest.fixture
def scans():
    """Paths of the shards that were scanned."""
    RawRecords.scanned.clear()
    return RawRecords.scanned


def load(shards, path):
    return record_index.load(shards, str(path), RawRecords())


def read(index, numbers):
    return [record["data"][0] for record in index.read(np.asarray(numbers, np.int64))]


def test_every_record_is_tensorflows(shards, tmp_path):
    index = load(shards, tmp_path / "index" / "train")
    expected = [r.numpy() for r in tf.data.TFRecordDataset(shards)]
    assert len(index) == len(expected) == sum(range(1, len(SIZES) + 1))
    np.testing.assert_array_equal(index.ends, np.cumsum(range(1, len(SIZES) + 1)))
    assert read(index, np.arange(len(index))) == expected
    order = np.random.default_rng(1).integers(0, len(index), 100)
    assert read(index, order) == [expected[i] for i in order]
    assert read(index, []) == []


def test_a_kept_index_is_used_and_not_made_again(shards, tmp_path, scans):
    path = str(tmp_path / "index" / "train")
    first = load(shards, path)
    assert sorted(scans) == shards
    second = load(shards, path)
    assert len(scans) == len(shards)
    assert isinstance(second.rows, np.memmap)
    np.testing.assert_array_equal(second.rows, first.rows)
    np.testing.assert_array_equal(second.ends, first.ends)
    assert sorted(os.listdir(tmp_path / "index")) == ["train.json", "train.npy"]


def grow(shards):
    write_shard(shards[2], [b"other", b"records", b"here", b"!"])


def touch(shards):
    os.utime(shards[2], ns=(1, 1))


def drop(shards):
    os.remove(shards.pop(2))


def add(shards):
    shards.append(write_shard(shards[-1].replace("00005", "00006"), [b"new"]))


@pytest.mark.parametrize("change", [grow, touch, drop, add])
def test_a_changed_shard_is_scanned_again(shards, tmp_path, scans, change):
    path = str(tmp_path / "index" / "train")
    load(shards, path)
    scans.clear()
    change(shards)
    index = load(shards, path)
    assert sorted(scans) == shards
    assert read(index, np.arange(len(index))) == [
        r.numpy() for r in tf.data.TFRecordDataset(shards)
    ]


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_a_damaged_index_is_made_again(shards, tmp_path, scans, suffix):
    path = str(tmp_path / "index" / "train")
    expected = load(shards, path)
    scans.clear()
    raw = pathlib.Path(path + suffix).read_bytes()
    pathlib.Path(path + suffix).write_bytes(raw[: len(raw) // 2])
    index = load(shards, path)
    assert scans
    np.testing.assert_array_equal(index.rows, expected.rows)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: 3,
        lambda kept: {**kept, "ends": []},
        lambda kept: {**kept, "ends": {}},
        lambda kept: {**kept, "ends": kept["ends"][::-1]},
        lambda kept: {**kept, "ends": [-1, *kept["ends"][1:]]},
        lambda kept: {**kept, "ends": ["1", *kept["ends"][1:]]},
        lambda kept: {**kept, "ends": [*kept["ends"][:-1], 10**30]},
        lambda kept: {**kept, "problems": [1]},
        lambda kept: {name: value for name, value in kept.items() if name != "problems"},
    ],
)
def test_an_index_that_says_something_odd_is_made_again(shards, tmp_path, scans, spoil):
    path = str(tmp_path / "index" / "train")
    expected = load(shards, path)
    scans.clear()
    description = pathlib.Path(path + ".json")
    description.write_text(json.dumps(spoil(json.loads(description.read_text()))))
    assert load(shards, path).ends.tolist() == expected.ends.tolist()
    assert scans


@pytest.mark.parametrize("header", [b"{'descr': '(", b"{'descr': '<i8', 'shape': (2**70,", b"\0"])
def test_rows_of_another_header_are_made_again(shards, tmp_path, scans, header):
    path = str(tmp_path / "index" / "train")
    load(shards, path)
    scans.clear()
    rows = pathlib.Path(path + ".npy")
    data = rows.read_bytes()
    rows.write_bytes(data[:10] + header.ljust(118)[:117] + b"\n" + data[128:])
    assert len(load(shards, path))
    assert scans


@pytest.mark.parametrize("row", [(-5, 3), (2**62, 5), (0, 2**62), (5, -3), (2**63 - 1, 2**63 - 1)])
def test_places_that_do_not_exist_are_bad_records(shards, tmp_path, row):
    path = str(tmp_path / "index" / "train")
    load(shards, path)
    rows = np.load(path + ".npy", allow_pickle=False)
    rows[0] = row
    np.save(path + ".npy", rows, allow_pickle=False)
    first, second = load(shards, path).read(np.asarray([0, 1]))
    assert isinstance(first, BadRecord)
    assert second["data"] == [b""]


def test_the_index_of_an_older_layout_is_made_again(shards, tmp_path, scans):
    path = str(tmp_path / "index" / "train")
    load(shards, path)
    description = pathlib.Path(path + ".json")
    description.write_text(json.dumps({**json.loads(description.read_text()), "version": -1}))
    scans.clear()
    load(shards, path)
    assert scans


def test_a_folder_that_cannot_be_written_costs_a_warning(shards, tmp_path, monkeypatch, scans):
    (tmp_path / "index").write_text("a file where the folder should be")
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args[0] % args[1:]))
    for _ in range(2):
        index = load(shards, tmp_path / "index" / "train")
        assert len(read(index, np.arange(len(index)))) == len(index)
    assert len(scans) == 2 * len(shards)
    assert len(warnings) == 2
    assert "INDEX_DIR" in warnings[0]


def test_problems_of_shards_are_kept(shards, tmp_path):
    pathlib.Path(shards[1]).write_bytes(b"")
    raw = pathlib.Path(shards[3]).read_bytes()
    pathlib.Path(shards[3]).write_bytes(raw[:-3])
    for _ in range(2):
        index = load(shards, tmp_path / "index")
        assert index.problems.keys() == {shards[1], shards[3]}
        assert "empty" in index.problems[shards[1]]
        assert f"cut off at byte {len(raw) - 1016} of {len(raw) - 3}" in index.problems[shards[3]]
        assert len(index) == sum(range(1, len(SIZES) + 1)) - 2 - 1
        assert read(index, np.arange(len(index)))[0] == b""


def test_damaged_records_come_as_errors(shards, tmp_path):
    index = load(shards, tmp_path / "index")
    raw = bytearray(pathlib.Path(shards[-1]).read_bytes())
    raw[int(index.rows[-2][0]) + 500] ^= 1
    pathlib.Path(shards[-1]).write_bytes(raw)
    last = index.read(np.asarray([len(index) - 1, len(index) - 2]))
    assert last[0] == {"data": [raw[-7:-4]]}
    assert isinstance(last[1], BadRecord) and last[1].reason == "wrong checksum"


def test_a_folder_in_a_shard_s_place_is_refused(tmp_path):
    (tmp_path / "0.tar").mkdir()
    with pytest.raises(UserError, match="0.tar cannot be read .*remove it"):
        load([str(tmp_path / "0.tar")], tmp_path / "index")


def test_a_shard_cut_off_under_a_running_program_is_noticed(shards, tmp_path):
    index = load(shards, tmp_path / "index")
    raw = pathlib.Path(shards[-1]).read_bytes()
    pathlib.Path(shards[-1]).write_bytes(raw[:-2])
    (record,) = index.read(np.array([len(index) - 1]))
    assert isinstance(record, BadRecord) and record.reason == "truncated shard"


def test_the_digest_is_of_names_sizes_and_counts(shards, tmp_path):
    digest = load(shards, tmp_path / "a").digest
    assert load(shards, tmp_path / "b").digest == digest
    copies = tmp_path / "elsewhere"
    copies.mkdir()
    for path in shards:
        (copies / os.path.basename(path)).write_bytes(pathlib.Path(path).read_bytes())
    moved = [str(copies / os.path.basename(path)) for path in shards]
    assert load(moved, tmp_path / "c").digest == digest
    assert load(moved[:-1], tmp_path / "d").digest != digest


def test_mean_bytes_are_of_the_files(shards, tmp_path):
    index = load(shards, tmp_path / "index")
    assert index.mean_bytes == sum(os.path.getsize(path) for path in shards) / len(index)
