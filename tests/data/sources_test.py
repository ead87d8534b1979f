import functools
import io
import re

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_records
import tiny_tars

from clipa_t5x.data import image_folders, record_writer, sources, tfrecords, webdataset
from clipa_t5x.errors import UserError

COUNT = 13
ALL = sources.RecordFields("jpg", {"txt": 1.0}, "label")


def make(directory, fields=ALL, **kwargs):
    return sources.ImageTextSource(str(directory), tfrecords.TFRecord(), fields, **kwargs)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny_records.write(root, COUNT)
    record_writer.write_shards(root / "validation", tiny_records.records(2), 1)
    return root


@pytest.fixture(scope="module")
def source(directory):
    return make(directory)


@pytest.fixture(scope="module")
def stored(source):
    """Captions and images in the order of the shards, as TensorFlow reads them."""
    records = tf.data.TFRecordDataset(source.list_shards("train"))
    features = [tf.train.Example.FromString(r.numpy()).features.feature for r in records]
    return [(f["jpg"].bytes_list.value[0], f["txt"].bytes_list.value[0]) for f in features]


def at(source, indices, split="train", **kwargs):
    kwargs = {"shuffle": True, "seed": 0, **kwargs}
    return source.examples_at(split, np.asarray(list(indices), np.int64), **kwargs)


def pairs(examples):
    return list(zip(examples["encoded_image"], examples["caption"], strict=True))


def listed(dataset):
    return list(dataset.as_numpy_iterator())


def test_examples_are_the_records_fields(source, stored):
    examples = at(source, range(2 * COUNT), shuffle=False)
    assert pairs(examples) == stored * 2
    assert examples["index"].tolist() == list(range(2 * COUNT))
    assert examples["image_size"].tolist() == [[24, 32]] * 2 * COUNT
    assert examples["valid"].all() and examples["label"].dtype == np.int32
    assert sorted(examples) == sorted(source.feature_names())


def test_features_are_those_that_were_asked_for(directory):
    names = make(directory, sources.RecordFields()).feature_names()
    assert {"caption", "label"}.isdisjoint(names) and "encoded_image" in names


