import itertools
import json
import threading

import jax
import numpy as np
import pytest
import tensorflow as tf
import tiny_records
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipa_t5x import partitioning
from clipa_t5x.data import host_batches as host_batches_lib
from clipa_t5x.data import input_pipeline, preprocessors, record_writer, splitmix, tasks
from clipa_t5x.errors import UserError

COUNT, BATCH = 13, 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny_records.write(root, COUNT)
    return root


@pytest.fixture(scope="module")
def task(directory):
    """Images are cropped at random: a batch is the same only if its samples' seeds are."""
    return tiny_records.task("pipeline_test", directory)


@pytest.fixture(scope="module")
def pictures(directory):
    """The same without captions, which is prepared faster."""
    return tiny_records.task("pipeline_test_pictures", directory, vocabulary=None)


@pytest.fixture(scope="module")
def batches(pictures):
    """The first six batches of pictures: three epochs and a half."""
    return host_batches(tiny_records.config(pictures), range(BATCH), 0, 6)


def layout(num_devices=8, model=1):
    devices = np.array(jax.devices()[:num_devices]).reshape(1, num_devices // model, model)
    mesh = Mesh(devices, partitioning.MESH_AXES)
    return input_pipeline.BatchLayout(NamedSharding(mesh, PartitionSpec(("replica", "data"))))


LAYOUTS = [(1, 1), (8, 1), (8, 2), (8, 8)]


def host_batches(cfg, rows, first_sample, count):
    batches = host_batches_lib.train(cfg, np.asarray(rows), first_sample)
    return list(itertools.islice(batches, count))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


# Configuration.


def test_batch_spec_is_what_comes(task):
    cfg = tiny_records.config(task)
    spec = cfg.batch_spec()
    assert spec["images"] == jax.ShapeDtypeStruct((BATCH, 16, 16, 3), np.uint8)
    assert spec["text"] == jax.ShapeDtypeStruct((BATCH, 8), np.int32)
    assert spec["augment_keys"] == jax.ShapeDtypeStruct((BATCH, 2), np.uint32)
    (batch,) = host_batches(cfg, range(BATCH), 0, 1)
    for key, expected in spec.items():
        assert (batch[key].shape, batch[key].dtype) == (expected.shape, expected.dtype)


def test_batch_spec_reads_nothing():
    assert tiny_records.config("no such task").batch_spec()


@pytest.mark.parametrize("lengths, key", [
    ({"images": 16}, "text"), ({"text": 8}, "images"), ({"images": 0, "text": 8}, "images"),
    ({"images": 16, "text": -8}, "text"), ({"images": 16, "text": 8.0}, "text"),
    ({"images": "16", "text": 8}, "images"), ({}, "images"),
])  # fmt: skip
def test_unusable_feature_lengths(lengths, key):
    with pytest.raises(UserError) as caught:
        tiny_records.config("x", task_feature_lengths=lengths).batch_spec()
    message = str(caught.value)
    assert "\n" not in message
    for part in ("TASK_FEATURE_LENGTHS", str(lengths), repr(key), "positive integer"):
        assert part in message


def test_usable_feature_lengths():
    tiny_records.config("x").batch_spec()


def test_num_examples(task):
    assert input_pipeline.num_examples(tiny_records.config(task)) == COUNT
    assert input_pipeline.num_examples(tiny_records.config(task, max_examples=5)) == 5
    assert input_pipeline.num_examples(tiny_records.config(task, max_examples=500)) == COUNT


def test_vocabulary_size(task, pictures):
    assert input_pipeline.vocabulary_size(tiny_records.config(task)) == 15
    assert input_pipeline.vocabulary_size(tiny_records.config(pictures)) is None


# Layout.


@pytest.mark.parametrize("num_devices, model", LAYOUTS)
def test_one_process_prepares_every_row(num_devices, model):
    rows = layout(num_devices, model).local_rows(BATCH)
    assert rows.dtype == np.int64
    assert rows.tolist() == list(range(BATCH))


class Devices:
    """A sharding whose other devices belong to another process."""

    def __init__(self, sharding, own):
        self._sharding, self._own = sharding, own

    def addressable_devices_indices_map(self, shape):
        indices = self._sharding.devices_indices_map(shape)
        return {d: index for d, index in indices.items() if d.id in self._own}


@pytest.mark.parametrize("model, own, rows", [
    (1, [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]),
    (1, [5], [10, 11]),
    (1, [1, 6], [2, 3, 12, 13]),
    (2, [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]),
    (2, [1, 2], [0, 1, 2, 3, 4, 5, 6, 7]),
    (8, [7], list(range(16))),
])  # fmt: skip
def test_a_process_prepares_the_rows_of_its_devices(model, own, rows):
    sharding = Devices(layout(8, model).sharding, own)
    assert input_pipeline.BatchLayout(sharding).local_rows(16).tolist() == rows


@pytest.mark.parametrize("num_devices, model", LAYOUTS)
def test_to_global_is_the_hosts_data(num_devices, model):
    rng = np.random.default_rng(0)
    host_batch = {
        "images": rng.integers(0, 256, (16, 4, 4, 3)).astype(np.uint8),
        "text": rng.integers(0, 99, (16, 8)).astype(np.int32),
        "label": np.arange(16, dtype=np.int32),
        "weights": rng.random(16).astype(np.float32),
        "augment_keys": rng.integers(0, 2**32, (16, 2), np.uint32),
        "caption": np.array([b"a"] * 16, object),
        "index": np.arange(16),
    }
    where = layout(num_devices, model)
    batch = where.to_global(host_batch, 16)
    assert batch.keys() == {"images", "text", "label", "weights", "augment_keys"}
    for key, value in batch.items():
        assert value.sharding == where.sharding
        assert value.dtype == host_batch[key].dtype
        np.testing.assert_array_equal(value, host_batch[key])
        for shard in value.addressable_shards:
            np.testing.assert_array_equal(shard.data, host_batch[key][shard.index])


# Order.


def test_any_number_of_processes_sees_the_same_rows(pictures, batches):
    for rows in (range(4), range(4, 8), [1, 2, 7]):
        parts = host_batches(tiny_records.config(pictures), rows, 0, 4)
        for part, batch in zip(parts, batches, strict=False):
            assert_same(part, {key: value[list(rows)] for key, value in batch.items()})


def test_the_batch_size_does_not_change_the_order(pictures, batches):
    others = host_batches(tiny_records.config(pictures, 6), range(6), 0, 8)
    a, b = [
        {k: np.concatenate([x[k] for x in part]) for k in part[0]} for part in (batches, others)
    ]
    assert_same(a, b)
    assert a["index"].tolist() == list(range(48))


@pytest.mark.parametrize("k", [1, 5])
def test_any_step_is_as_near_as_the_first(pictures, batches, k):
    """Crops included, in the first epoch and in the fourth."""
    cfg = tiny_records.config(pictures)
    assert_same(host_batches(cfg, range(BATCH), k * BATCH, 1)[0], batches[k])


def test_seeds_change_order_and_crops(pictures):
    seeds = [0, 1]
    plain = [tiny_records.config(pictures, COUNT, shuffle=False, seed=seed) for seed in seeds]
    a, b = (host_batches(cfg, range(COUNT), 0, 1)[0] for cfg in plain)
    np.testing.assert_array_equal(a["label"], b["label"])
    assert np.all(np.any(a["images"] != b["images"], axis=(1, 2, 3)))
    cfg = tiny_records.config(pictures, COUNT, seed=1)
    c, d = host_batches(cfg, range(COUNT), 0, 2)
    assert a["label"].tolist() != c["label"].tolist() != d["label"].tolist()
    assert sorted(a["label"]) == sorted(c["label"]) == sorted(d["label"])


def test_keys_are_of_the_seed_and_the_sample_alone(pictures, batches):
    """Whatever process, start and batch size: as index by index, without a pipeline."""
    for seed in (0, 1):
        cfg = tiny_records.config(pictures, seed=seed)
        (batch,) = host_batches(cfg, [1, 2, 7], 5 * BATCH, 1)
        indices = [5 * BATCH + row for row in (1, 2, 7)]
        assert batch["index"].tolist() == indices
        seeds = tf.constant([(seed, index) for index in indices], tf.int64)
        words = splitmix.keys(seeds).numpy()
        expected = np.stack([words & np.uint64(2**32 - 1), words >> np.uint64(32)], axis=1)
        np.testing.assert_array_equal(batch["augment_keys"], expected)
        assert seed or np.array_equal(expected, batches[5]["augment_keys"][[1, 2, 7]])
    keys = np.concatenate([batch["augment_keys"] for batch in batches])
    assert len(np.unique(keys, axis=0)) == 6 * BATCH
    assert keys.dtype == np.uint32


# Training.


@pytest.fixture
def iterators():
    """Makes iterators and closes them."""
    made = []

    def make(*args, **kwargs):
        made.append(input_pipeline.TrainIterator(*args, **kwargs))
        return made[-1]

    yield make
    for iterator in made:
        iterator.close()


def test_train_iterator_goes_on_where_its_state_says(task, iterators):
    cfg = tiny_records.config(task)
    first = iterators(cfg, layout(8))
    taken = [next(first) for _ in range(2)]
    assert first.waited_seconds > 0
    state = json.loads(json.dumps(first.state()))
    assert state["next_sample"] == 2 * BATCH
    following = [next(first) for _ in range(2)]
    # Another number of devices, another mesh: the same rows.
    second = iterators(cfg, layout(8, 2), input_pipeline.resume_position(cfg, state))
    for batch in following:
        again = next(second)
        assert again.keys() == {"images", "text", "label", "augment_keys"}
        assert_same(again, batch)
    assert second.state() == first.state()
    expected = host_batches(cfg, range(BATCH), 0, 1)[0]
    assert_same(taken[0], {key: expected[key] for key in taken[0]})


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"shuffle": False}, {"split": "other"}, {"num_examples": 14}, {"num_shards": 4},
    {"shards_digest": "0123456789abcdef"}, {"window_records": 5},
])  # fmt: skip
def test_other_data_are_not_a_continuation(task, change, iterators):
    cfg = tiny_records.config(task)
    state = iterators(cfg, layout(1), first_sample=16).state()
    assert input_pipeline.resume_position(cfg, state) == 16
    with pytest.raises(UserError) as caught:
        input_pipeline.resume_position(cfg, {**state, **change})
    message = str(caught.value)
    ((key, value),) = change.items()
    assert f"({key} {value} -> {state[key]})" in message
    assert "INITIAL_CHECKPOINT_PATH" in message and "ACCEPT_DATA_CHANGES" in message
    assert "\n" not in message
    accepting = tiny_records.config(task, accept_changes=True)
    assert input_pipeline.resume_position(accepting, {**state, **change}) == 16


