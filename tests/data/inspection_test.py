import numpy as np
import pytest
import sample_sets
import tiny_tars
from PIL import Image

from clipa_t5x.data import conversion, inspection, shard_conversion
from clipa_t5x.errors import UserError


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    tiny_tars.write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def converted(tars, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    options = shard_conversion.Options(output_format="tfrecord", caption_keys=("txt", "json:more"))
    for split in ("train", "validation"):
        conversion.convert(
            str(tars), str(folder), split=split, options=options, records_per_shard=8, num_workers=0
        )
    return folder


def inspect(path, **arguments):
    return "\n".join(inspection.inspect(str(path), **arguments))


def row(text, name):
    """The numbers of a quantity: min, p5, p50, p95, max, mean."""
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [name])
    return [float(number) for number in line.split()[1:]]


def test_a_shard(tars):
    text = inspect(tars / "00001.tar")
    assert "00001.tar: 7 records, webdataset, 1 shard, 0.0 MB" in text
    image = tiny_tars.sample(7)["jpg"]
    assert f"jpg      {len(image):,} bytes, image (JPEG) of 56 x 40" in text
    assert "txt      14 bytes, text 'photo number 7'" in text
    assert """text '{"synthetic": "made up 7", "label": 1, "more": ["a", "b 7"]}'""" in text
    assert row(text, "height") == [40, 40, 40, 61, 61, 49]
    assert row(text, "caption_words") == [3, 3, 3, 3, 3, 3]
    assert "captions: txt" in text and "bad records: 0" in text and "manifest: none" in text


@pytest.mark.parametrize("kind", sample_sets.FORMATS)
def test_every_format_is_described(tmp_path, kind):
    # A folder of class folders is looked at class by class.
    path = tmp_path / "set" / ("train" if kind == "folder" else "")
    sample_sets.write(tmp_path / "set", kind)
    text = inspect(path)
    assert "set/train" in text and "bad records: 0" in text
    assert "image (JPEG)" in text and "captions: txt" in text


def test_a_folder_of_shards(tars):
    before = sorted(tars.iterdir())
    text = inspect(tars)
    assert "21 records, webdataset, 3 shards, 7 to 7 records each" in text
    assert sorted(tars.iterdir()) == before


def test_a_data_set_with_its_manifest(converted):
    text = inspect(converted, caption_keys=("txt", "more"), everything=True)
    for split in ("train", "validation"):
        assert f"{converted}/{split}: 21 records, tfrecord, 3 shards, 5 to 8 records each" in text
    agree = "3 shards are as manifest.json says (records, bytes); 3 checksums agree"
    assert text.count(agree) == 2
    assert "more    1 bytes, text 'a', the first of 2" in text
    assert "label" not in text
    assert "width   integer 40" in text


def test_what_disagrees_with_the_manifest_comes_last(converted, tmp_path):
    for name in ("manifest.json", "train/00000.tfrecord", "train/00001.tfrecord"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((converted / name).read_bytes())
    told = []
    with pytest.raises(UserError, match="00002.tfrecord, 5 records by manifest.json, is missing"):
        told.extend(inspection.inspect(str(tmp_path / "train")))
    # `extend` keeps what came before the error.
    assert any("16 records" in text for text in told)


def test_bad_records_are_counted_by_reason_and_drawn_gray(tmp_path):
    bad = {f"{i}": {"jpg": b"nothing", "txt": b"x"} for i in range(3)}
    tiny_tars.write(tmp_path / "0.tar", {**bad, "9": tiny_tars.sample(9)})
    text = inspect(tmp_path / "0.tar", output=str(tmp_path / "grid.png"))
    assert "bad records: 3, not an image 3 (75.0%)" in text
    assert "7 bytes, text 'nothing'" in text
    assert "4 pictures with captions are in" in text
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid[80, 80].tolist() == [225, 225, 225]


def test_the_grid_has_as_many_pictures_as_asked_for(converted, tmp_path):
    text = inspect(converted / "train", num_pictures=4, output=str(tmp_path / "grid.png"))
    assert f"4 pictures with captions are in {tmp_path}/grid.png" in text
    assert Image.open(tmp_path / "grid.png").size == (2 * 168 + 8, 2 * 232 + 8)


def test_a_bounded_number_of_records_is_looked_at(tars, monkeypatch):
    monkeypatch.setattr(inspection, "_RECORDS_TO_LOOK_AT", 5)
    assert "of 5 records, spread evenly:" in inspect(tars)
    assert "of 21 records:" in inspect(tars, everything=True)


def test_mistakes_are_told(tars, tmp_path):
    with pytest.raises(UserError, match="no shards match"):
        inspect(tmp_path / "nowhere")
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match="x.tar is not a tar file"):
        inspect(tmp_path / "x.tar")
    with pytest.raises(UserError, match="cannot write --output="):
        inspect(tars, output=str(tmp_path / "no" / "grid.png"))


def test_an_empty_shard(tmp_path):
    (tmp_path / "x.tfrecord").write_bytes(b"")
    assert "1 shards without a record" in inspect(tmp_path / "x.tfrecord")
