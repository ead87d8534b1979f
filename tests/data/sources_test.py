import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_records

from clipa_t5x.data import record_writer, sources
from clipa_t5x.errors import UserError

COUNT = 13


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny_records.write(root, COUNT)
    record_writer.write_shards(root / "validation", [b"x"], 1)
    return root


@pytest.fixture(scope="module")
def source(directory):
    return sources.TFRecordSource(str(directory))


@pytest.fixture(scope="module")
def stored(source):
    """The split's records in the order of their shards, as TensorFlow reads them."""
    return [r.numpy() for r in tf.data.TFRecordDataset(source.list_shards("train"))]


def at(source, indices, *, split="train", **kwargs):
    kwargs = {"shuffle": True, "seed": 0, **kwargs}
    examples = source.examples_at(split, tf.constant(indices, tf.int64), **kwargs)
    return {key: value.numpy() for key, value in examples.items()}


def listed(dataset):
    return list(dataset.as_numpy_iterator())


def test_unshuffled_order_is_the_shards(source, stored):
    examples = at(source, range(2 * COUNT), shuffle=False)
    assert examples["record"].tolist() == stored * 2
    assert examples["index"].tolist() == list(range(2 * COUNT))


@pytest.mark.parametrize("seed", [0, 1, 2**40, 2**63 - 1, -3])
def test_every_epoch_is_another_permutation(source, stored, seed):
    records = at(source, range(4 * COUNT), seed=seed)["record"].tolist()
    epochs = [records[i : i + COUNT] for i in range(0, len(records), COUNT)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(stored)
    for a, b in itertools.combinations([*epochs, stored], 2):
        assert a != b


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 255, 257, 1000])
def test_permutations_of_any_length(tmp_path, count):
    record_writer.write_shards(tmp_path / "train", [b"%d" % i for i in range(count)], 2)
    source = sources.TFRecordSource(str(tmp_path))
    records = at(source, range(5 * count))["record"].astype(int).reshape(5, count)
    np.testing.assert_array_equal(np.sort(records), np.tile(np.arange(count), (5, 1)))


def test_permutations_look_random(tmp_path):
    """Every record comes at every place about as often, after every other about as often."""
    count, epochs = 8, 500
    record_writer.write_shards(tmp_path / "train", [b"%d" % i for i in range(count)], 1)
    source = sources.TFRecordSource(str(tmp_path))
    records = at(source, range(count * epochs))["record"].astype(int).reshape(epochs, count)
    for position in range(count):
        found = np.bincount(records[:, position], minlength=count)
        # Binomial(500, 1/8) has mean 62.5 and deviation 7.4: five of them.
        assert np.abs(found - epochs / count).max() < 37
    pairs = np.zeros((count, count))
    np.add.at(pairs, (records[:, :-1].ravel(), records[:, 1:].ravel()), 1)
    assert pairs[~np.eye(count, dtype=bool)].min() > 0.5 * pairs.sum() / (count * (count - 1))


def test_neighbours_part(tmp_path):
    """No step from one record to the next is much more frequent than a random order's."""
    count = 1000
    record_writer.write_shards(tmp_path / "train", [b"%d" % i for i in range(count)], 1)
    source = sources.TFRecordSource(str(tmp_path))
    records = at(source, range(8 * count))["record"].astype(int).reshape(8, count)
    frequency = np.unique(np.diff(records), return_counts=True)[1]
    assert frequency.max() < 30  # 8 expected of the commonest
    for a, b in itertools.combinations(records, 2):
        assert np.sum(a == b) < 10  # 1 expected


def test_seeds_differ(source):
    seeds = [0, 1, 2, 3, -1, 2**32, 2**40]
    orders = [at(source, range(COUNT), seed=seed)["record"].tolist() for seed in seeds]
    for a, b in itertools.combinations(orders, 2):
        assert a != b


def test_an_example_is_a_function_of_its_index_alone(source):
    whole = at(source, range(50), seed=7)
    for chosen in ([3], [49, 0, 17], range(20, 40)):
        part = at(source, chosen, seed=7)
        for key, value in part.items():
            np.testing.assert_array_equal(value, whole[key][list(chosen)])