def test_a_larger_batch_continues_at_the_same_sample(pictures, batches, iterators):
    smaller, larger = tiny_records.config(pictures, 4), tiny_records.config(pictures, 8)
    first = iterators(smaller, layout(1))
    for _ in range(4):
        next(first)
    resumed = iterators(larger, layout(1), input_pipeline.resume_position(larger, first.state()))
    np.testing.assert_array_equal(next(resumed)["images"], batches[2]["images"])


def names():
    return [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("taken", [0, 1])
def test_close_ends_the_thread(pictures, taken):
    before = names().count("train-data")
    iterator = input_pipeline.TrainIterator(tiny_records.config(pictures), layout(1), prefetch=1)
    for _ in range(taken):
        next(iterator)
    assert names().count("train-data") == before + 1
    iterator.close()
    assert names().count("train-data") == before


def spoil(tmp_path, bad, num_shards=1):
    """Shards of which the records `bad` are no images."""
    records = tiny_records.records(COUNT)
    for i in bad:
        records[i] = record_writer.serialize({"jpg": b"no image", "txt": "a", "label": 0})
    record_writer.write_shards(tmp_path / "train", records, num_shards)
    return tiny_records.task("pipeline_test_broken", tmp_path, vocabulary=None)


def test_statistics_tell_of_bad_records_and_of_speed(tmp_path, iterators):
    iterator = iterators(tiny_records.config(spoil(tmp_path, [3]), 4), layout(1))
    for _ in range(20):
        batch = next(iterator)
        assert batch["images"].shape == (4, 16, 16, 3)
    statistics = iterator.statistics()
    assert statistics["data/bad/not_an_image"] >= 1
    assert statistics["data/supplied_per_core"] > 0


def test_too_many_bad_records_end_the_iteration_with_the_reasons(tmp_path, iterators):
    cfg = tiny_records.config(spoil(tmp_path, range(0, COUNT, 2)), 64, max_bad_fraction=0.3)
    iterator = iterators(cfg, layout(1))
    for _ in range(2):  # whoever asks again hears it again
        with pytest.raises(UserError, match="records are bad .*not an image.*MAX_BAD_FRACTION"):
            for _ in range(100):
                next(iterator)


def test_an_error_of_the_source_is_raised(directory, iterators, monkeypatch):
    name = tiny_records.task("pipeline_test_failing", directory, vocabulary=None)
    monkeypatch.setattr(tasks.get_source(name), "examples_at", lambda *_, **__: 1 / 0)
    iterator = iterators(tiny_records.config(name), layout(1))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            next(iterator)


# Evaluation.


@pytest.mark.parametrize("num_devices, model, max_examples", [
    (8, 1, None), (8, 2, 5), (1, 1, 8),
])  # fmt: skip
def test_padding_is_marked(pictures, num_devices, model, max_examples):
    cfg = tiny_records.config(pictures, shuffle=False, max_examples=max_examples)
    count = max_examples or COUNT
    batches = list(input_pipeline.eval_batches(cfg, layout(num_devices, model)))
    assert len(batches) == -(-count // BATCH)
    weights = np.concatenate([host["weights"] for host, _ in batches])
    assert weights.dtype == np.float32
    assert weights.tolist() == [1.0] * count + [0.0] * (len(batches) * BATCH - count)
    indices = np.concatenate([host["index"] for host, _ in batches])
    assert indices.tolist() == [min(i, count - 1) for i in range(len(batches) * BATCH)]
    for host, batch in batches:
        assert batch.keys() == {"images", "label", "weights"}
        assert_same(batch, {key: host[key] for key in batch})


def test_an_evaluation_sees_each_example_once(directory):
    name = tiny_records.task("pipeline_test_eval", directory, preprocessors.squash, vocabulary=None)
    cfg = tiny_records.config(name, 5, shuffle=False)
    seen = [host["images"][host["weights"] == 1] for host, _ in
            input_pipeline.eval_batches(cfg, layout(1))]  # fmt: skip
    means = np.concatenate(seen).mean(axis=(1, 2))[:, 0]
    order = [*range(0, COUNT, 3), *range(1, COUNT, 3), *range(2, COUNT, 3)]
    expected = [tiny_records.picture(i)[..., 0].mean() for i in order]
    np.testing.assert_allclose(means, expected, atol=3)


def test_bad_records_do_not_count_in_an_evaluation(tmp_path):
    cfg = tiny_records.config(spoil(tmp_path, [3, 12]), 5, shuffle=False)
    weights = np.concatenate([host["weights"] for host, _ in
                              input_pipeline.eval_batches(cfg, layout(1))])  # fmt: skip
    assert np.flatnonzero(weights == 0).tolist() == [3, 12, 13, 14]