def test_epochs_are_permutations(source, stored):
    found = pairs(at(source, range(3 * COUNT)))
    epochs = [found[i : i + COUNT] for i in range(0, len(found), COUNT)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(stored) and epoch != stored
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("window_bytes", [sources.DEFAULT_WINDOW_BYTES, 4000])
def test_an_example_is_a_function_of_its_index_alone(directory, window_bytes):
    source = make(directory, window_bytes=window_bytes)
    whole = at(source, range(50), seed=7)
    for chosen in ([3], [49, 0, 17], range(20, 40)):
        part = at(source, chosen, seed=7)
        for key, value in part.items():
            np.testing.assert_array_equal(value, whole[key][list(chosen)])


def test_a_small_window_takes_shard_after_shard(directory):
    source = make(directory, window_bytes=4000)
    assert 1 <= source.identity("train")["window_records"] < COUNT
    captions = at(source, range(COUNT))["caption"]
    assert sorted(captions) == sorted(tiny_records.caption(i).encode() for i in range(COUNT))


def test_samples_have_seeds_of_their_own(source):
    seeds = np.concatenate([at(source, range(60), seed=seed)["seed"] for seed in (0, 1)])
    assert len(np.unique(seeds, axis=0)) == 120


def test_get_dataset_is_the_same_sequence(source):
    expected = at(source, range(3 * COUNT), seed=5)
    examples = listed(source.get_dataset("train", shuffle=True, seed=5, num_epochs=3))
    assert len(examples) == 3 * COUNT
    for key, value in expected.items():
        np.testing.assert_array_equal(np.array([e[key] for e in examples], value.dtype), value)


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_get_dataset_ends_after_its_epochs(source, num_epochs):
    examples = listed(source.get_dataset("train", shuffle=False, num_epochs=num_epochs))
    assert [e["index"] for e in examples] == list(range(COUNT * num_epochs))


def test_get_dataset_without_number_of_epochs_goes_on(source):
    examples = source.get_dataset("train", shuffle=False, num_epochs=None).take(200)
    assert [e["index"] for e in listed(examples)] == list(range(200))


@pytest.mark.parametrize("num_shards", [1, 2, 20])
def test_shards_of_the_job_are_disjoint_and_complete(source, num_shards):
    parts = [
        listed(source.get_dataset("train", True, 3, seqio.ShardInfo(i, num_shards), num_epochs=2))
        for i in range(num_shards)
    ]
    found = {int(e["index"]): e["encoded_image"] for part in parts for e in part}
    assert sorted(found) == list(range(2 * COUNT))
    whole = at(source, range(2 * COUNT), seed=3)["encoded_image"].tolist()
    assert [found[i] for i in range(2 * COUNT)] == whole


def test_splits_are_patterns(directory):
    assert make(directory).num_input_examples("validation") == 2
    part = make(directory, splits={"half": "train/0000[01].tfrecord"})
    assert part.splits == ("half",)
    assert part.num_input_examples("half") == 5 + 4


def test_the_index_lies_where_the_user_says(directory, tmp_path):
    source = make(directory, index_dir=str(tmp_path / "there"))
    assert source.num_input_examples("train") == COUNT
    assert make(directory, index_dir=str(tmp_path / "there")).num_input_examples("validation") == 2
    names = sorted(p.name for p in (tmp_path / "there").iterdir())
    assert [re.sub("-[0-9a-f]{8}", "", name) for name in names] == [
        "train.json", "train.npy", "validation.json", "validation.npy",
    ]  # fmt: skip


def test_nothing_is_read_before_it_is_needed():
    assert set(make("/nowhere/at/all").splits) == {"train", "validation"}


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("build, parts", [
    (lambda d: (d / "absent", None, "train"), ["does not exist", "DATA_DIR"]),
    (lambda d: (d, {"train": "none/*"}, "train"), ["it holds", "train", "none/*", "DATA_DIR"]),
    (lambda d: (d, None, "test"), ["split 'test'", "['train', 'validation']"]),
])  # fmt: skip
def test_what_is_not_there_is_named(directory, build, parts):
    path, splits, split = build(directory)
    message = refusal(lambda: make(path, splits=splits).num_input_examples(split))
    for part in [str(path), *parts]:
        assert part in message


def test_a_source_is_positional(source):
    assert isinstance(source, sources.PositionalSource)
    other = seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"])
    assert not isinstance(other, sources.PositionalSource)


def test_misspelt_fields_are_refused_before_anything_is_read(directory):
    for fields, name in ((sources.RecordFields("jpg", {"caption": 1.0}), "caption"),
                         (sources.RecordFields("png;webp"), "png;webp"),
                         (sources.RecordFields(label="class"), "class")):  # fmt: skip
        message = refusal(functools.partial(make(directory, fields).index, "train"))
        assert f"no field {name!r}; their fields are height, jpg, key, label, txt, width" in message
    make(directory, sources.RecordFields("png;jpg")).index("train")


@pytest.mark.parametrize("content, part", [
    ([b"\xffno example"] * 3, "no tf.train.Example"), ([], "hold no record"),
])  # fmt: skip
def test_data_of_another_kind_are_refused(tmp_path, content, part):
    (tmp_path / "train").mkdir()
    with tf.io.TFRecordWriter(str(tmp_path / "train" / "00000.tfrecord")) as writer:
        for record in content:
            writer.write(record)
    assert part in refusal(lambda: make(tmp_path).index("train"))


# Bad records.

BAD = {2: {"jpg": b""}, 5: {"jpg": b"\xff\xd8\xffrubbish"}, 7: {"txt": " "}}
REASONS = {"bad/empty image": 1, "bad/not an image": 1, "bad/empty caption": 1}


@pytest.fixture
def spoilt(tmp_path):
    """A split of 13 records in one shard, three of them bad."""
    records = tiny_records.records(COUNT)
    for number, features in BAD.items():
        records[number] = tiny_records.records(number + 1, **features)[number]
    record_writer.write_shards(tmp_path / "train", records, 1)
    return make(tmp_path)


def test_others_stand_in_for_bad_records(spoilt):
    examples = at(spoilt, range(COUNT))
    assert examples["valid"].all()
    good = {tiny_records.caption(i).encode() for i in range(COUNT) if i not in BAD}
    assert set(examples["caption"]) <= good
    assert all(image.startswith(b"\xff\xd8") for image in examples["encoded_image"])
    counts = spoilt.records.counts()
    assert counts.keys() == REASONS.keys() and min(counts.values()) >= 1


def test_stand_ins_are_functions_of_the_index_alone(spoilt):
    whole = at(spoilt, range(40), seed=3)
    for chosen in ([0], [39, 7], range(10, 30)):
        part = at(spoilt, chosen, seed=3)
        for key, value in part.items():
            np.testing.assert_array_equal(value, whole[key][list(chosen)])


def test_an_evaluation_marks_what_is_bad(spoilt):
    examples = at(spoilt, range(COUNT), shuffle=False, replace_bad=False)
    assert np.flatnonzero(~examples["valid"]).tolist() == sorted(BAD)
    assert spoilt.records.counts() == REASONS
    place = spoilt.where("train", 5, shuffle=False, seed=0)
    assert place.startswith("5 of ") and place.endswith("00000.tfrecord, key '00005'")


def test_a_split_of_bad_records_is_refused(tmp_path):
    record_writer.write_shards(tmp_path / "train", tiny_records.records(3, jpg=b"x"), 1)
    source = make(tmp_path)
    message = refusal(lambda: at(source, range(4)))
    assert f"{4 * sources.MAX_ATTEMPTS} of {4 * sources.MAX_ATTEMPTS} that were read" in message
    assert "not an image" in message


def test_the_share_of_bad_records_is_of_those_read(tmp_path):
    """Stand-ins are read, too: of half bad records, half of all that is read is bad."""
    records = [
        tiny_records.records(i + 1, **({"jpg": b"x"} if i % 2 else {}))[i] for i in range(40)
    ]
    record_writer.write_shards(tmp_path / "train", records, 1)
    source = make(tmp_path)
    at(source, range(2000))
    source.records.check(0.55)
    assert "MAX_BAD_FRACTION 45.0%" in refusal(lambda: source.records.check(0.45))


def test_damaged_shards_are_counted(tmp_path):
    record_writer.write_shards(tmp_path / "train", tiny_records.records(COUNT), 2)
    path = tmp_path / "train" / "00001.tfrecord"
    path.write_bytes(path.read_bytes()[:-10])
    source = make(tmp_path)
    assert source.num_input_examples("train") == COUNT - 1
    assert source.records.counts() == {"bad/damaged shard": 1}


@pytest.mark.parametrize("label, reason", [
    (2**31, "label out of range"), ("seven", "label is no number"), (b"7", None),
])  # fmt: skip
def test_labels_are_small_numbers(tmp_path, label, reason):
    record_writer.write_shards(tmp_path / "train", tiny_records.records(2, label=label), 1)
    source = make(tmp_path)
    found = at(source, [0], shuffle=False, replace_bad=False)
    assert source.records.counts() == ({f"bad/{reason}": 1} if reason else {})
    assert found["label"].tolist() == ([-1] if reason else [7])


def multi_hot(length):
    file = io.BytesIO()
    np.save(file, np.ones(length, np.int8))
    return {"png": tiny_tars.image(0, 4, 4, "PNG"), "npy": file.getvalue()}


def test_classes_are_counted_where_the_data_tell(tmp_path, source):
    assert source.num_classes("train") is None
    for name in ("b", "a", "c"):
        (tmp_path / "folders" / "val" / name).mkdir(parents=True)
        (tmp_path / "folders" / "val" / name / "1.png").write_bytes(multi_hot(1)["png"])
    labelled = sources.RecordFields("jpg", {}, "label")
    for fields, count in ((labelled, 3), (sources.RecordFields("jpg"), None)):
        folders = sources.ImageTextSource(
            str(tmp_path / "folders"), image_folders.ImageFolder(), fields, {"val": "val/*"}
        )
        assert folders.num_classes("val") == count
    arrays = sources.RecordFields("png", {}, None, "npy")
    for lengths, count in (((7, 7), 7), ((7, 6), None)):
        root = tmp_path / str(lengths)
        tiny_tars.write(root / "train" / "0.tar", {str(i): multi_hot(n) for i, n in
                                                   enumerate(lengths)})  # fmt: skip
        tars = sources.ImageTextSource(str(root), webdataset.WebDataset(), arrays)
        if count:
            assert tars.num_classes("train") == count
        else:
            with pytest.raises(UserError, match="arrays of 6 and 7 classes in field 'npy'"):
                tars.num_classes("train")
