import hashlib
import io

import numpy as np
import pytest
import tensorflow as tf
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
