"""Our metrics are open_clip's and clip_benchmark's own, on the same embeddings."""

import importlib.util

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipa_t5x import partitioning
from clipa_t5x.data import input_pipeline
from clipa_t5x.evaluators import classification_metrics, retrieval, similarity

COUNT, CLASSES, CAPTIONS, JOINT = 203, 12, 3, 16


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="extra interop")


def peer(name):
    """A module of an installed peer; skips where it is not."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def open_clip_train(open_clip):
    """open_clip's training code."""
    return peer("open_clip_train.train")


@pytest.fixture(scope="module")
def embeddings():
    """(images, captions of each image side by side, classes): captions are near their images."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(COUNT, JOINT))
    texts = np.repeat(images, CAPTIONS, axis=0) + 1.3 * rng.normal(size=(COUNT * CAPTIONS, JOINT))
    classes = rng.normal(size=(CLASSES, JOINT))
    return [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
            for x in (images, texts, classes)]  # fmt: skip


@pytest.fixture(scope="module")
def layout():
    mesh = Mesh(np.array(jax.devices()).reshape(1, -1, 1), partitioning.MESH_AXES)
    return input_pipeline.BatchLayout(NamedSharding(mesh, PartitionSpec(("replica", "data"))))


def recalls(images, texts, layout):
    owners = np.repeat(np.arange(len(images)), len(texts) // len(images))
    return retrieval.recalls(images, texts, owners, layout)


def test_retrieval_is_open_clips(torch, open_clip_train, embeddings, layout):
    """Of one caption an image, which is all that it takes."""
    images, texts = embeddings[0], embeddings[1][::CAPTIONS]
    features = (torch.from_numpy(x.copy()) for x in (images, texts))
    theirs = open_clip_train.get_clip_metrics(*features, torch.tensor(1.0))
    ours = recalls(images, texts, layout)
    assert 0.1 < ours["image_to_text_recall_at_1"] < 0.9
    for name, value in ours.items():
        direction, k = name.split("_recall_at_")
        assert value == pytest.approx(theirs[f"{direction}_R@{k}"], abs=1e-6), name


def test_retrieval_is_clip_benchmarks(torch, embeddings, layout):
    theirs = peer("clip_benchmark.metrics.zeroshot_retrieval")
    images, texts, _ = embeddings
    scores = torch.from_numpy(texts @ images.T)
    positive = torch.from_numpy(
        np.repeat(np.arange(COUNT), CAPTIONS)[:, None] == np.arange(COUNT)[None]
    )
    ours = recalls(images, texts, layout)
    for k in (1, 5, 10):
        for name, (s, p) in (("text_to_image", (scores, positive)),
                             ("image_to_text", (scores.T, positive.T))):  # fmt: skip
            value = (theirs.recall_at_k(s, p, k) > 0).float().mean().item()
            assert ours[f"{name}_recall_at_{k}"] == pytest.approx(value, abs=1e-6)


def test_accuracy_is_open_clips(torch, open_clip_train, embeddings, layout, monkeypatch):
    zero_shot = importlib.import_module("open_clip_train.zero_shot")
    # Its float() of an array of one element is what NumPy no longer does.
    monkeypatch.setattr(zero_shot, "float", lambda array: array.item(), raising=False)
    images, _, classes = embeddings
    labels = np.argmax(
        images @ classes.T + np.random.default_rng(1).normal(size=(COUNT, CLASSES)) / 4, 1
    )
    theirs = zero_shot.accuracy(
        torch.from_numpy(images @ classes.T), torch.from_numpy(labels), topk=(1, 5)
    )
    _, predictions = similarity.nearest(images, classes, 5, layout)
    right = classification_metrics.hits(predictions, labels[:, None])
    assert 0.1 < right[:, 0].mean() < right.any(axis=1).mean() < 1
    assert [right[:, 0].sum(), right.any(axis=1).sum()] == theirs


def test_recall_and_precision_are_clip_benchmarks(torch, embeddings):
    theirs = peer("clip_benchmark.metrics.zeroshot_classification")
    images, _, classes = embeddings
    scores = images @ classes.T
    rng = np.random.default_rng(2)
    labels = rng.integers(0, CLASSES - 1, COUNT)
    predictions = np.argmax(scores + np.eye(CLASSES)[labels] / 4, axis=1)
    recall = classification_metrics.mean_per_class_recall(predictions == labels, labels[:, None])
    expected = theirs.balanced_accuracy_score(labels, predictions)
    assert 0.1 < recall < 0.95 and recall == pytest.approx(expected, abs=1e-6)

    multi_hot = rng.random((COUNT, CLASSES)) < 0.2
    targets = np.where(multi_hot, np.arange(CLASSES), -1)
    found = classification_metrics.mean_average_precision(scores, targets)
    precisions = theirs.average_precision_per_class(
        torch.from_numpy(scores), torch.from_numpy(multi_hot.astype(np.int64))
    )
    assert found == pytest.approx(precisions.mean().item(), abs=1e-6)
