import numpy as np
import pytest
import table_towers
import tiny_records
import tiny_tars

from clipa_t5x.data import preprocessors, prompts, record_writer
from clipa_t5x.errors import UserError
from clipa_t5x.evaluators import retrieval

JOINT, COUNT = 4, 21
WORDS = ("red", "green", "blue", "cat", "dog", "big", "small", "a", "of", "photo")


def captions(i):
    """One to six captions of image i; some images share some."""
    rng = np.random.default_rng(i)
    number = 1 + i % 6
    return [" ".join(rng.choice(WORDS, 3 - (i + j) % 2)) for j in range(number)]


def picture(i):
    return np.full((16, 16, 3), 12 * i, np.uint8)


@pytest.fixture(scope="module")
def params():
    return table_towers.parameters(12.0 * np.arange(COUNT, dtype=np.float32), JOINT)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """TFRecords with repeated strings, as img2dataset writes them; record 5 is no image."""
    root = tmp_path_factory.mktemp("data")
    records = []
    for i in range(COUNT):
        features = record_writer.image_features(str(i), picture(i), "")
        image = b"no image" if i == 5 else features["jpg"]
        records.append(record_writer.serialize({**features, "jpg": image, "txt": captions(i)}))
    record_writer.write_shards(root / "train", records, 1)
    return root


@pytest.fixture(scope="module")
def task(directory):
    return tiny_records.task(
        "retrieval_test", directory, preprocessors.squash, label_key=None, max_captions=5
    )


def similarities(params, vocabulary, numbers):
    """(captions x images, each caption's row of images), by hand."""
    texts, owners = [], []
    for row, i in enumerate(numbers):
        for ids in prompts.tokenize(captions(i)[:5], vocabulary, 8):
            x = params["text"][ids].sum(axis=0)
            texts.append(x / np.linalg.norm(x))
            owners.append(row)
    return np.array(texts) @ params["images"][numbers].T, np.array(owners)


def recalls(scores, owners):
    """Both directions, one query after the other; of equal scores the earlier comes first."""
    values = {}
    for k in (1, 5, 10):
        best = [sorted(range(scores.shape[1]), key=lambda i: -row[i])[:k] for row in scores]
        values[f"text_to_image_recall_at_{k}"] = np.mean(
            [own in row for own, row in zip(owners, best, strict=True)]
        )
        found = []
        for image, column in enumerate(scores.T):
            best = sorted(range(len(owners)), key=lambda t: -column[t])[:k]
            found.append(any(owners[t] == image for t in best))
        values[f"image_to_text_recall_at_{k}"] = np.mean(found)
    return values


@pytest.mark.parametrize("devices, model, batch_size, count", [
    (8, 1, 8, COUNT), (8, 2, 8, 9), (1, 1, 5, COUNT),
])  # fmt: skip
def test_recalls_are_brute_forces(directory, task, params, devices, model, batch_size, count):
    """Padding of batches, captions of images that have few, and a bad record never count."""
    cfg = tiny_records.config(task, batch_size, shuffle=False, max_examples=count)
    item = retrieval.Retrieval(cfg)
    item.check()
    values = item.evaluate(params, table_towers.embed(devices, model), None)
    numbers = [i for i in range(count) if i != 5]
    scores, owners = similarities(params, tiny_records.vocabulary(directory), numbers)
    expected = recalls(scores, owners)
    assert 0 < expected["text_to_image_recall_at_1"] < expected["text_to_image_recall_at_5"] < 1
    assert values == {
        **{name: pytest.approx(value, abs=1e-6) for name, value in expected.items()},
        "num_images": len(numbers),
        "num_captions": len(owners),
    }


def test_a_model_that_tells_nothing_apart_finds_nothing_much(task, params):
    same = {**params, "images": np.ones_like(params["images"]) / 2}
    same["text"] = np.ones_like(params["text"])
    cfg = tiny_records.config(task, shuffle=False)
    values = retrieval.Retrieval(cfg).evaluate(same, table_towers.embed(8), None)
    assert values["text_to_image_recall_at_1"] < 0.1
    assert values["image_to_text_recall_at_10"] < 0.3


def test_one_caption_a_line_of_a_tar_is_the_same(directory, task, params, tmp_path):
    """The layout of clip_benchmark."""
    samples = {}
    for i in set(range(COUNT)) - {5}:
        texts = "\n".join(captions(i)).encode()
        samples[f"{i:04d}"] = {"png": preprocessors.encode_png(picture(i)), "txt": texts}
    tiny_tars.write(tmp_path / "train" / "0.tar", samples)
    name = tiny_records.task(
        "retrieval_tars", tmp_path, preprocessors.squash, image_key="jpg;png", label_key=None,
        vocabulary=tiny_records.vocabulary(directory), max_captions=5,
    )  # fmt: skip
    cfgs = [tiny_records.config(each, shuffle=False) for each in (name, task)]
    found = [retrieval.Retrieval(cfg).evaluate(params, table_towers.embed(8), None) for cfg in cfgs]
    assert found[0] == found[1]


def test_a_task_of_one_caption_is_refused(directory):
    name = tiny_records.task("retrieval_one", directory, label_key=None)
    with pytest.raises(UserError, match="retrieval_one takes one caption an image.*max_captions"):
        retrieval.Retrieval(tiny_records.config(name, shuffle=False)).check()


def test_data_of_which_nothing_can_be_read_are_refused(tmp_path, params):
    records = tiny_records.records(3, jpg=b"no image")
    record_writer.write_shards(tmp_path / "train", records, 1)
    name = tiny_records.task("retrieval_none", tmp_path, max_captions=5)
    item = retrieval.Retrieval(tiny_records.config(name, shuffle=False))
    with pytest.raises(UserError, match="no record of retrieval_none can be read"):
        item.evaluate(params, table_towers.embed(8), None)
