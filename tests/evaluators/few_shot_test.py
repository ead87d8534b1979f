import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_records
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipa_t5x import partitioning
from clipa_t5x.data import input_pipeline, preprocessors, record_writer
from clipa_t5x.errors import UserError
from clipa_t5x.evaluators import evaluator, few_shot, ridge_regression

LABELS = (4, 7, 9)
TRAIN, TEST = 24, 13


def label(i):
    return LABELS[i % 3]


def embed_images(params, images):
    """A random projection of the mean colours of an image's quarters."""
    pooled = images.astype(jnp.float32).reshape(-1, 2, 8, 2, 8, 3).mean(axis=(2, 4))
    x = (pooled.reshape(-1, 12) / 128 - 1) @ params
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def embed(devices=8, model=1):
    mesh = Mesh(
        np.array(jax.devices()[:devices]).reshape(1, devices // model, model),
        partitioning.MESH_AXES,
    )
    out = NamedSharding(mesh, PartitionSpec(("replica", "data")))
    images = jax.jit(embed_images, out_shardings=out)
    return evaluator.EmbedFunctions(images, images, input_pipeline.BatchLayout(out))


@pytest.fixture(scope="module")
def params():
    return np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)


def task(tmp_path, name, numbers, **changes):
    """Pictures whose colours depend on the label, but not on it alone; number 3 is no image."""
    records = []
    for i in numbers:
        noise = np.random.default_rng(i).integers(0, 120, (2, 2, 3)).repeat(8, 0).repeat(8, 1)
        picture = np.clip(noise + 50 * (i % 3) * np.array([1, 0, -1]) + 40, 0, 255)
        features = record_writer.image_features(
            str(i), picture.astype(np.uint8), "", {"label": label(i)}
        )
        if i == 3:
            features = {**features, "jpg": b"no image"}
        records.append(record_writer.serialize({**features, **changes}))
    record_writer.write_shards(tmp_path / name / "train", records, 1)
    return tiny_records.task(
        f"few_shot_{name}", tmp_path / name, preprocessors.squash, vocabulary=None
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return task(root, "train", range(TRAIN)), task(root, "test", range(100, 100 + TEST))


def probe(tasks, batch_size=8, **kwargs):
    cfgs = [tiny_records.config(name, batch_size, shuffle=False) for name in tasks]
    kwargs = {"shots": (1, 4), "seeds": (0, 5), "l2": (0.1, 1.0, 10.0), **kwargs}
    return few_shot.FewShot(*cfgs, **kwargs)


@pytest.mark.parametrize("devices, model, batch_size", [(8, 1, 8), (8, 2, 8), (1, 1, 5)])
def test_accuracy_is_numpys(tasks, params, devices, model, batch_size):
    """Padding and the bad record are neither learnt from nor tested."""
    item = probe(tasks, batch_size)
    item.check()
    values = item.evaluate(params, embed(devices, model), None)
    embedded = []
    for name in tasks:
        batches = input_pipeline.eval_batches(
            tiny_records.config(name, 1, shuffle=False), embed(1).layout
        )
        embedded.append(np.concatenate(
            [embed_images(params, b["images"]) for b, _ in batches if b["weights"][0]]
        ))  # fmt: skip
    train_classes = np.array([i % 3 for i in range(TRAIN) if i != 3])
    test_classes = np.array([i % 3 for i in range(100, 100 + TEST)])
    expected = {}
    for shots in (1, 4):
        accuracies = []
        for seed in (0, 5):
            order = np.random.default_rng(seed).permutation(TRAIN - 1)
            chosen = [
                i for c in range(3) for i in [i for i in order if train_classes[i] == c][:shots]
            ]
            classifier = ridge_regression.fit(
                embedded[0][chosen], train_classes[chosen], 3, (0.1, 1.0, 10.0), True
            )
            accuracies.append(np.mean(classifier.predict(embedded[1]) == test_classes))
        expected[f"accuracy_{shots}_shot"] = np.mean(accuracies)
    assert 1 / 3 < expected["accuracy_4_shot"] < 1
    assert values == {
        **{name: pytest.approx(value, abs=1e-6) for name, value in expected.items()},
        "num_examples": TEST,
    }


def test_shots_are_drawn_of_every_class_and_fewer_are_among_more():
    classes = np.random.default_rng(0).integers(0, 5, 200)
    few, many = (few_shot.draw(classes, shots, 3) for shots in (2, 10))
    assert classes[few].tolist() == np.repeat(np.arange(5), 2).tolist()
    assert np.unique(many).size == 50 and set(few) <= set(many)
    np.testing.assert_array_equal(few_shot.draw(classes, 2, 3), few)
    assert set(few_shot.draw(classes, 2, 4)) != set(few)


@pytest.mark.parametrize("kwargs, part", [
    ({"shots": (8,)}, "label 4 of few_shot_train has 7 images, and shots of FewShot are 8"),
])  # fmt: skip
def test_too_few_images_are_refused(tasks, params, kwargs, part):
    with pytest.raises(UserError, match=part):
        probe(tasks, **kwargs).evaluate(params, embed(), None)


def test_classes_that_were_never_seen_are_refused(tasks, params, tmp_path):
    other = task(tmp_path, "other", [100, 101], label=8)
    with pytest.raises(UserError, match="few_shot_other has label 8, of which few_shot_train"):
        probe((tasks[0], other)).evaluate(params, embed(), None)
    none = task(tmp_path, "none", [100, 101], label=-1)
    with pytest.raises(UserError, match="few_shot_none has no image with a label"):
        probe((tasks[0], none)).evaluate(params, embed(), None)


@pytest.mark.parametrize("kwargs, part", [
    ({"shots": ()}, "shots of FewShot is"), ({"shots": (0,)}, "shots of FewShot is 0"),
    ({"shots": 5}, "shots of FewShot is 5: .* in brackets"), ({"l2": 1.0}, "l2 of FewShot is 1.0"),
    ({"seeds": (1.5,)}, "seeds of FewShot is 1.5"), ({"l2": ()}, "l2 of FewShot is"),
    ({"l2": (1.0, 0.0)}, "give penalties above 0"),
])  # fmt: skip
def test_numbers_that_cannot_be_are_refused(tasks, kwargs, part):
    with pytest.raises(UserError, match=part):
        probe(tasks, **kwargs).check()


def test_data_without_labels_are_refused(tasks, tmp_path, params):
    task(tmp_path, "unlabelled", [0, 1])
    name = tiny_records.task("few_shot_unlabelled", tmp_path / "unlabelled", label_key=None)
    with pytest.raises(UserError, match="few_shot_unlabelled has no labels to learn from"):
        probe((tasks[0], name)).evaluate(params, embed(), None)
