import hashlib
import io

import numpy as np
import pytest
import tensorflow as tf
from array_record.python import array_record_module
from PIL import Image

from clipa_t5x.data import record_writer


def read(path):
    return [record.numpy() for record in tf.data.TFRecordDataset(str(path))]


def test_serialize_round_trips():
    data = record_writer.serialize({"jpg": b"\xff\xd8", "txt": "été", "label": 7, "width": -1})
    features = tf.train.Example.FromString(data).features.feature
    assert features["jpg"].bytes_list.value == [b"\xff\xd8"]
    assert features["txt"].bytes_list.value == ["été".encode()]
    assert features["label"].int64_list.value == [7]
    assert features["width"].int64_list.value == [-1]
    assert len(features) == 4


def test_serialize_ignores_the_order_of_features():
    features = {f"feature{i}": i for i in range(50)}
    backwards = dict(reversed(features.items()))
    assert record_writer.serialize(features) == record_writer.serialize(backwards)


def test_image_features_hold_the_image():
    # A smooth colour ramp, wider than high: JPEG of quality 95 is off by little.
    ramp = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (16, 1))
    image = np.stack([ramp, np.full_like(ramp, 90), 255 - ramp], axis=-1)
    features = record_writer.image_features("k", image, "a ramp", {"label": 3})
    assert (features["width"], features["height"], features["label"]) == (24, 16, 3)
    decoded = Image.open(io.BytesIO(features["jpg"]))
    assert (decoded.format, decoded.mode, decoded.size) == ("JPEG", "RGB", (24, 16))
    assert np.abs(np.asarray(decoded).astype(int) - image).mean() < 3


def test_shards_are_dealt_in_turn(tmp_path):
    records = [f"record {i}".encode() for i in range(10)]
    shards = record_writer.write_shards(tmp_path / "train", iter(records), 4)
    assert [s.file for s in shards] == [f"{i:05d}.tfrecord" for i in range(4)]
    assert [s.records for s in shards] == [3, 3, 2, 2]
    for i, shard in enumerate(shards):
        path = tmp_path / "train" / shard.file
        assert read(path) == records[i::4]
        assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("num_records", [0, 1, 2])
def test_no_shard_is_empty(tmp_path, num_records):
    shards = record_writer.write_shards(tmp_path, [b"x"] * num_records, 3)
    assert [s.records for s in shards] == [1] * num_records
    assert sorted(p.name for p in tmp_path.iterdir()) == [s.file for s in shards]


@pytest.mark.parametrize(
    "features",
    [
        {
            "jpg": b"\xff" * 300,
            "txt": "\u00e9t\u00e9",
            "empty": b"",
            "\u00e9": 1,
            "z": 0,
            "a b": -1,
        },
        {"txt": ["a", b"b", "\u00e7"], "n": [0, 1, 127, 128, 2**40, -(2**63), 2**63 - 1]},
    ],
)
def test_bytes_are_tensorflows(features):
    example = tf.train.Example()
    for name, value in features.items():
        for v in value if isinstance(value, list) else [value]:
            feature = example.features.feature[name]
            if isinstance(v, int):
                feature.int64_list.value.append(v)
            else:
                feature.bytes_list.value.append(v.encode() if isinstance(v, str) else v)
    expected = example.SerializeToString(deterministic=True)
    assert record_writer.serialize(features) == expected


@pytest.mark.parametrize("name", record_writer.FILES)
def test_files_hold_the_records(tmp_path, name):
    records = [b"", b"x", b"y" * 100_000, *(b"%d" % i for i in range(500))]
    paths = [tmp_path / f"{i}.{name}" for i in range(2)]
    for path in paths:
        file = record_writer.FILES[name](str(path))
        for record in records:
            file.write(record)
        file.close()
        file.close()
    found = (
        read(paths[0])
        if name == "tfrecord"
        else array_record_module.ArrayRecordReader(str(paths[0])).read_all()
    )
    assert found == records
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("name", record_writer.FILES)
@pytest.mark.parametrize("path", ["/dev/full", "/nowhere/x"])
def test_what_the_disk_refuses_is_an_os_error(name, path):
    with pytest.raises(OSError, match="No space left|No such file"):
        file = record_writer.FILES[name](path)
        for _ in range(200):
            file.write(b"x" * 10_000)
        file.close()
