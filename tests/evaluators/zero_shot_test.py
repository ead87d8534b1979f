import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_records
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipa_t5x import partitioning
from clipa_t5x.data import input_pipeline, preprocessors, prompts, record_writer, tasks
from clipa_t5x.errors import UserError
from clipa_t5x.evaluators import evaluator, zero_shot

COUNT, JOINT = 13, 6


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embed_images(params, images):
    """A random projection of the mean colours of an image's quarters."""
    pooled = images.astype(jnp.float32).reshape(-1, 2, 8, 2, 8, 3).mean(axis=(2, 4))
    x = (pooled.reshape(-1, 12) / 128 - 1) @ params["images"]
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def embed_text(params, text):
    """A random vector for every piece, summed."""
    x = params["text"][text].sum(axis=1)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {
        "images": rng.normal(size=(12, JOINT)).astype(np.float32),
        "text": rng.normal(size=(15, JOINT)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def embed():
    def make(devices=8, model=1):
        mesh = Mesh(
            np.array(jax.devices()[:devices]).reshape(1, devices // model, model),
            partitioning.MESH_AXES,
        )
        layout = input_pipeline.BatchLayout(NamedSharding(mesh, PartitionSpec(("replica", "data"))))
        out = layout.sharding
        return evaluator.EmbedFunctions(
            jax.jit(embed_images, out_shardings=out), jax.jit(embed_text, out_shardings=out), layout
        )

    return make


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny_records.write(root, COUNT)
    (root / "names.txt").write_text("red cat\nblue\ndog\ngreen photo\nsmall\n")
    (root / "templates.txt").write_text("a photo of a {}\n{}\nbig {}s\n")
    return root


@pytest.fixture(scope="module")
def task(directory):
    return tiny_records.task("zero_shot_test", directory, preprocessors.squash, vocabulary=None)


def classification(directory, task, batch_size=8, max_examples=None, **kwargs):
    kwargs = {"class_names_path": "names.txt", "templates_path": "templates.txt", **kwargs}
    return zero_shot.ZeroShotClassification(
        dataset_cfg=tiny_records.config(task, batch_size, shuffle=False, max_examples=max_examples),
        vocabulary=tiny_records.vocabulary(directory),
        **{k: str(directory / v) if k.endswith("_path") else v for k, v in kwargs.items()},
    )


def scores_by_hand(params, directory, name, functions, keep_class_name=False):
    """(scores [images, classes], labels) in NumPy, one image and one prompt after the other."""
    names = (directory / "names.txt").read_text().splitlines()
    templates = (directory / "templates.txt").read_text().splitlines()
    vocabulary = tiny_records.vocabulary(directory)
    tokenize = prompts.tokenize_around_names if keep_class_name else (
        lambda names, templates, *how: prompts.tokenize(prompts.prompts(names, templates), *how)
    )  # fmt: skip
    classes = []
    for class_name in names:
        ids = tokenize([class_name], templates, vocabulary, 8)
        embeddings = unit(np.stack([params["text"][row].sum(axis=0) for row in ids]))
        classes.append(unit(embeddings.mean(axis=0)))
    scores, labels = [], []
    cfg = tiny_records.config(name, 1, shuffle=False)
    for host_batch, _ in input_pipeline.eval_batches(cfg, functions.layout):
        image = host_batch["images"][0].astype(np.float64)
        pooled = image.reshape(2, 8, 2, 8, 3).mean(axis=(1, 3)).reshape(-1)
        x = unit((pooled / 128 - 1) @ params["images"])
        scores.append([x @ c for c in classes])
        labels.append(host_batch["labels" if "labels" in host_batch else "label"][0])
    return np.array(scores), np.array(labels)


@pytest.fixture(scope="module")
def by_hand(directory, task, params, embed):
    scores, labels = scores_by_hand(params, directory, task, embed(1))
    right = scores.argmax(axis=1) == labels
    assert 0 < right.sum() < COUNT and len(set(labels)) == 5
    return scores, labels


def recall(right, labels):
    return np.mean([right[labels == c].mean() for c in np.unique(labels)])


@pytest.mark.parametrize("devices, model, batch_size, count", [
    (8, 1, 8, 13), (8, 2, 16, 13), (1, 1, 5, 13), (8, 1, 8, 1), (8, 1, 8, 9),
])  # fmt: skip
def test_metrics_are_numpys(
    directory, task, params, embed, by_hand, devices, model, batch_size, count
):
    """The last batches of images and of the 15 prompts are padded; padding never counts."""
    item = classification(directory, task, batch_size, count)
    values = item.evaluate(params, embed(devices, model), None)
    scores, labels = by_hand[0][:count], by_hand[1][:count]
    right = scores.argmax(axis=1) == labels
    assert values == {
        "accuracy": pytest.approx(right.mean(), abs=1e-6),
        "accuracy_top5": 1.0,  # of five classes
        "mean_per_class_recall": pytest.approx(recall(right, labels), abs=1e-6),
        "num_examples": count,
    }


def test_top5_is_of_five_of_more_classes(directory, task, params, embed, by_hand, tmp_path):
    """The five classes of the data among nine, of which four have the same names again."""
    vocabulary = tiny_records.vocabulary(directory)
    more = ["cat", "big", "a", "dog, dog", "photo", "small red"]
    lines = (directory / "names.txt").read_text().splitlines() + more
    (tmp_path / "names.txt").write_text("\n".join(lines))
    (tmp_path / "templates.txt").write_text((directory / "templates.txt").read_text())
    (tmp_path / "vocab.txt").write_text((directory / "vocab.txt").read_text())
    assert vocabulary.pieces
    scores, labels = scores_by_hand(params, tmp_path, task, embed(1))
    best = np.argsort(-scores, axis=1)[:, :5]
    expected = np.mean([label in row for label, row in zip(labels, best, strict=True)])
    assert 0 < expected < 1
    values = classification(tmp_path, task).evaluate(params, embed(), None)
    assert values["accuracy_top5"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("devices", [8, 1])
def test_a_label_map_says_which_classes_labels_stand_for(
    directory, task, params, embed, by_hand, devices
):
    """Label 0 is line 3, label 1 lines 0 and 4, label 2 none, the others line 1."""
    (directory / "map.txt").write_text("3\n0 4\n-\n1\n1\n")
    item = classification(directory, task, label_map_path="map.txt")
    item.check()
    values = item.evaluate(params, embed(devices), None)
    scores, labels = by_hand
    scores = np.where(np.arange(5) == 2, -np.inf, scores)  # no label stands for line 2
    kept = labels != 2
    sets = [{3}, {0, 4}, set(), {1}, {1}]
    right = np.array([p in sets[c] for p, c in zip(scores.argmax(axis=1), labels, strict=True)])
    assert 0 < right[kept].sum() < kept.sum()
    assert values == {
        "accuracy": pytest.approx(right[kept].mean(), abs=1e-6),
        "mean_per_class_recall": pytest.approx(recall(right[kept], labels[kept]), abs=1e-6),
        "num_examples": kept.sum(),
    }


LABELS = [[0], [1, 2], [], [3, 4, 1], [0, 1, 2, 3, 4], [2], [4, 0], [], [1], [3], [2, 3], [0], [4]]


@pytest.fixture(scope="module")
def multi_label(directory, tmp_path_factory):
    root = tmp_path_factory.mktemp("multi_label")
    records = [
        record_writer.serialize(tiny_records.features(i, classes=labels))
        for i, labels in enumerate(LABELS)
    ]
    record_writer.write_shards(root / "train", records, 1)
    return tiny_records.task(
        "zero_shot:multi#label", root, preprocessors.squash, vocabulary=None, label_key=None,
        labels_key="classes",
    )  # fmt: skip


@pytest.mark.parametrize("devices, batch_size", [(8, 8), (1, 5)])
def test_images_with_several_labels(directory, multi_label, params, embed, devices, batch_size):
    """Any of an image's labels is right; an image without one counts for average precision only."""
    item = classification(directory, multi_label, batch_size)
    values = item.evaluate(params, embed(devices), None)
    scores, _ = scores_by_hand(params, directory, multi_label, embed(1))
    kept = [i for i, labels in enumerate(LABELS) if labels]
    right = {i: scores[i].argmax() in LABELS[i] for i in kept}
    recalls = [np.mean([right[i] for i in kept if c in LABELS[i]]) for c in range(5)]
    precisions = []
    for c in range(5):
        order = np.argsort(-scores[:, c])
        truth = np.array([c in LABELS[i] for i in order])
        precisions.append((np.cumsum(truth) / np.arange(1, COUNT + 1))[truth].mean())
    assert 0 < sum(right.values()) < len(kept)
    assert values == {
        "accuracy": pytest.approx(np.mean(list(right.values())), abs=1e-6),
        "accuracy_top5": 1.0,
        "mean_per_class_recall": pytest.approx(np.mean(recalls), abs=1e-6),
        "mean_average_precision": pytest.approx(np.mean(precisions), abs=1e-6),
        "num_examples": 11,
    }


def test_bad_records_do_not_count(directory, tmp_path, params, embed, by_hand):
    records = tiny_records.records(COUNT)
    records[4] = record_writer.serialize(tiny_records.features(4, jpg=b"no image"))
    record_writer.write_shards(tmp_path / "train", records, 1)
    name = tiny_records.task("zero_shot_bad", tmp_path, preprocessors.squash, vocabulary=None)
    values = classification(directory, name).evaluate(params, embed(), None)
    scores, labels = scores_by_hand(params, directory, name, embed(1))
    right = np.delete(scores.argmax(axis=1) == labels, 4)
    assert values["num_examples"] == COUNT - 1
    assert values["accuracy"] == pytest.approx(right.mean(), abs=1e-6)


def test_the_worst_classes_are_written(directory, task, multi_label, params, embed, tmp_path):
    item = classification(directory, task)
    values = item.evaluate(params, embed(), str(tmp_path))
    facts = json.loads((tmp_path / "confusion_zero_shot_test.json").read_text())
    scores, labels = scores_by_hand(params, directory, task, embed(1))
    predictions = scores.argmax(axis=1)
    assert facts.keys() == {"name", "num_examples", "num_classes", "accuracy", "worst"}
    assert (facts["name"], facts["num_examples"], facts["num_classes"]) == (task, COUNT, 5)
    assert facts["accuracy"] == values["accuracy"]
    names = (directory / "names.txt").read_text().splitlines()
    assert sorted(each["class"] for each in facts["worst"]) == sorted(names)
    for each in facts["worst"]:
        own = predictions[labels == names.index(each["class"])]
        right = own == names.index(each["class"])
        assert (each["examples"], each["correct"]) == (len(own), right.sum())
        confused = {x["class"]: x["examples"] for x in each["confused_with"]}
        assert confused == dict(collections.Counter(names[p] for p in own[~right]))
    shares = [each["correct"] / each["examples"] for each in facts["worst"]]
    assert shares == sorted(shares) and shares[0] < 1
    classification(directory, multi_label).evaluate(params, embed(), str(tmp_path))
    assert (tmp_path / "confusion_zero_shot_multi_label.json").exists()


def test_class_names_may_outlast_templates(directory, task, params, embed, tmp_path):
    (tmp_path / "names.txt").write_text((directory / "names.txt").read_text())
    (tmp_path / "vocab.txt").write_text((directory / "vocab.txt").read_text())
    (tmp_path / "templates.txt").write_text("a small photo of a photo of a {}\n{}\n")
    scores, labels = scores_by_hand(params, tmp_path, task, embed(1), keep_class_name=True)
    cut, _ = scores_by_hand(params, tmp_path, task, embed(1))
    expected = [np.mean(x.argmax(axis=1) == labels) for x in (scores, cut)]
    assert expected[0] != expected[1]
    for keep, accuracy in zip((True, False), expected, strict=True):
        item = classification(tmp_path, task, keep_class_name=keep)
        values = item.evaluate(params, embed(), None)
        assert values["accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_class_embeddings_are_means_scaled_to_unit_length():
    rng = np.random.default_rng(0)
    embeddings = unit(rng.normal(size=(5 * 3, JOINT))).astype(np.float32)
    classes = zero_shot.class_embeddings(embeddings, 3)
    assert classes.dtype == np.float32
    for i, row in enumerate(classes):
        np.testing.assert_allclose(row, unit(embeddings[3 * i : 3 * i + 3].mean(axis=0)), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(classes, axis=1), 1, rtol=1e-6)


def test_prompts_that_cancel_out_are_no_nan():
    classes = zero_shot.class_embeddings(np.array([[1, 0], [-1, 0]], np.float32), 2)
    np.testing.assert_array_equal(classes, 0)


@pytest.mark.parametrize("count", [1, 8, 9, 15])
def test_prompts_are_embedded_in_order(params, embed, count):
    ids = np.random.default_rng(1).integers(0, 15, (count, 8)).astype(np.int32)
    embeddings = zero_shot.embed_prompts(params, embed(), ids, 8)
    expected = unit(params["text"][ids].sum(axis=1))
    np.testing.assert_allclose(embeddings, expected, rtol=1e-5, atol=1e-6)


def refused(item, params, functions, *parts):
    with pytest.raises(UserError) as caught:
        item.evaluate(params, functions, None)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_data_that_do_not_fit_are_refused(directory, task, params, embed):
    functions = embed()
    (directory / "three.txt").write_text("cat\ndog\nred\n")
    refused(
        classification(directory, task, class_names_path="three.txt"), params, functions,
        "has label 4", "three.txt lists 3 classes",
    )  # fmt: skip
    (directory / "plain.txt").write_text("a photo of a cat\n")
    refused(
        classification(directory, task, templates_path="plain.txt"), params, functions,
        "plain.txt", "has no {}",
    )  # fmt: skip
    refused(
        classification(directory, task, class_names_path="absent.txt"), params, functions,
        directory / "absent.txt", "does not exist",
    )  # fmt: skip
    refused(
        classification(directory, task, templates_path="absent.txt"), params, functions,
        directory / "absent.txt", "does not exist",
    )  # fmt: skip


def test_lists_of_another_length_are_refused(directory, task, params, embed, monkeypatch):
    """Where the data say how many classes they have, or the configuration does."""
    (directory / "six_map.txt").write_text("0\n" * 6)
    for kwargs, path in (
        ({}, "names.txt has 5 lines"),
        ({"label_map_path": "six_map.txt"}, "six_map.txt has 6 lines"),
    ):
        item = classification(directory, task, num_classes=7, **kwargs)
        for use in (item.check, lambda: item.evaluate(params, embed(), None)):  # noqa: B023
            with pytest.raises(UserError, match=f"has 7 classes, but .*{path}"):
                use()
    classification(directory, task, num_classes=5).check()
    monkeypatch.setattr(tasks.get_source(task), "num_classes", lambda split: 6)
    with pytest.raises(UserError, match="zero_shot_test has 6 classes, but .*names.txt has 5"):
        classification(directory, task).check()
    classification(directory, task, label_map_path="six_map.txt").check()


def test_lists_longer_than_any_label_are_told_of(directory, task, params, embed, caplog):
    """Where labels alone tell of the classes: the last ones may just have no image."""
    names = (directory / "names.txt").read_text()
    (directory / "seven.txt").write_text(f"{names}cat\ndog\n")
    for path, kwargs in (("names.txt", {}), ("seven.txt", {"num_classes": 7}), ("seven.txt", {})):
        caplog.clear()
        item = classification(directory, task, class_names_path=path, **kwargs)
        item.evaluate(params, embed(), None)
        said = [r.getMessage() for r in caplog.records if "largest label" in r.getMessage()]
        assert len(said) == (path == "seven.txt" and not kwargs)
    assert (
        "seven.txt has 7 lines, and the largest label of the data set zero_shot_test is 4"
        in said[0]
    )


def test_data_of_no_class_are_refused(directory, task, params, embed):
    (directory / "map.txt").write_text("-\n" * 5 + "0\n")
    item = classification(directory, task, label_map_path="map.txt")
    refused(item, params, embed(), "no image with a label", "map.txt")


def test_prompts_are_shortened_as_told(directory, task, params, embed, monkeypatch):
    vocabulary = tiny_records.vocabulary(directory)
    tiny_records.write_word_classes(vocabulary)
    seen = []

    def embed_prompts(params, embed, ids, batch_size):
        seen.append([vocabulary.decode(row) for row in ids])
        return original(params, embed, ids, batch_size)

    original = zero_shot.embed_prompts
    monkeypatch.setattr(zero_shot, "embed_prompts", embed_prompts)
    monkeypatch.setitem(tiny_records.LENGTHS, "text", 3)
    for strategy, first in (("truncate", "a photo"), ("syntax", "red cat")):
        item = classification(directory, task, text_reduction=strategy)
        item.check()
        item.evaluate(params, embed(), None)
        assert seen[-1][:2] == [first, "red cat"]


def test_a_reduction_that_cannot_be_is_refused(directory, task, tmp_path):
    (tmp_path / "names.txt").write_text("cat\n")
    (tmp_path / "templates.txt").write_text("a {}\n")
    for strategy, part in (("syntax", "vocab.tags.json"), ("none", "'truncate'")):
        with pytest.raises(UserError, match=part):
            classification(tmp_path, task, text_reduction=strategy).check()


def test_data_without_labels_are_refused(directory, params, embed):
    name = tiny_records.task("zero_shot_test_unlabelled", directory, label_key=None)
    refused(classification(directory, name), params, embed(), name, "no labels", "label_key")
