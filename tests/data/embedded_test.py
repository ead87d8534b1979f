import hashlib
import io
import json

import pytest
import tensorflow as tf

from clipa_t5x.data import build, digits, embedded, shapes, word_classes, wordpiece
from clipa_t5x.errors import UserError

SMALL = ["--num_train=40", "--num_validation=6", "--num_zeroshot=33", "--image_size=16"]


def run(output_dir, *flags, name="shapes", num_workers=0):
    flags = [*SMALL, f"--num_workers={num_workers}", *flags] if name == "shapes" else [*flags]
    return build.main([name, f"--output_dir={output_dir}", "--num_shards=3", *flags])


def files(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def read_split(directory, split):
    paths = sorted(str(path) for path in (directory / split).iterdir())
    return [
        tf.train.Example.FromString(record.numpy()).features.feature
        for path in paths
        for record in tf.data.TFRecordDataset(path)
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "shapes"
    assert run(directory) == 0
    return directory


@pytest.fixture(scope="module")
def built_digits(tmp_path_factory):
    pytest.importorskip("sklearn")
    directory = tmp_path_factory.mktemp("data") / "digits"
    assert run(directory, name="digits") == 0
    return directory


def test_layout(built):
    assert set(files(built)) == {
        *(f"{split}/{i:05d}.tfrecord" for split in shapes.SPLITS for i in range(3)),
        *(f"classes/{name}.txt" for name in ("shape", "color", "combination")),
        *(f"templates/{name}.txt" for name in ("shapes", "shape", "color")),
        "vocab.txt",
        "vocab.tags.json",
        "manifest.json",
    }
    assert [path.name for path in built.parent.iterdir()] == ["shapes"]


def test_manifest_tells_the_truth(built):
    manifest = json.loads((built / "manifest.json").read_text())
    assert (manifest["name"], manifest["seed"]) == ("shapes", 0)
    assert manifest["arguments"] == {
        "num_train": 40,
        "num_validation": 6,
        "num_zeroshot": 33,
        "image_size": 16,
        "seed": 0,
        "num_shards": 3,
    }
    for split, size in (("train", 40), ("validation", 6), ("zeroshot", 33)):
        facts = manifest["splits"][split]
        for shard in facts["shards"]:
            data = (built / split / shard["file"]).read_bytes()
            assert shard["sha256"] == hashlib.sha256(data).hexdigest()
            assert shard["bytes"] == len(data)
        records = read_split(built, split)
        assert (
            facts["records"] == sum(s["records"] for s in facts["shards"]) == len(records) == size
        )
        lengths = [len(r["txt"].bytes_list.value[0].split()) for r in records]
        words = facts["caption_words"]
        assert (words["min"], words["max"]) == (min(lengths), max(lengths))
        assert words["mean"] == pytest.approx(sum(lengths) / size, abs=1e-3)


def test_records_are_what_img2dataset_writes(built):
    vocabulary = (built / "vocab.txt").read_text().splitlines()
    assert vocabulary[:3] == ["[PAD]", "[UNK]", "[CLS]"]
    keys = []
    for features in read_split(built, "train"):
        assert set(features) == {"key", "jpg", "txt", "width", "height"}
        assert features["width"].int64_list.value == [16]
        assert tf.io.decode_jpeg(features["jpg"].bytes_list.value[0]).shape == (16, 16, 3)
        text = features["txt"].bytes_list.value[0].decode("utf-8")
        assert set(wordpiece.basic_tokenize(text)) <= set(vocabulary)
        keys.append(features["key"].bytes_list.value[0])
    assert sorted(keys) == [b"%08d" % i for i in range(40)]


def test_labels_index_the_class_files(built):
    names = {
        name: (built / "classes" / f"{name}.txt").read_text().splitlines()
        for name in ("shape", "color", "combination")
    }
    for features in read_split(built, "zeroshot"):
        label = {name: features[name].int64_list.value[0] for name in names}
        pattern, color, shape = names["combination"][label["combination"]].split()
        assert names["shape"][label["shape"]] == shape
        assert names["color"][label["color"]] == color
        assert pattern in shapes.PATTERNS
    for path in (built / "templates").iterdir():
        assert all(line.count("{}") == 1 for line in path.read_text().splitlines())


def test_bytes_do_not_depend_on_the_workers(built, tmp_path):
    assert run(tmp_path / "again", num_workers=2) == 0
    assert files(tmp_path / "again") == files(built)


def test_vocabulary_does_not_depend_on_seed_and_size(built, tmp_path):
    assert run(tmp_path / "other", "--seed=5", "--num_train=3") == 0
    other = files(tmp_path / "other")
    assert other["vocab.txt"] == (built / "vocab.txt").read_bytes()
    assert other["train/00000.tfrecord"] != (built / "train" / "00000.tfrecord").read_bytes()


def test_finished_data_set_is_left_alone(built, capsys):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    assert run(built, num_workers=1) == 0
    assert "already holds this data set" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


def test_another_data_set_is_replaced_only_when_told(tmp_path, capsys):
    target = tmp_path / "shapes"
    assert run(target) == 0
    before = files(target)
    assert run(target, "--seed=1") == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert "--overwrite" in captured.err
    assert "seed=0" in captured.err
    assert files(target) == before
    assert run(target, "--seed=1", "--overwrite") == 0
    assert json.loads((target / "manifest.json").read_text())["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_data_set_that_lost_a_shard_is_not_taken_for_finished(tmp_path, capsys):
    assert run(tmp_path / "shapes") == 0
    complete = files(tmp_path / "shapes")
    (tmp_path / "shapes" / "train" / "00001.tfrecord").unlink()
    assert run(tmp_path / "shapes") == 2
    assert "incomplete" in capsys.readouterr().err
    assert run(tmp_path / "shapes", "--overwrite") == 0
    assert files(tmp_path / "shapes") == complete


def test_other_files_are_never_replaced(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    for flags in ([], ["--overwrite"]):
        assert run(tmp_path, *flags) == 2
        assert "--overwrite" in capsys.readouterr().err
    assert files(tmp_path) == {"thesis.txt": b"years of work"}
    assert run(tmp_path / "thesis.txt") == 2
    assert "not a local directory" in capsys.readouterr().err


def test_empty_and_linked_directories_are_used(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert run(tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "manifest.json").is_file()


def test_failure_leaves_nothing_behind(tmp_path):
    def broken():
        yield from shapes.examples("train", 2, image_size=16)
        raise OSError("disk on fire")

    dataset = embedded.Dataset(
        "broken", {"seed": 0}, {"train": (3, broken)}, {}, {}, shapes.phrases()
    )
    with pytest.raises(OSError, match="disk on fire"):
        embedded.build(dataset, tmp_path / "broken", progress_stream=io.StringIO())
    assert list(tmp_path.iterdir()) == []


def test_caption_outside_the_vocabulary_is_a_bug(tmp_path):
    dataset = embedded.Dataset(
        "x", {"seed": 0}, {"t": (1, lambda: iter([{"txt": "an aardvark"}]))}, {}, {}, ["an"]
    )
    with pytest.raises(AssertionError, match="aardvark"):
        embedded.build(dataset, tmp_path / "x", progress_stream=io.StringIO())


def test_remote_directory_is_refused():
    with pytest.raises(UserError, match="local directory"):
        embedded.build(embedded.digits_dataset(), "gs://bucket/digits")


def test_digits(built_digits):
    keys = {}
    for split, size in digits.SPLITS.items():
        records = read_split(built_digits, split)
        assert len(records) == size
        keys[split] = {r["key"].bytes_list.value[0] for r in records}
        assert len(keys[split]) == size
        names = (built_digits / "classes" / "digit.txt").read_text().splitlines()
        for record in records:
            label = record["label"].int64_list.value[0]
            text = record["txt"].bytes_list.value[0].decode()
            assert {names[label], str(label)} & set(text.split())
    assert not keys["train"] & keys["validation"]


@pytest.mark.parametrize("name, module", [("shapes", shapes), ("digits", digits)])
def test_built_vocabularies_have_their_word_classes(request, name, module):
    directory = request.getfixturevalue({"shapes": "built", "digits": "built_digits"}[name])
    pieces = (directory / "vocab.txt").read_text().splitlines()
    classes = word_classes.read(str(directory / "vocab.txt"), len(pieces))
    found = dict(zip(pieces, classes.tolist(), strict=True))
    listed = module.word_classes()
    for kind, words in listed.items():
        assert {found[word] for word in words} == {word_classes.NAMES[kind]}
    # Every class name is made of nouns and adjectives, which the syntax reduction keeps first.
    for names in module.class_lists().values():
        kept = {found[word] for text in names for word in text.split()}
        assert kept <= {word_classes.NOUN, word_classes.ADJECTIVE}
    assert sum(map(len, listed.values())) == sum(classes != word_classes.OTHER)
    table = json.loads((directory / "vocab.tags.json").read_text())
    assert table["tagger"] == "builtin"
