import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_records
import tiny_tars
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipa_t5x import partitioning
from clipa_t5x.data import input_pipeline, preprocessors
from clipa_t5x.errors import UserError
from clipa_t5x.evaluators import clip_benchmark, evaluator

COUNT, WORDS = 11, ("red", "green", "blue", "cat", "dog")


def picture(i):
    return np.full((16, 16, 3), 20 * i, np.uint8)


def embed_images(params, images):
    """The mean red tells the pictures apart: a unit vector for each."""
    number = jnp.round(images[..., 0].astype(jnp.float32).mean(axis=(1, 2)) / 20).astype(int)
    return params["images"][number]


def embed_text(params, text):
    """The sum of the pieces that are words of WORDS: a unit vector for each word."""
    x = params["text"][text].sum(axis=1)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


@pytest.fixture(scope="module")
def functions():
    mesh = Mesh(np.array(jax.devices()).reshape(1, 8, 1), partitioning.MESH_AXES)
    out = NamedSharding(mesh, PartitionSpec(("replica", "data")))
    return evaluator.EmbedFunctions(
        jax.jit(embed_images, out_shardings=out),
        jax.jit(embed_text, out_shardings=out),
        input_pipeline.BatchLayout(out),
    )


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tiny_records.vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def params(vocabulary):
    """Images i are of word i % 5, but that numbers 2 and 3 are taken for words 4 and 0."""
    text = np.zeros((len(vocabulary.pieces), 5), np.float32)
    for number, word in enumerate(WORDS):
        text[vocabulary.pieces.index(word), number] = 1
    images = np.eye(5, dtype=np.float32)[[i % 5 for i in range(13)]]
    images[2:4] = np.eye(5)[[4, 0]]
    return {"text": text, "images": images}


def write(folder, fields, kinds=("png", "jpg", "webp"), dataset_type=None, num_shards=2):
    """A folder as clip_benchmark_export_wds writes it; `fields` gives those of image i."""
    for shard in range(num_shards):
        samples = {}
        for i in range(shard, COUNT, num_shards):
            kind = kinds[i % len(kinds)]
            image = tiny_tars.encode(picture(i), {"jpg": "JPEG"}.get(kind, kind.upper()))
            samples[f"s{i:07d}"] = {kind: image, **fields(i)}
        tiny_tars.write(folder / "test" / f"{shard}.tar", samples)
    (folder / "test" / "nshards.txt").write_text(str(num_shards))
    if dataset_type:
        (folder / "dataset_type.txt").write_text(dataset_type)
    if dataset_type != "retrieval":
        (folder / "classnames.txt").write_text("\n".join(WORDS) + "\n")
        templates = "a photo of a {c}\n{c}, a\n"
        (folder / "zeroshot_classification_templates.txt").write_text(templates)
    return folder


def benchmark(folder, vocabulary, **kwargs):
    return clip_benchmark.ClipBenchmark(
        str(folder), vocabulary, tiny_records.LENGTHS, 8,
        image_preprocessor=preprocessors.squash, **kwargs,
    )  # fmt: skip


def test_a_folder_of_classes(tmp_path, vocabulary, params, functions):
    folder = write(tmp_path / "vtab-tiny", lambda i: {"cls": str(i % 5).encode()})
    item = benchmark(folder, vocabulary)
    item.check()
    values = item.evaluate(params, functions, str(tmp_path))
    recalls = [3 / 3, 2 / 2, 1 / 2, 1 / 2, 2 / 2]
    assert values == {
        "accuracy": pytest.approx(9 / 11),
        "accuracy_top5": 1.0,
        "mean_per_class_recall": pytest.approx(np.mean(recalls)),
        "num_examples": COUNT,
    }
    assert (tmp_path / "confusion_clip_benchmark_vtab_tiny.json").exists()


def multi_hot(i):
    file = io.BytesIO()
    np.save(file, np.eye(5)[[i % 5, (i + 1) % 5]].sum(axis=0))
    return {"npy": file.getvalue()}


def test_a_folder_of_many_labels(tmp_path, vocabulary, params, functions):
    item = benchmark(write(tmp_path / "voc", multi_hot, dataset_type="multilabel"), vocabulary)
    item.check()
    values = item.evaluate(params, functions, None)
    assert values["accuracy"] == pytest.approx(9 / 11)
    assert 0.5 < values["mean_average_precision"] < 1


