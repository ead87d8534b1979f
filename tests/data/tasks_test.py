import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_records

from clipa_t5x.data import (
    feature_converters,
    preprocessors,
    prompts,
    record_writer,
    tasks,
)
from clipa_t5x.errors import UserError

COUNT = 13


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny_records.write(root, COUNT)
    return root


def seqio_examples(name, **kwargs):
    ds = seqio.get_mixture_or_task(name).get_dataset(
        tiny_records.LENGTHS, "train", shuffle=False, **kwargs
    )
    return list(ds.as_numpy_iterator())


def own_examples(name, count=COUNT, first=0, lengths=tiny_records.LENGTHS):
    """The built-in engine's path."""
    source = tasks.get_source(name)
    examples = source.examples_at("train", np.arange(first, count), shuffle=False, seed=0)
    given = {name: examples[name] for name in source.feature_names()}
    ds = tf.data.Dataset.from_tensors(given)
    ds = tasks.get_task(name).preprocess_postcache(ds, lengths)
    return list(feature_converters.convert(ds, lengths)[0].as_numpy_iterator())


def test_seqio_sees_the_same_examples(directory):
    name = tiny_records.task("tasks_test", directory)
    examples, expected = seqio_examples(name), own_examples(name)
    assert len(examples) == len(expected) == COUNT
    for example, wanted in zip(examples, expected, strict=True):
        assert (
            example.keys()
            == wanted.keys()
            == {"images", "text", "index", "label", "caption", "valid"}
        )
        for key in wanted:
            np.testing.assert_array_equal(example[key], wanted[key])


def test_examples_hold_what_was_written(directory):
    name = tiny_records.task("tasks_test", directory, preprocessors.squash)
    examples = own_examples(name)
    # Shards are dealt in turn: the first holds records 0, 3, 6, ...
    assert [int(e["label"]) for e in examples[:5]] == [0, 3, 1, 4, 2]
    vocabulary = tiny_records.vocabulary(directory)
    for example, i in zip(examples, [0, 3, 6, 9, 12, 1, 4], strict=False):
        assert example["caption"].decode() == tiny_records.caption(i)
        assert example["text"][0] == vocabulary.cls_id
        assert vocabulary.decode(example["text"]) == tiny_records.caption(i)
        difference = example["images"].mean(axis=(0, 1)) - tiny_records.picture(i).mean(axis=(0, 1))
        assert np.abs(difference).max() < 3


def test_seqio_shards_the_task(directory):
    name = tiny_records.task("tasks_test", directory, vocabulary=None)
    parts = [seqio_examples(name, shard_info=seqio.ShardInfo(i, 2)) for i in range(2)]
    assert [len(part) for part in parts] == [7, 6]
    indices = sorted(int(e["index"]) for part in parts for e in part)
    assert indices == list(range(COUNT))


def test_seqio_repeats_the_task(directory):
    name = tiny_records.task("tasks_test", directory, vocabulary=None)
    assert len(seqio_examples(name, num_epochs=2)) == 2 * COUNT


def test_seqio_may_shuffle(directory):
    """Its default: the source permutes by itself, so SeqIO must not ask for a buffer."""
    name = tiny_records.task("tasks_test", directory, preprocessors.squash, vocabulary=None)
    task = seqio.get_mixture_or_task(name)
    examples = [
        list(task.get_dataset(tiny_records.LENGTHS, "train", seed=seed).as_numpy_iterator())
        for seed in (1, 1, 2)
    ]
    images = [[e["images"].tobytes() for e in part] for part in examples]
    assert images[0] == images[1] != images[2]
    assert sorted(images[0]) == sorted(images[2])


def test_seqio_needs_no_cache(directory):
    assert not tasks.get_task(tiny_records.task("tasks_test", directory)).requires_caching


def test_a_task_without_captions(directory):
    name = tiny_records.task("tasks_test", directory, vocabulary=None)
    assert set(own_examples(name)[0]) == {"images", "index", "label", "valid"}
    assert set(tasks.get_task(name).output_features) == {"images"}


def test_a_task_without_labels(directory):
    name = tiny_records.task("tasks_test", directory, label_key=None)
    assert set(own_examples(name)[0]) == {"images", "text", "index", "caption", "valid"}


def test_a_second_call_replaces_the_task(directory):
    tiny_records.task("tasks_test", directory, preprocessors.squash)
    name = tiny_records.task("tasks_test", directory, vocabulary=None)
    assert "text" not in tasks.get_task(name).output_features


@pytest.mark.parametrize("strategy, first", [
    ("syntax", "photo red cat"),  # of five words three, of whose four pieces three
    ("random", None),
])  # fmt: skip
def test_captions_are_shortened_as_the_task_says(directory, strategy, first):
    vocabulary = tiny_records.vocabulary(directory)
    tiny_records.write_word_classes(vocabulary)
    name = tiny_records.task("tasks_test", directory, text_reduction=strategy)
    lengths = {"images": 4, "text": 4}
    examples = own_examples(name, lengths=lengths)
    captions = [example["caption"].decode() for example in examples]
    # Prompts in the same order are cut alike: a prompt's place is its seed, as here the sample's.
    expected = prompts.tokenize(captions, vocabulary, 4, strategy)
    np.testing.assert_array_equal([example["text"] for example in examples], expected)
    assert first in (None, vocabulary.decode(examples[0]["text"]))
    if strategy == "random":  # a run that begins in the middle draws what the other drew there
        resumed = own_examples(name, first=5, lengths=lengths)
        np.testing.assert_array_equal([example["text"] for example in resumed], expected[5:])


