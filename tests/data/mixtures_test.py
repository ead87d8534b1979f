import numpy as np
import pytest
import seqio
import tiny_records

from clipa_t5x.data import (
    host_batches,
    input_pipeline,
    mixtures,
    preprocessors,
    record_writer,
    sources,
    tasks,
)
from clipa_t5x.errors import UserError

COUNTS = {"mix_a": 13, "mix_b": 7, "mix_c": 5}
RATES = {"mix_a": 0.7, "mix_b": 0.25, "mix_c": 0.05}


@pytest.fixture(scope="module")
def data_dirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return {name: tiny_records.write(root / name, n) for name, n in COUNTS.items()}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tiny_records.vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture
def mixture(data_dirs, vocabulary):
    for name, path in data_dirs.items():
        tiny_records.task(name, path, vocabulary=vocabulary)
    return tasks.mixture("mix", RATES)


def examples(name, indices, seed=3, **kwargs):
    kwargs = {"shuffle": True, **kwargs}
    indices = np.asarray(indices, np.int64)
    return tasks.get_source(name).examples_at("train", indices, seed=seed, **kwargs)


@pytest.mark.parametrize("rates, cycle, expected", [
    ({"a": 0.7, "b": 0.3}, 1000, [700, 300]),
    ({"a": 7, "b": 3}, 1000, [700, 300]),
    ({"a": 1, "b": 1, "c": 1}, 1000, [334, 333, 333]),
    ({"a": 0.6, "b": 0.3, "c": 0.1}, 10, [6, 3, 1]),
    ({"a": 0.55, "b": 0.26, "c": 0.19}, 10, [5, 3, 2]),  # remainders .5, .6, .9
    ({"a": 5}, 1000, [1000]),
])  # fmt: skip
def test_shares_are_largest_remainders(rates, cycle, expected):
    assert list(mixtures.shares(rates, cycle).values()) == expected


@pytest.mark.parametrize("rate, said", [
    (0, "above 0"), (-1, "above 0"), (float("nan"), "above 0"), (float("inf"), "above 0"),
    ("1", "above 0"), (True, "above 0"), (1e-4, "less than one sample in 1000"),
])  # fmt: skip
def test_rates_out_of_range_are_refused(rate, said):
    with pytest.raises(UserError, match=f"rate of 'b' .*{said}"):
        mixtures.shares({"a": 1.0, "b": rate})


def test_every_cycle_has_the_exact_shares(mixture):
    source = tasks.get_source(mixture)
    components, _ = source.places(np.arange(5 * mixtures.CYCLE), 3)
    cycles = components.reshape(5, mixtures.CYCLE)
    for cycle in cycles:
        assert np.bincount(cycle).tolist() == [700, 250, 50]
    assert not (cycles[0] == cycles[1]).all()
    # No component waits long for its turn: of 50 in 1000, gaps above 200 are a chance in 10^3.
    assert np.diff(np.flatnonzero(components == 2)).max() < 250


def test_components_skip_nothing(mixture):
    source = tasks.get_source(mixture)
    components, own = source.places(np.arange(3 * mixtures.CYCLE), 3)
    for number in range(3):
        np.testing.assert_array_equal(
            own[components == number], np.arange((components == number).sum())
        )


def test_places_depend_on_index_and_seed_alone(mixture):
    source = tasks.get_source(mixture)
    whole = source.places(np.arange(3000), 3)
    some = np.asarray([2999, 0, 1500, 999, 1000])
    for found, wanted in zip(source.places(some, 3), whole, strict=True):
        np.testing.assert_array_equal(found, wanted[some])
    assert not (source.places(np.arange(1000), 4)[0] == whole[0][:1000]).all()
    components, own = source.places(np.asarray([10**15 + 5]), 3)
    assert own[0] // [700, 250, 50][components[0]] == 10**12


def test_samples_are_the_components_own(mixture):
    components, own = tasks.get_source(mixture).places(np.arange(200), 3)
    found = examples(mixture, range(200))
    assert found["index"].tolist() == list(range(200))
    for number, name in enumerate(COUNTS):
        where = components == number
        expected = examples(name, own[where], mixtures.seed_of(name, 3))
        for key in set(expected) - {"index"}:
            np.testing.assert_array_equal(found[key][where], expected[key])
    assert len(np.unique(found["seed"], axis=0)) == 200


def test_components_over_the_same_data_are_in_other_orders(data_dirs, vocabulary):
    for name in ("same_a", "same_b"):
        tiny_records.task(name, data_dirs["mix_a"], vocabulary=vocabulary)
    orders = [examples(n, range(13), mixtures.seed_of(n, 0))["encoded_image"].tolist()
              for n in ("same_a", "same_b")]  # fmt: skip
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_an_epoch_is_the_sum(mixture):
    source = tasks.get_source(mixture)
    assert isinstance(source, sources.PositionalSource)
    assert source.num_input_examples("train") == sum(COUNTS.values())
    assert tasks.get_source(mixture) is source