def test_samples_have_seeds_of_their_own(source):
    seeds = np.concatenate([at(source, range(60), seed=seed)["seed"] for seed in (0, 1)])
    assert len(np.unique(seeds, axis=0)) == 120


def test_far_positions_are_as_near_as_the_first(source, stored):
    first = 10**15 // COUNT * COUNT
    records = at(source, range(first, first + COUNT))["record"].tolist()
    assert sorted(records) == sorted(stored)


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
    examples = source.get_dataset("train", shuffle=False, num_epochs=None).take(500)
    assert [e["index"] for e in listed(examples)] == list(range(500))


@pytest.mark.parametrize("num_shards", [1, 2, 20])
def test_shards_of_the_job_are_disjoint_and_complete(source, num_shards):
    parts = [
        listed(source.get_dataset("train", True, 3, seqio.ShardInfo(i, num_shards), num_epochs=2))
        for i in range(num_shards)
    ]
    indices = [int(e["index"]) for part in parts for e in part]
    assert sorted(indices) == list(range(2 * COUNT))
    records = {int(e["index"]): e["record"] for part in parts for e in part}
    whole = at(source, range(2 * COUNT), seed=3)["record"].tolist()
    assert [records[i] for i in range(2 * COUNT)] == whole


def test_splits_are_patterns(directory):
    assert sources.TFRecordSource(str(directory)).num_input_examples("validation") == 1
    part = sources.TFRecordSource(str(directory), {"half": "train/0000[01].tfrecord"})
    assert part.splits == ("half",)
    assert part.num_input_examples("half") == 5 + 4
    assert [p.rsplit("/", 1)[1] for p in part.list_shards("half")] == [
        "00000.tfrecord",
        "00001.tfrecord",
    ]


def test_the_index_lies_where_the_user_says(directory, tmp_path):
    source = sources.TFRecordSource(str(directory), index_dir=str(tmp_path / "there"))
    assert source.num_input_examples("train") == COUNT
    assert {p.name for p in (tmp_path / "there").iterdir()} == {"train.json", "train.npy"}


def test_nothing_is_read_before_it_is_needed():
    source = sources.TFRecordSource("/nowhere/at/all")
    assert set(source.splits) == {"train", "validation"}


@pytest.mark.parametrize("make, parts", [
    (lambda d: (d / "absent", None, "train"), ["does not exist", "DATA_DIR"]),
    (lambda d: (d, {"train": "nothing/*"}, "train"), ["has no shards", "nothing/*", "DATA_DIR"]),
    (lambda d: (d, None, "test"), ["split 'test'", "['train', 'validation']"]),
])  # fmt: skip
def test_what_is_not_there_is_named(directory, make, parts):
    path, splits, split = make(directory)
    source = sources.TFRecordSource(str(path), splits)
    with pytest.raises(UserError) as caught:
        source.num_input_examples(split)
    message = str(caught.value)
    assert "\n" not in message
    for part in [str(path), *parts]:
        assert part in message


def test_a_tfrecord_source_is_positional(source):
    assert isinstance(source, sources.PositionalSource)
    other = seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"])
    assert not isinstance(other, sources.PositionalSource)


def test_misspelt_fields_are_refused_before_anything_is_read(tmp_path):
    tiny_records.write(tmp_path)
    sources.TFRecordSource(str(tmp_path), fields=["jpg", "txt"]).index("train")
    source = sources.TFRecordSource(str(tmp_path), fields=["jpg", "caption"])
    with pytest.raises(UserError, match="no field 'caption'; their fields are .*jpg.*txt"):
        source.index("train")


def test_records_of_another_kind_are_refused(tmp_path):
    record_writer.write_shards(tmp_path / "train", [b"\xffno example"] * 3, 1)
    with pytest.raises(UserError, match="no tf.train.Example"):
        sources.TFRecordSource(str(tmp_path), fields=["jpg"]).index("train")