@pytest.mark.parametrize("stated", [True, False])
def test_a_folder_of_captions(tmp_path, vocabulary, params, functions, stated):
    """The first two captions of each image; shards are read one after the other."""

    def texts(i):
        return {"txt": f"a {WORDS[i % 5]}\n{WORDS[i % 5]}, a\na photo of {WORDS[i % 5]}".encode()}

    folder = write(tmp_path / "coco", texts, dataset_type="retrieval" if stated else None)
    if not stated:
        (folder / "classnames.txt").unlink()
    item = benchmark(folder, vocabulary, max_captions=2)
    item.check()
    values = item.evaluate(params, functions, None)
    assert values["num_images"] == COUNT and values["num_captions"] == 2 * COUNT
    numbers = [*range(0, COUNT, 2), *range(1, COUNT, 2)]
    scores = np.repeat(np.eye(5)[[i % 5 for i in numbers]], 2, axis=0) @ params["images"][numbers].T
    own = np.repeat(np.arange(COUNT), 2)
    for k in (1, 5, 10):
        images = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        texts = np.argsort(-scores.T, axis=1, kind="stable")[:, :k]
        text_to_image = (images == own[:, None]).any(axis=1).mean()
        image_to_text = (own[texts] == np.arange(COUNT)[:, None]).any(axis=1).mean()
        assert values[f"text_to_image_recall_at_{k}"] == pytest.approx(text_to_image)
        assert values[f"image_to_text_recall_at_{k}"] == pytest.approx(image_to_text)
        assert k == 10 or 0 < text_to_image < 1


def test_data_sets_are_called_as_their_folders(tmp_path, vocabulary, params, functions):
    """One, several, or all that lie in a folder."""

    def make(folders):
        return clip_benchmark.evaluators(
            folders, vocabulary, tiny_records.LENGTHS, 8, preprocessors.squash
        )

    write(tmp_path / "all" / "wds_voc", multi_hot, dataset_type="multilabel")
    write(tmp_path / "all" / "wds_tiny", lambda i: {"cls": str(i % 5).encode()})
    (tmp_path / "all" / "notes").mkdir()
    root = str(tmp_path / "all")
    found = make(root)
    assert list(found) == ["wds_tiny", "wds_voc"]
    values = {name: item.evaluate(params, functions, None) for name, item in found.items()}
    assert {name for name, value in values.items() if "mean_average_precision" in value} == {
        "wds_voc"
    }
    assert list(make(f"{root}/wds_voc/")) == ["wds_voc"]
    assert list(make([f"{root}/wds_voc", f"{root}/wds_tiny"])) == ["wds_voc", "wds_tiny"]
    assert list(make(["absent"])) == ["absent"]  # for its own check to refuse
    with pytest.raises(UserError, match="wds_voc of CLIP_BENCHMARK_DIRS are both called wds_voc"):
        make([root, f"{root}/wds_voc"])
    for folders in ([], None, [None]):
        with pytest.raises(UserError, match="CLIP_BENCHMARK_DIRS is .*: give folders"):
            make(folders)


def test_another_list_than_the_arrays_is_refused(tmp_path, vocabulary):
    folder = write(tmp_path / "voc", multi_hot, dataset_type="multilabel")
    (folder / "classnames.txt").write_text("\n".join((*WORDS, "big")))
    refused(folder, vocabulary, "has 5 classes, but .*classnames.txt has 6 lines")


def refused(folder, vocabulary, part):
    with pytest.raises(UserError, match=part):
        benchmark(folder, vocabulary).check()


def test_folders_that_are_not_whole_are_refused(tmp_path, vocabulary):
    refused(tmp_path / "gone", vocabulary, "not in clip_benchmark's layout: .*nshards.txt")
    folder = write(tmp_path / "tiny", lambda i: {"cls": str(i % 5).encode()})
    (folder / "test" / "nshards.txt").write_text("3\n")
    refused(folder, vocabulary, "says 3 shards, but 2 lie beside it")
    (folder / "test" / "nshards.txt").write_text("2\n")
    (folder / "dataset_type.txt").write_text("captioning\n")
    refused(folder, vocabulary, "says 'captioning'")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    refused(folder, vocabulary, "have no field 'txt'")
    (folder / "dataset_type.txt").unlink()
    (folder / "zeroshot_classification_templates.txt").unlink()
    refused(folder, vocabulary, "zeroshot_classification_templates.txt does not exist")