def test_its_identity_names_the_components(mixture):
    facts = tasks.get_source(mixture).identity("train")
    assert facts["mixture"] == "mix_a 700, mix_b 250, mix_c 50"
    assert facts["mix_b/num_examples"] == 7


def test_features_that_all_have(mixture, data_dirs, vocabulary):
    assert "label" in tasks.get_source(mixture).feature_names()
    tiny_records.task("mix_b", data_dirs["mix_b"], vocabulary=vocabulary, label_key=None)
    names = tasks.get_source(tasks.mixture("mix", RATES)).feature_names()
    assert "label" not in names and "caption" in names


def test_batches_resume_anywhere(mixture):
    cfg = tiny_records.config(mixture, batch_size=6)
    rows = np.arange(6)
    whole = host_batches.train(cfg, rows, 0)
    batches = [next(whole) for _ in range(4)]
    resumed = next(host_batches.train(cfg, rows, 18))
    for name, values in batches[3].items():
        np.testing.assert_array_equal(resumed[name], values)
    assert batches[0]["images"].shape == (6, 16, 16, 3)
    assert input_pipeline.num_examples(cfg) == sum(COUNTS.values())
    assert input_pipeline.vocabulary_size(cfg) == 15


def test_bad_records_are_replaced_within_their_component(data_dirs, vocabulary, tmp_path):
    record_writer.write_shards(
        tmp_path / "train",
        [*tiny_records.records(6), *tiny_records.records(6, jpg=b"no image")], 1,
    )  # fmt: skip
    tiny_records.task("mix_a", data_dirs["mix_a"], vocabulary=vocabulary)
    tiny_records.task("mix_bad", tmp_path, vocabulary=vocabulary)
    name = tasks.mixture("mix", {"mix_a": 0.5, "mix_bad": 0.5})
    source = tasks.get_source(name)
    components, own = source.places(np.arange(60), 3)
    found = examples(name, range(60))
    assert found["valid"].all()
    where = components == 1
    seed = mixtures.seed_of("mix_bad", 3)
    expected = examples("mix_bad", own[where], seed)
    assert found["encoded_image"][where].tolist() == expected["encoded_image"].tolist()
    assert source.records.counts()["bad/not an image"] > 5
    assert tasks.get_source("mix_a").records.num_bad == 0
    marked = examples(name, range(60), replace_bad=False)
    assert marked["valid"][~where].all() and not marked["valid"][where].all()


def test_a_samples_place_names_the_task(mixture):
    source = tasks.get_source(mixture)
    components, _ = source.places(np.arange(9), 3)
    for index, number in enumerate(components):
        name = list(COUNTS)[number]
        place = source.where("train", index, shuffle=True, seed=3)
        assert place.endswith(f"of task {name}") and f"/{name}/train/" in place


def test_mixtures_of_seqio_and_within_each_other(mixture):
    seqio.MixtureRegistry.remove("outer")
    seqio.MixtureRegistry.add("outer", [("mix", 0.5), ("mix_c", 0.5)])
    identity = tasks.get_source("outer").identity("train")
    assert identity["mixture"] == "mix_a 350, mix_b 125, mix_c 525"


def test_seqio_reads_it_in_its_own_way(mixture):
    ds = seqio.get_mixture_or_task(mixture).get_dataset(tiny_records.LENGTHS, "train", seed=0)
    (first,) = ds.take(1).as_numpy_iterator()
    assert first["images"].shape == (16, 16, 3)


@pytest.mark.parametrize("other, said", [
    ({"text_reduction": "random"}, "output features: text reduction 'truncate' and 'random'"),
    ({"vocabulary": None}, "output features: text TextFeature and None"),
    ({"image_preprocessor": preprocessors.squash}, "preprocessors: .*InceptionCrop.*squash"),
])  # fmt: skip
def test_tasks_that_differ_in_kind_are_refused(data_dirs, vocabulary, other, said):
    tiny_records.task("mix_a", data_dirs["mix_a"], vocabulary=vocabulary)
    tiny_records.task("mix_b", data_dirs["mix_b"], **{"vocabulary": vocabulary, **other})
    with pytest.raises(UserError, match=f"'mix_a' and 'mix_b' .* differ in their {said}"):
        tasks.mixture("mix", {"mix_a": 0.5, "mix_b": 0.5})


@pytest.mark.parametrize("rates, said", [
    ({}, "has no tasks"),
    ({"mix_a": 1.0, "no_such_task": 1.0}, "'no_such_task', which is not a registered"),
])  # fmt: skip
def test_what_is_no_mixture_is_refused(mixture, rates, said):
    with pytest.raises(UserError, match=said):
        tasks.mixture("other", rates)


def test_nothing_is_read_before_it_is_needed(vocabulary):
    for name in ("nowhere_a", "nowhere_b"):
        tiny_records.task(name, "/nowhere", vocabulary=vocabulary)
    name = tasks.mixture("mix", {"nowhere_a": 1, "nowhere_b": 1})
    assert tasks.get_task(name).output_features.keys() == {"images", "text"}
    with pytest.raises(UserError, match="/nowhere does not exist"):
        tasks.get_source(name).num_input_examples("train")
