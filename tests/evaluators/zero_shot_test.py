import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_records
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipa_t5x import partitioning
from clipa_t5x.data import input_pipeline, preprocessors, prompts
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


def classification(
    directory, task, batch_size=8, max_examples=None, text_reduction="truncate", **files
):
    files = {"class_names_path": "names.txt", "templates_path": "templates.txt", **files}
    return zero_shot.ZeroShotClassification(
        dataset_cfg=tiny_records.config(task, batch_size, shuffle=False, max_examples=max_examples),
        vocabulary=tiny_records.vocabulary(directory),
        text_reduction=text_reduction,
        **{key: str(directory / name) for key, name in files.items()},
    )


@pytest.fixture(scope="module")
def correct(directory, task, params, embed):
    """Whether each image is classified correctly, in NumPy, one after the other."""
    names = (directory / "names.txt").read_text().splitlines()
    templates = (directory / "templates.txt").read_text().splitlines()
    vocabulary = tiny_records.vocabulary(directory)
    classes = []
    for name in names:
        ids = prompts.tokenize([t.replace("{}", name) for t in templates], vocabulary, 8)
        embeddings = unit(np.stack([params["text"][row].sum(axis=0) for row in ids]))
        classes.append(unit(embeddings.mean(axis=0)))
    cfg = tiny_records.config(task, 1, shuffle=False)
    correct = []
    for host_batch, _ in input_pipeline.eval_batches(cfg, embed(1).layout):
        image = host_batch["images"][0].astype(np.float64)
        pooled = image.reshape(2, 8, 2, 8, 3).mean(axis=(1, 3)).reshape(-1)
        x = unit((pooled / 128 - 1) @ params["images"])
        correct.append(np.argmax([x @ c for c in classes]) == host_batch["label"][0])
    assert 0 < sum(correct) < COUNT
    return np.array(correct)


@pytest.mark.parametrize("devices, model, batch_size, count", [
    (8, 1, 8, 13), (8, 2, 16, 13), (1, 1, 5, 13), (8, 1, 8, 1), (8, 1, 8, 9),
])  # fmt: skip
def test_accuracy_is_numpys(
    directory, task, params, embed, correct, devices, model, batch_size, count
):
    """The last batches of images and of the 15 prompts are padded; padding never counts."""
    item = classification(directory, task, batch_size, count)
    values = item.evaluate(params, embed(devices, model), None)
    assert values == {
        "accuracy": pytest.approx(correct[:count].mean(), abs=1e-6),
        "num_examples": count,
    }


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
