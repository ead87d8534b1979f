import os

import numpy as np
import pytest
import sample_sets
import tensorflow as tf

from clipa_t5x.data import image_folders
from clipa_t5x.data.bad_records import BadRecord

FORMAT = image_folders.ImageFolder()


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def test_images_are_told_by_their_names():
    assert all(map(image_folders.is_image, ("a.jpg", "A.JPEG", "x/b.png", "c.webp", "d.tiff")))
    assert not any(map(image_folders.is_image, ("a.txt", "jpg", ".hidden.jpg", "a.jpg.part", "")))


def test_folders_with_images_are_shards(tmp_path):
    touch(tmp_path, "b/1.jpg", "a/x/2.png", "a/1.txt", ".cache/3.jpg", "4.jpg")
    found = image_folders.folders(str(tmp_path))
    assert found == [str(tmp_path / name).rstrip("/") for name in ("", "a/x", "b")]
    assert image_folders.folders(str(tmp_path / "absent")) == []


def test_records_of_a_class(tmp_path):
    touch(tmp_path, "dog/2.jpg", "dog/1.png", "cat/3.jpg", ".x/4.jpg", "dog/notes.md")
    (tmp_path / "dog" / "1.txt").write_text("a dog\n")
    first, second = sample_sets.records(FORMAT, tmp_path / "dog")
    assert first == {
        "jpg": [b"dog/1.png"], "label": [1], "class": [b"dog"], "txt": [b"a dog"],
        "__key__": [b"1.png"],
    }  # fmt: skip
    assert second["jpg"] == [b"dog/2.jpg"] and "txt" not in second
    assert sample_sets.records(FORMAT, tmp_path / "cat")[0]["label"] == [0]


def test_a_new_class_moves_the_labels(tmp_path):
    touch(tmp_path, "b/1.jpg", "c/1.jpg")
    assert FORMAT.scan(str(tmp_path / "c")).rows[0, -1] == 1
    touch(tmp_path, "a/1.jpg")
    os.utime(tmp_path, ns=(1, 1))  # a clock may be too coarse to tell
    assert FORMAT.scan(str(tmp_path / "c")).rows[0, -1] == 2


def test_names_of_any_length_and_alphabet(tmp_path):
    long = "x" * 251 + ".jpg"
    odd = os.fsdecode(b"caf\xe9.jpg")
    names = [long, "東京.jpg", "a b.jpg", "ab.jpg", odd]
    for name in names:
        (tmp_path / name).write_bytes(os.fsencode(name))
    found = sample_sets.records(FORMAT, tmp_path)
    assert [r["jpg"] for r in found] == [[name] for name in sorted(map(os.fsencode, names))]


def test_an_image_that_is_gone(tmp_path):
    touch(tmp_path, "1.jpg", "2.jpg")
    rows = FORMAT.scan(str(tmp_path)).rows
    (tmp_path / "1.jpg").unlink()
    with FORMAT.open(str(tmp_path)) as folder:
        with pytest.raises(BadRecord, match="missing image file"):
            folder.read(rows[0])
        assert folder.read(rows[1])["jpg"] == [b"2.jpg"]


def test_a_remote_folder():
    for name in ("a/1.jpg", "b/2.jpg", "b/2.txt"):
        tf.io.gfile.makedirs(f"ram://folders/{name[0]}")
        with tf.io.gfile.GFile(f"ram://folders/{name}", "wb") as f:
            f.write(name.encode())
    assert image_folders.folders("ram://folders") == ["ram://folders/a", "ram://folders/b"]
    (found,) = sample_sets.records(FORMAT, "ram://folders/b")
    assert found["jpg"] == [b"b/2.jpg"] and found["txt"] == [b"b/2.txt"] and found["label"] == [1]


def test_a_file_that_comes_makes_the_index_anew(tmp_path):
    sample_sets.write(tmp_path, "folder", 7)
    assert sample_sets.source(tmp_path, "folder").num_input_examples("train") == 7
    touch(tmp_path / "train", "class_0/new.jpg")
    os.utime(tmp_path / "train" / "class_0", ns=(1, 1))
    assert sample_sets.source(tmp_path, "folder").num_input_examples("train") == 8


def test_a_named_folder_is_the_split(tmp_path):
    sample_sets.write(tmp_path, "folder", 7)
    source = sample_sets.source(tmp_path, "folder", image_folders.ImageFolder())
    assert [os.path.basename(path) for path in source.list_shards("train")] == [
        "class_0",
        "class_1",
    ]
    np.testing.assert_array_equal(sample_sets.read(source, range(7))["label"], [0] * 5 + [1] * 2)


def test_classes_are_the_folders_in_one(tmp_path):
    touch(tmp_path, "train/b/1.jpg", "train/c/1.jpg", "val/b/1.jpg", "train/.x/1.jpg")
    (tmp_path / "train" / "a").mkdir()
    train = image_folders.folders(str(tmp_path / "train"))
    assert image_folders.num_classes(train) == 3  # a has no image, but a label
    assert image_folders.num_classes(image_folders.folders(str(tmp_path))) is None
