import json
import shutil

import pytest
import tensorflow as tf

from clipa_t5x.data import manifests, record_index, record_writer, tfrecords
from clipa_t5x.errors import UserError


def write_split(folder, split, counts):
    folder.joinpath(split).mkdir(parents=True)
    shards = []
    for number, count in enumerate(counts):
        path = folder / split / f"{number:05d}.tfrecord"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for i in range(count):
                writer.write(record_writer.serialize({"key": f"{number} {i}"}))
        shards.append({
            "file": path.name,
            "records": count,
            "bytes": path.stat().st_size,
            "sha256": record_writer.sha256(path),
        })  # fmt: skip
    return {"records": sum(counts), "shards": shards}


@pytest.fixture
def data_dir(tmp_path):
    """Two splits and their manifest."""
    splits = {
        "train": write_split(tmp_path, "train", [3, 4, 2]),
        "validation": write_split(tmp_path, "validation", [2]),
    }
    manifests.write(tmp_path, {"generator": manifests.GENERATOR, "splits": splits})
    return tmp_path


def check(data_dir, pattern="train/*.tfrecord"):
    shards = sorted(str(path) for path in data_dir.glob(pattern))
    index = record_index.load(shards, str(data_dir / "index"), tfrecords.TFRecord())
    return manifests.check(str(data_dir), index)


def change(data_dir, **facts):
    """Has the manifest say something else of the second shard."""
    manifest = manifests.read(data_dir)
    manifest["splits"]["train"]["shards"][1].update(facts)
    manifests.write(data_dir, manifest)


def test_what_agrees_is_counted(data_dir):
    assert check(data_dir) == "3 shards are as manifest.json says (records, bytes)"
    assert check(data_dir, "*/*.tfrecord").startswith("4 shards")
    # A pattern may leave out what is there.
    assert check(data_dir, "train/00001*").startswith("1 shards")


def test_no_manifest_is_nothing_to_compare(data_dir):
    for content in (None, "{", "[]", "[" * 100_000, '{"generator": "another"}'):
        (data_dir / "manifest.json").unlink()
        if content is not None:
            (data_dir / "manifest.json").write_text(content)
        assert check(data_dir) == ""
        (data_dir / "manifest.json").touch()


@pytest.mark.parametrize(
    "splits",
    [
        *(None, [], {"train": None}, {"train": {}}, {"train": {"shards": {}}}),
        *({"train": {"shards": [shard]}} for shard in (None, 1, {}, {"file": "a"})),
        {"train": {"shards": [{"file": ["a"], "records": 1}]}},
        {"train": {"shards": [{"file": "a", "records": "1"}]}},
        {"train": {"shards": [{"file": "a", "records": 1, "sha256": 7}]}},
    ],
)
def test_a_damaged_manifest_is_told(data_dir, splits):
    content = {"generator": manifests.GENERATOR, "splits": splits}
    (data_dir / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="manifest.json does not say of every split") as caught:
        check(data_dir)
    assert "\n" not in str(caught.value)


def test_a_split_that_the_manifest_does_not_name(data_dir):
    shutil.copytree(data_dir / "train", data_dir / "other")
    assert check(data_dir, "other/*") == ""


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"records": 5}, "00001.tfrecord has 4 records, manifest.json says 5"),
        ({"bytes": 5}, r"00001.tfrecord has \d+ bytes, manifest.json says 5"),
    ],
)
def test_a_shard_that_disagrees_is_named(data_dir, facts, message):
    change(data_dir, **facts)
    with pytest.raises(UserError, match=message) as error:
        check(data_dir)
    assert str(data_dir / "train") in str(error.value) and "\n" not in str(error.value)


def test_a_shard_that_was_cut_off_is_named(data_dir):
    path = data_dir / "train" / "00002.tfrecord"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="00002.tfrecord has"):
        check(data_dir)


def test_missing_and_additional_shards_are_named(data_dir):
    shutil.copy(data_dir / "train" / "00000.tfrecord", data_dir / "train" / "00003.tfrecord")
    with pytest.raises(UserError, match="00003.tfrecord is not in manifest.json, which names 3"):
        check(data_dir)
    (data_dir / "train" / "00003.tfrecord").unlink()
    (data_dir / "train" / "00000.tfrecord").unlink()
    with pytest.raises(UserError, match="00000.tfrecord, 3 records by manifest.json, is missing"):
        check(data_dir)


def test_manifests_without_sizes_are_compared_by_records(data_dir):
    manifest = manifests.read(data_dir)
    for shard in manifest["splits"]["train"]["shards"]:
        del shard["bytes"]
    manifests.write(data_dir, manifest)
    assert check(data_dir)


def test_checksums(data_dir):
    shards = [str(path) for path in sorted((data_dir / "train").iterdir())]
    assert manifests.check_sums(shards) == "3 checksums agree"
    change(data_dir, sha256="0")
    with pytest.raises(UserError, match="00001.tfrecord has another SHA-256"):
        manifests.check_sums(shards)


def test_difference_names_what_changed():
    before, after = {"a": 1, "b": 2, "c": [1]}, {"a": 1, "b": None, "c": [1], "d": "x"}
    assert manifests.difference(before, after) == "b 2 -> None, d None -> x"
    assert manifests.spell(before) == "a=1 b=2 c=[1]"
    assert manifests.spell(None) == "arguments unknown"


def test_json_is_written_in_one_move(tmp_path):
    path = tmp_path / "x.json"
    manifests.write_json(str(path), {"a": 1})
    manifests.write_json(str(path), {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
