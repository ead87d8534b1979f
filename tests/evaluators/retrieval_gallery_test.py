import base64
import io
import json

import numpy as np
import pytest
import table_towers
import tiny_records
from PIL import Image

from clipa_t5x.data import preprocessors, record_writer
from clipa_t5x.evaluators import retrieval_gallery

CAPTIONS = """a red cat/a blue dog/a small cat/photo of red/a blue dog/big green/a cat, a dog/blue
/a red cat/green dogs/small photo/of a/big cats""".replace("\n", "").split("/")
COUNT, JOINT = len(CAPTIONS), 4


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """One shard, so that examples stand in the order of CAPTIONS; some captions occur twice."""
    root = tmp_path_factory.mktemp("data")
    records = [
        record_writer.serialize(
            record_writer.image_features(str(i), tiny_records.picture(i, 16, 16), caption)
        )
        for i, caption in enumerate(CAPTIONS)
    ]
    record_writer.write_shards(root / "train", records, 1)
    return tiny_records.task("gallery_test", root, preprocessors.squash, label_key=None)


@pytest.fixture(scope="module")
def params():
    return table_towers.parameters(
        np.array([tiny_records.picture(i, 16, 16)[..., 0].mean() for i in range(COUNT)]), JOINT
    )


def similarity(params, vocabulary):
    """Captions x images, by hand."""
    rows = []
    for caption in CAPTIONS:
        ids = [vocabulary.cls_id, *vocabulary.encode(caption)][:8]
        x = params["text"][ids + [0] * (8 - len(ids))].sum(axis=0)
        rows.append(params["images"] @ (x / np.linalg.norm(x)))
    return np.array(rows)


def recall(scores, k, count=COUNT):
    """Share of the captions among whose k best images is one with the very same caption."""
    found = 0
    for i in range(count):
        best = sorted(range(count), key=lambda j: -scores[i, j])[:k]
        found += any(CAPTIONS[j] == CAPTIONS[i] for j in best)
    return found / count


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tiny_records.vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.mark.parametrize("devices, model, batch_size, count", [
    (8, 2, 8, None), (1, 1, 5, 7),
])  # fmt: skip
def test_recall_is_brute_forces(task, params, vocabulary, devices, model, batch_size, count):
    cfg = tiny_records.config(task, batch_size, shuffle=False, max_examples=count)
    gallery = retrieval_gallery.RetrievalGallery(cfg)
    values = gallery.evaluate(params, table_towers.embed(devices, model), None)
    scores = similarity(params, vocabulary)
    assert values == {
        f"recall_at_{k}": pytest.approx(recall(scores, k, count or COUNT)) for k in (1, 5)
    }
    assert 0 < values["recall_at_5"] < 1


def test_a_perfect_model_finds_everything(task, params, vocabulary, tmp_path, monkeypatch):
    """Two images share a caption: either counts, or recall could not reach 1."""
    monkeypatch.chdir(tmp_path)
    text = np.eye(15, 32, dtype=np.float32)
    table = []
    for caption in CAPTIONS:
        ids = [vocabulary.cls_id, *vocabulary.encode(caption)][:8]
        x = text[ids + [0] * (8 - len(ids))].sum(axis=0)
        table.append(x / np.linalg.norm(x))
    perfect = {**params, "images": np.array(table), "text": text}
    cfg = tiny_records.config(task, shuffle=False)
    values = retrieval_gallery.RetrievalGallery(cfg).evaluate(
        perfect, table_towers.embed(8, 1), None
    )
    assert values == {"recall_at_1": 1.0, "recall_at_5": 1.0}
    assert list(tmp_path.iterdir()) == []  # nothing is written during training


def test_the_gallery_shows_what_was_found(task, params, vocabulary, tmp_path):
    cfg = tiny_records.config(task, shuffle=False)
    gallery = retrieval_gallery.RetrievalGallery(cfg, num_captions=5, num_images=3)
    gallery.evaluate(params, table_towers.embed(8, 1), str(tmp_path))
    items = json.loads((tmp_path / "gallery.json").read_text())["items"]
    scores = similarity(params, vocabulary)
    # Spread evenly over the set, first and last included.
    assert [item["caption"] for item in items] == [CAPTIONS[i] for i in (0, 3, 6, 9, 12)]
    for item, i in zip(items, (0, 3, 6, 9, 12), strict=True):
        best = sorted(range(COUNT), key=lambda j: -scores[i, j])[:3]
        assert [result["caption"] for result in item["results"]] == [CAPTIONS[j] for j in best]
        for result, j in zip(item["results"], best, strict=True):
            assert result["score"] == pytest.approx(scores[i, j], abs=1e-5)
            assert result["match"] is (CAPTIONS[i] == CAPTIONS[j])
            assert result["mime"] == "image/png"
            image = Image.open(io.BytesIO(base64.b64decode(result["image"])))
            assert (image.format, image.size) == ("PNG", (16, 16))
            difference = np.asarray(image).astype(int) - tiny_records.picture(j, 16, 16)
            assert np.abs(difference).mean() < 3


def test_more_captions_are_asked_for_than_there_are(task, params, tmp_path):
    cfg = tiny_records.config(task, shuffle=False, max_examples=2)
    gallery = retrieval_gallery.RetrievalGallery(cfg)
    gallery.evaluate(params, table_towers.embed(8, 1), str(tmp_path))
    items = json.loads((tmp_path / "gallery.json").read_text())["items"]
    assert [item["caption"] for item in items] == CAPTIONS[:2]
    assert all(len(item["results"]) == 2 for item in items)
