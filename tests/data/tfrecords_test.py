import os
import pathlib
import struct

import numpy as np
import pytest
import tensorflow as tf
import tiny_records

from clipa_t5x.data import record_writer, shard_formats, tfrecords
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.errors import UserError

SIZES = (0, 1, 7, 1000, 70_000, 3)


def write_shard(path, records):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return str(path)


@pytest.fixture
def shard(tmp_path):
    rng = np.random.default_rng(0)
    return write_shard(tmp_path / "00000.tfrecord", [rng.bytes(n) for n in SIZES])


def scan(path):
    return tfrecords.TFRecord().scan(str(path))


@pytest.mark.parametrize("data, crc", [
    (b"", 0x00000000),
    (b"123456789", 0xE3069283),  # the check value of CRC-32C (iSCSI, RFC 3720)
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
])  # fmt: skip
def test_masked_crc32c_of_published_vectors(data, crc):
    masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32
    assert tfrecords.masked_crc32c(data) == masked


def test_masked_crc32c_is_what_tensorflow_writes(tmp_path):
    data = os.urandom(1234)
    write_shard(tmp_path / "shard", [data])
    raw = (tmp_path / "shard").read_bytes()
    assert struct.unpack("<QI", raw[:12]) == (1234, tfrecords.masked_crc32c(raw[:8]))
    assert struct.unpack("<I", raw[-4:])[0] == tfrecords.masked_crc32c(data)


def test_rows_follow_from_the_lengths(shard):
    found = scan(shard)
    assert found.rows.dtype == np.int64 and not found.problem
    np.testing.assert_array_equal(found.rows[:, 0], np.cumsum([0] + [n + 16 for n in SIZES[:-1]]))
    np.testing.assert_array_equal(found.rows[:, 1], SIZES)


def test_every_record_is_tensorflows(shard):
    with tfrecords.TFRecord().open(shard) as opened:
        found = [opened.data(row) for row in scan(shard).rows]
    assert found == [r.numpy() for r in tf.data.TFRecordDataset(shard)]


def test_an_example_is_its_lists(tmp_path):
    written = {"jpg": b"bytes", "txt": "\u00e9t\u00e9", "label": 3}
    path = write_shard(tmp_path / "shard", [record_writer.serialize(written), b"\xffnone"])
    with tfrecords.TFRecord().open(path) as opened:
        first, second = shard_formats.iterate(opened, scan(path).rows)
    assert {name: list(values) for name, values in first.items()} == {
        "jpg": [b"bytes"], "txt": ["\u00e9t\u00e9".encode()], "label": [3],
    }  # fmt: skip
    assert isinstance(second, BadRecord) and second.reason == "no tf.train.Example"


@pytest.mark.parametrize("content", [
    record_writer.encode_jpeg(tiny_records.picture(3)),
    b"url,caption\nhttp://a/b.jpg,a photo of a cat\n" * 20,
    bytes(4096),
])  # fmt: skip
def test_other_files_are_not_records(tmp_path, content):
    path = tmp_path / "00000.tfrecord"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        scan(path)
    for part in (str(path), "is not a TFRecord", "byte 0", "Remove"):
        assert part in str(caught.value)


@pytest.mark.parametrize("cut", [1, 4, 5, 18])
def test_a_shard_that_was_cut_off_loses_its_last_record(shard, cut):
    """Within the footer, the data (of 3 bytes) and the header of its last record."""
    raw = pathlib.Path(shard).read_bytes()
    pathlib.Path(shard).write_bytes(raw[:-cut])
    found = scan(shard)
    assert len(found.rows) == len(SIZES) - 1
    assert f"at byte {len(raw) - 19} of {len(raw) - cut}" in found.problem


def test_damage_in_the_middle_is_located(shard):
    raw = bytearray(pathlib.Path(shard).read_bytes())
    offset = int(scan(shard).rows[3, 0])
    raw[offset] ^= 1
    pathlib.Path(shard).write_bytes(raw)
    found = scan(shard)
    assert len(found.rows) == 3 and f"damaged at byte {offset}" in found.problem


def test_damaged_data_are_noticed(shard):
    rows = scan(shard).rows
    raw = bytearray(pathlib.Path(shard).read_bytes())
    raw[int(rows[4, 0]) + 12 + 35_000] ^= 1
    pathlib.Path(shard).write_bytes(raw)
    with tfrecords.TFRecord().open(shard) as opened, pytest.raises(BadRecord, match="checksum"):
        opened.data(rows[4])
