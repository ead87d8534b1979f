import os

import numpy as np
import pytest
import sample_sets
from sample_sets import COUNT, FORMATS

from clipa_t5x.data import (
    array_records,
    formats,
    image_folders,
    image_tables,
    parquet_tables,
    shard_formats,
    tfrecords,
    webdataset,
)
from clipa_t5x.errors import UserError


@pytest.fixture(scope="module", params=FORMATS)
def written(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return sample_sets.write(root, request.param), request.param


def test_the_same_samples_in_every_format(written):
    found = sample_sets.read(sample_sets.source(*written))
    assert found["encoded_image"].tolist() == [sample_sets.image(i) for i in range(COUNT)]
    captions = [caption.decode() for caption in found["caption"]]
    assert captions == [sample_sets.caption(i) for i in range(COUNT)]
    assert found["label"].tolist() == [sample_sets.label(i) for i in range(COUNT)]
    assert found["valid"].all()
    np.testing.assert_array_equal(found["image_size"], [(24, 32)] * COUNT)


def test_the_same_stream_in_every_format(written, tmp_path):
    data_dir, kind = written
    reference = sample_sets.source(sample_sets.write(tmp_path, "tfrecord"), "tfrecord")
    places = [5, 40, 0, 39, 10**12]
    expected = sample_sets.read(reference, places, shuffle=True, seed=7)
    found = sample_sets.read(sample_sets.source(data_dir, kind), places, shuffle=True, seed=7)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_indices_are_kept_and_used_again(written, monkeypatch):
    expected = sample_sets.read(sample_sets.source(*written))
    again = sample_sets.source(*written)
    kind = type(formats.resolve(again.list_shards("train"), None)[1])
    monkeypatch.setattr(kind, "scan", lambda *_: pytest.fail("scanned again"))
    found = sample_sets.read(again)
    assert found["caption"].tolist() == expected["caption"].tolist()


def test_every_format_keeps_to_the_protocol(written):
    source = sample_sets.source(*written)
    (shard, *_), shard_format = formats.resolve(source.list_shards("train"), None)
    assert shard_format is not None
    scan = shard_format.scan(shard)
    assert scan.rows.dtype == np.int64 and scan.rows.shape[1] == shard_format.columns
    assert not scan.problem
    assert set(shard_format.patterns) == {"train", "validation"}
    with shard_format.open(shard) as opened:
        fields = opened.read(scan.rows[0])
        assert shard_formats.first_present(fields, "jpg") == sample_sets.image(0)
        assert fields.get("absent") is None
        assert opened.read(scan.rows[0]) == fields


@pytest.mark.parametrize("name, kind", [
    ("a/00000.tfrecord", tfrecords.TFRecord),
    ("gs://b/set-train.tfrecord-00000-of-00008", tfrecords.TFRecord),
    ("00000.tfrecords", tfrecords.TFRecord),
    ("s3://b/00000.tar", webdataset.WebDataset),
    ("x.array_record", array_records.ArrayRecord),
    ("set-train.array_record-00003-of-00008", array_records.ArrayRecord),
    ("t.csv", image_tables.CSV),
    ("t.tsv", image_tables.CSV),
    ("data/train-00000-of-00002.parquet", parquet_tables.Parquet),
])  # fmt: skip
def test_names_tell_the_format(name, kind):
    assert type(formats.by_path(name)) is kind
    assert getattr(formats.by_path(name), "delimiter", "") == {"t.csv": ",", "t.tsv": "\t"}.get(
        name, ""
    )


def test_a_folder_of_images_is_a_format(tmp_path):
    (tmp_path / "a.png").touch()
    assert isinstance(formats.by_path(str(tmp_path)), image_folders.ImageFolder)
    assert isinstance(formats.by_path(f"{tmp_path}/"), image_folders.ImageFolder)


@pytest.mark.parametrize("name", ["a/records.bin", "notes.tfrecord.d/x", "list.csv.gz", "absent/"])
def test_unknown_names_are_refused(name):
    with pytest.raises(UserError, match=f"{os.path.basename(name)}.* is of no known format"):
        formats.by_path(name)


def test_records_go_before_tables_and_tables_before_images():
    """As img2dataset leaves parquet files beside its shards, and a table lies among its images."""
    shards = ["d/0.tar", "d/1.tar"]
    found, kind = formats.resolve(["d/0.parquet", *shards, "d/0_stats.json"], None)
    assert found == shards and isinstance(kind, webdataset.WebDataset)
    found, kind = formats.resolve(["d/a.jpg", "d/b.csv", "d/c.txt"], None)
    assert found == ["d/b.csv"] and isinstance(kind, image_tables.CSV)
    assert formats.resolve(["d/readme.md", "d/x.txt"], None) == ([], None)


@pytest.mark.parametrize("names", [("d/0.tar", "d/1.tfrecord"), ("d/a.csv", "d/b.parquet")])
def test_two_formats_at_one_place_are_refused(names):
    with pytest.raises(UserError, match="several formats.*DATA_SPLITS"):
        formats.resolve(list(names), None)
    # Whoever says which it is has said enough.
    assert formats.resolve(list(names), webdataset.WebDataset())[0] == list(names)


def test_every_split_has_a_format_of_its_own(tmp_path):
    sample_sets.write(tmp_path, "tfrecord")
    sample_sets.write(tmp_path / "other", "csv")
    splits = {"train": "train/*", "eval": "other/train/*"}
    source = sample_sets.source(tmp_path, "csv", splits=splits)
    assert source.num_input_examples("train") == source.num_input_examples("eval") == COUNT


def test_files_of_no_known_format_are_named(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "records.bin").touch()
    with pytest.raises(UserError, match="no file of a known format matches .*train/\\*"):
        sample_sets.source(tmp_path, "tar").index("train")
