import json
import os
import pathlib
import struct

import numpy as np
import pytest
import tensorflow as tf
import tiny_records
from absl import logging

from clipa_t5x.data import record_index, record_writer
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


@pytest.fixture
def scans(monkeypatch):
    """Paths of the shards that were scanned."""
    paths = []
    scan = record_index.scan_shard
    monkeypatch.setattr(record_index, "scan_shard", lambda path: paths.append(path) or scan(path))
    return paths


def one_line_error(function, *parts):
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


@pytest.mark.parametrize("data, crc", [
    (b"", 0x00000000),
    (b"123456789", 0xE3069283),  # the check value of CRC-32C (iSCSI, RFC 3720)
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
])  # fmt: skip
def test_masked_crc32c_of_published_vectors(data, crc):
    masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32
    assert record_index.masked_crc32c(data) == masked


def test_masked_crc32c_is_what_tensorflow_writes(tmp_path):
    data = os.urandom(1234)
    write_shard(tmp_path / "shard", [data])
    raw = (tmp_path / "shard").read_bytes()
    assert struct.unpack("<QI", raw[:12]) == (1234, record_index.masked_crc32c(raw[:8]))
    assert struct.unpack("<I", raw[-4:])[0] == record_index.masked_crc32c(data)


def test_offsets_follow_from_the_lengths(shards):
    expected = np.cumsum([0] + [n + 16 for n in SIZES[:-1]])
    offsets = record_index.scan_shard(shards[-1])
    assert offsets.dtype == np.int64
    np.testing.assert_array_equal(offsets, expected)


def test_every_record_is_tensorflows(shards, tmp_path):
    index = record_index.load(shards, str(tmp_path / "index" / "train"))
    expected = [r.numpy() for r in tf.data.TFRecordDataset(shards)]
    assert len(index) == len(expected) == sum(range(1, len(SIZES) + 1))
    np.testing.assert_array_equal(index.ends, np.cumsum(range(1, len(SIZES) + 1)))
    assert index.read(np.arange(len(index))) == expected
    order = np.random.default_rng(1).integers(0, len(index), 100)
    assert index.read(order) == [expected[i] for i in order]
    assert index.read(np.array([], np.int64)) == []


def test_a_kept_index_is_used_and_not_made_again(shards, tmp_path, scans):
    path = str(tmp_path / "index" / "train")
    first = record_index.load(shards, path)
    assert sorted(scans) == shards
    second = record_index.load(shards, path)
    assert len(scans) == len(shards)
    assert isinstance(second.offsets, np.memmap)
    np.testing.assert_array_equal(second.offsets, first.offsets)
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
    record_index.load(shards, path)
    scans.clear()
    change(shards)
    index = record_index.load(shards, path)
    assert sorted(scans) == shards
    assert index.read(np.arange(len(index))) == [r.numpy() for r in tf.data.TFRecordDataset(shards)]


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_a_damaged_index_is_made_again(shards, tmp_path, scans, suffix):
    path = str(tmp_path / "index" / "train")
    expected = record_index.load(shards, path)
    scans.clear()
    raw = pathlib.Path(path + suffix).read_bytes()
    pathlib.Path(path + suffix).write_bytes(raw[: len(raw) // 2])
    index = record_index.load(shards, path)
    assert scans
    np.testing.assert_array_equal(index.offsets, expected.offsets)


def test_the_index_of_an_older_layout_is_made_again(shards, tmp_path, scans):
    path = str(tmp_path / "index" / "train")
    record_index.load(shards, path)
    description = pathlib.Path(path + ".json")
    description.write_text(json.dumps({**json.loads(description.read_text()), "version": -1}))
    scans.clear()
    record_index.load(shards, path)
    assert scans


def test_a_folder_that_cannot_be_written_costs_a_warning(shards, tmp_path, monkeypatch, scans):
    (tmp_path / "index").write_text("a file where the folder should be")
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args[0] % args[1:]))
    for _ in range(2):
        index = record_index.load(shards, str(tmp_path / "index" / "train"))
        assert len(index.read(np.arange(len(index)))) == len(index)
    assert len(scans) == 2 * len(shards)
    assert len(warnings) == 2
    assert "index_dir" in warnings[0]


def test_an_empty_shard_is_named(shards, tmp_path):
    pathlib.Path(shards[1]).write_bytes(b"")
    load = lambda: record_index.load(shards, str(tmp_path / "index"))  # noqa: E731
    one_line_error(load, shards[1], "empty", "remove it")


def test_records_without_a_byte_are_records(tmp_path):
    path = write_shard(tmp_path / "shard", [b"", b""])
    index = record_index.load([path], str(tmp_path / "index"))
    assert index.read(np.array([1, 0])) == [b"", b""]


@pytest.mark.parametrize("content", [
    record_writer.encode_jpeg(tiny_records.picture(3)),
    b"url,caption\nhttp://a/b.jpg,a photo of a cat\n" * 20,
    b"short",
    bytes(4096),
])  # fmt: skip
def test_other_files_are_not_records(tmp_path, content):
    path = tmp_path / "00000.tfrecord"
    path.write_bytes(content)
    one_line_error(
        lambda: record_index.scan_shard(str(path)), path, "is not a TFRecord", "byte 0", "Remove"
    )


@pytest.mark.parametrize("cut", [1, 4, 5, 18])
def test_a_shard_that_was_cut_off(shards, cut):
    """Within the footer, the data (of 3 bytes) and the header of its last record."""
    raw = pathlib.Path(shards[-1]).read_bytes()
    pathlib.Path(shards[-1]).write_bytes(raw[:-cut])
    one_line_error(lambda: record_index.scan_shard(shards[-1]), shards[-1], "write it again")


def test_damage_in_the_middle_is_located(shards):
    raw = bytearray(pathlib.Path(shards[-1]).read_bytes())
    offset = int(record_index.scan_shard(shards[-1])[3])
    raw[offset] ^= 1
    pathlib.Path(shards[-1]).write_bytes(raw)
    one_line_error(lambda: record_index.scan_shard(shards[-1]), shards[-1], f"byte {offset}")


def test_a_shard_rewritten_under_a_running_program_is_noticed(shards, tmp_path):
    index = record_index.load(shards, str(tmp_path / "index"))
    pathlib.Path(shards[-1]).write_bytes(os.urandom(100_000))
    one_line_error(lambda: index.read(np.array([len(index) - 1])), shards[-1])