def test_an_unknown_reduction_is_refused_at_once(directory):
    with pytest.raises(UserError, match="TEXT_REDUCTION is 'shorter'"):
        tiny_records.task("tasks_test", directory, text_reduction="shorter")


def test_a_task_that_lacks_its_word_classes(directory, tmp_path):
    vocabulary = tiny_records.vocabulary(tmp_path)
    arguments = {"vocabulary": vocabulary, "text_reduction": "syntax"}
    name = tiny_records.task("tasks_test", directory, **arguments)
    for use in (
        lambda: tiny_records.config(name).check(),
        lambda: own_examples(name),
    ):
        with pytest.raises(UserError, match="does not exist.*data.build tags"):
            use()
    tiny_records.write_word_classes(vocabulary)
    tiny_records.config(tiny_records.task("tasks_test", directory, **arguments)).check()


def test_registering_reads_no_file(tmp_path):
    tiny_records.task("absent", tmp_path / "nowhere", vocabulary=None)
    with pytest.raises(UserError, match="nowhere does not exist"):
        tasks.get_source("absent").num_input_examples("train")


def test_an_unknown_name_lists_the_known(directory):
    tiny_records.task("tasks_test", directory)
    with pytest.raises(UserError) as caught:
        tasks.get_task("task_test")
    message = str(caught.value)
    assert "MIXTURE_OR_TASK_NAME is 'task_test'" in message
    assert "tasks_test" in message
    assert "\n" not in message


def test_what_cannot_resume_is_refused(directory):
    name = tiny_records.task("tasks_test", directory)
    seqio.TaskRegistry.remove("stream")
    seqio.TaskRegistry.add(
        "stream",
        source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"]),
        output_features=tasks.get_task(name).output_features,
    )
    seqio.MixtureRegistry.remove("both")
    seqio.MixtureRegistry.add("both", [name, "stream"], default_rate=1.0)
    for other in ("both", "stream"):
        with pytest.raises(UserError, match=f"'{other}' cannot be read at any position"):
            tasks.get_task(other)


@pytest.mark.parametrize("key", [
    {}, ["txt"], 5, {"txt": "a"}, {"txt": -1.0, "b": 2.0}, {"txt": 0.0}, {"txt": float("nan")},
    {"txt": float("inf")}, {3: 1.0},
])  # fmt: skip
def test_captions_without_sensible_rates_are_refused(directory, key):
    with pytest.raises(UserError, match="CAPTION_KEY"):
        tiny_records.task("tasks_test", directory, caption_key=key)


def test_splits_are_names_with_patterns(directory):
    with pytest.raises(UserError, match="DATA_SPLITS is 'train/\\*.tar'; it must be"):
        tiny_records.task("tasks_test", directory, splits="train/*.tar")


def written(tmp_path, records):
    record_writer.write_shards(tmp_path / "train", map(record_writer.serialize, records), 1)
    return tmp_path


def test_all_captions_of_an_image_are_tokenized(tmp_path):
    """Repeated strings, as img2dataset writes them; rows of zeros follow the last."""
    texts = [["photo of a cat"], ["red dogs", "a dog", "big dog", "blue"], ["green", "small cats"]]
    records = [tiny_records.features(i, txt=each) for i, each in enumerate(texts)]
    vocabulary = tiny_records.vocabulary(tmp_path)
    name = tiny_records.task("tasks_test", written(tmp_path, records), max_captions=3)
    tiny_records.config(name).check()
    examples = own_examples(name, count=3)
    assert "text" not in examples[0]
    for example, each in zip(examples, texts, strict=True):
        expected = prompts.tokenize(each[:3], vocabulary, 8)
        assert example["texts"].dtype == np.int32 and example["texts"].shape == (3, 8)
        np.testing.assert_array_equal(example["texts"][: len(expected)], expected)
        assert not example["texts"][len(expected) :].any()


def test_random_reductions_of_all_captions_differ(tmp_path):
    records = [tiny_records.features(i, txt=["a red cat of a dog"] * 8) for i in range(2)]
    name = tiny_records.task(
        "tasks_test", written(tmp_path, records), max_captions=8, text_reduction="random"
    )
    lengths = {"images": 4, "text": 4}
    examples = own_examples(name, count=2, lengths=lengths)
    assert len({row.tobytes() for example in examples for row in example["texts"]}) > 4
    again = own_examples(name, count=2, first=1, lengths=lengths)
    np.testing.assert_array_equal(again[0]["texts"], examples[1]["texts"])


def test_an_image_may_have_several_labels(tmp_path):
    found = [[3], [], [1, 4, 0]]
    records = [tiny_records.features(i, classes=each) for i, each in enumerate(found)]
    name = tiny_records.task("tasks_test", written(tmp_path, records), vocabulary=None,
                             label_key=None, labels_key="classes")  # fmt: skip
    examples = own_examples(name, count=3)
    assert "label" not in examples[0]
    for example, each in zip(examples, found, strict=True):
        assert example["labels"][example["labels"] >= 0].tolist() == each


def test_a_number_of_captions_is_a_number(directory):
    with pytest.raises(UserError, match="max_captions is 0; it must be an integer of at least 1"):
        tiny_records.task("tasks_test", directory, max_captions=0)
