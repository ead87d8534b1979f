import json
import pathlib

import numpy as np
import pytest
import sample_sets
import tensorflow_datasets as tfds
import tiny_records

from clipa_t5x.data import sources, tasks, tfds_datasets
from clipa_t5x.errors import UserError

COUNT = 13


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """A data set of a few pictures, as users write them for TFDS."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # else TFDS looks for them beside the module, which pytest imports its own way

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["cat", "dog", "fish"]),
            "caption": tfds.features.Text(),
            "labels": tfds.features.Sequence(tfds.features.ClassLabel(num_classes=7)),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0), "test": self._generate_examples(5)}

    def _generate_examples(self, first):
        for i in range(first, COUNT):
            path = pathlib.Path(self._data_dir_root) / f"{i}.jpg"
            path.write_bytes(sample_sets.image(i))
            yield i, {"image": path, "label": i // 5, "caption": sample_sets.caption(i),
                     "labels": [2, i % 2][: i % 3]}  # fmt: skip


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def data_dir(request, tmp_path_factory):
    root = str(tmp_path_factory.mktemp("tfds"))
    builder = TinyPictures(data_dir=root, file_format=request.param)
    config = tfds.download.DownloadConfig(num_shards=3)
    builder.download_and_prepare(download_config=config)
    return root


def source(data_dir, name="tiny_pictures", **kwargs):
    fields = sources.RecordFields("image", {"caption": 1.0}, "label")
    return tfds_datasets.TFDSSource(name, data_dir, fields, **kwargs)


def own_order(data_dir, split):
    """What TFDS itself reads, in order: captions and labels."""
    builder = tfds.builder_from_directory(f"{data_dir}/tiny_pictures/1.0.0")
    shards = [str(path) for path in builder.info.splits[split].filepaths]
    config = tfds.ReadConfig(interleave_cycle_length=1)
    if builder.info.file_format.value == "tfrecord":
        records = tfds.as_numpy(builder.as_dataset(split=split, read_config=config))
    else:
        records = builder.as_data_source(split=split)
    found = list(records)
    texts = [r["caption"] if isinstance(r["caption"], bytes) else r["caption"].encode()
             for r in found]  # fmt: skip
    return shards, texts, [int(r["label"]) for r in found]


@pytest.mark.parametrize("split, count", [("train", COUNT), ("test", COUNT - 5)])
def test_records_are_in_the_order_of_tfds(data_dir, split, count):
    shards, texts, labels = own_order(data_dir, split)
    examples = source(data_dir).examples_at(split, np.arange(count), shuffle=False, seed=0)
    assert source(data_dir).list_shards(split) == shards and len(shards) > 1
    assert examples["caption"].tolist() == texts and len(texts) == count
    assert examples["label"].tolist() == labels
    assert sorted(examples["encoded_image"].tolist()) == sorted(
        sample_sets.image(i) for i in range(COUNT - count, COUNT)
    )


def test_a_task_reads_it(data_dir):
    name = tasks.tfds_task("pictures", "tiny_pictures", data_dir, splits={"validation": "test"})
    assert tasks.get_source(name).num_input_examples("validation") == COUNT - 5
    ds = tasks.get_task(name).get_dataset(tiny_records.LENGTHS, "validation", shuffle=False)
    (first, *_) = ds.as_numpy_iterator()
    assert first["images"].shape == (16, 16, 3) and "label" in first


def test_classes_are_counted_by_tfds(data_dir):
    several = {"label_key": None, "labels_key": "labels"}
    for keys, count in (({}, 3), (several, 7), ({"label_key": None}, None)):
        name = tasks.tfds_task("pictures", "tiny_pictures", data_dir, **keys)
        examples = tasks.get_source(name).examples_at(
            "train", np.arange(COUNT), shuffle=False, seed=0
        )
        assert tasks.get_source(name).num_classes("test") == count
        if keys is several:
            rows = [row[row >= 0].tolist() for row in examples["labels"]]
            assert sorted(rows) == sorted([2, i % 2][: i % 3] for i in range(COUNT))


def test_the_folder_of_a_version_will_do(data_dir):
    folder = f"{data_dir}/tiny_pictures/1.0.0"
    assert source(folder, None).num_input_examples("train") == COUNT


def test_data_sets_have_indices_of_their_own(data_dir, tmp_path):
    source(data_dir).num_input_examples("train")
    assert (pathlib.Path(data_dir) / ".record_index/tiny_pictures/train.json").exists()
    for name in ("tiny_pictures", "tiny_pictures:1.0.0"):
        source(data_dir, name, index_dir=str(tmp_path)).num_input_examples("train")
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["tiny_pictures", "tiny_pictures_1.0.0"]
    assert len(list(tmp_path.rglob("train*.npy"))) == 2


@pytest.mark.parametrize("name, split, said", [
    ("absent", "train", "no prepared TFDS data set 'absent' lies at .*tfds build"),
    (None, "train", "no prepared TFDS data set lies at .*data_dir"),
    ("tiny_pictures", "validation", "'validation' .* which has (train, test|test, train)"),
    ("tiny_pictures", "other", "split 'other' "),
])  # fmt: skip
def test_what_is_not_there_is_named(data_dir, name, split, said):
    with pytest.raises(UserError, match=said):
        source(data_dir, name).num_input_examples(split)


def test_slices_are_refused(data_dir):
    with pytest.raises(UserError, match=r"split 'half' \(train\[:50%\]\)"):
        source(data_dir, splits={"half": "train[:50%]"}).num_input_examples("half")


def copied(data_dir, tmp_path):
    import shutil

    shutil.copytree(data_dir, tmp_path / "copy", ignore=shutil.ignore_patterns(".record_index"))
    return str(tmp_path / "copy")


def test_counts_that_disagree_name_the_shard(data_dir, tmp_path):
    root = copied(data_dir, tmp_path)
    shard = pathlib.Path(source(root).list_shards("train")[1])
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shard} holds . records where dataset_info.json says"):
        source(root).num_input_examples("train")


def test_other_formats_are_named(data_dir, tmp_path):
    root = copied(data_dir, tmp_path)
    path = pathlib.Path(root) / "tiny_pictures/1.0.0/dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "fileFormat": "riegeli"}))
    with pytest.raises(UserError, match="format riegeli: prepare it as tfrecord or array_record"):
        source(root).num_input_examples("train")


def test_nothing_is_read_before_it_is_needed():
    assert set(source("/nowhere").splits) == {"train", "validation", "test"}
