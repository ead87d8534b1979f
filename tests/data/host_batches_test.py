import io
import itertools

import numpy as np
import pytest
import tiny_records
from PIL import Image

from clipa_t5x.data import host_batches, record_writer, tasks
from clipa_t5x.errors import UserError

COUNT = 13


def broken_jpeg(i):
    """A JPEG whose header and end are in order, and whose Huffman table is none."""
    raw = bytearray(record_writer.encode_jpeg(tiny_records.picture(i)))
    at = raw.index(b"\xff\xc4")
    raw[at + 4 : at + 40] = b"\xff" * 36
    return bytes(raw)


def make(tmp_path, broken=(), **kwargs):
    """A task of 13 records; decoders fail at the `broken` ones."""
    records = tiny_records.records(COUNT)
    for i in broken:
        records[i] = tiny_records.records(i + 1, jpg=broken_jpeg(i))[i]
    record_writer.write_shards(tmp_path / "train", records, 1)
    return tiny_records.task("host_batches_test", tmp_path, **kwargs)


def take(cfg, count, rows=None, first=0):
    rows = np.arange(cfg.batch_size) if rows is None else np.asarray(rows)
    return list(itertools.islice(host_batches.train(cfg, rows, first), count))


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def test_undecodable_images_are_replaced(tmp_path):
    name = make(tmp_path, broken=[0, 6, 12], vocabulary=None)
    batches = take(tiny_records.config(name, 5), 8)
    for step, batch in enumerate(batches):
        assert batch["index"].tolist() == list(range(5 * step, 5 * step + 5))
        assert batch["images"].shape == (5, 16, 16, 3) and batch["valid"].all()
    assert set(joined(batches)["label"]) <= {i % 5 for i in range(COUNT)}
    assert tasks.get_source(name).records.counts()["bad/undecodable image"] >= 9


@pytest.mark.parametrize(
    "batch_size, rows, first",
    [(6, [1, 4], 0), pytest.param(20, range(20), 7, marks=pytest.mark.slow)],
)
def test_replacements_are_the_same_for_every_process_and_start(tmp_path, batch_size, rows, first):
    name = make(tmp_path, broken=[0, 6, 12])
    whole = joined(take(tiny_records.config(name, 5), 12))
    for step, part in enumerate(take(tiny_records.config(name, batch_size), 2, rows, first)):
        indices = first + step * batch_size + np.asarray(list(rows))
        for key, value in part.items():
            np.testing.assert_array_equal(value, whole[key][indices])


def test_an_evaluation_marks_undecodable_images(tmp_path):
    name = make(tmp_path, broken=[5, 12], vocabulary=None)
    cfg = tiny_records.config(name, 4, shuffle=False)
    for rows in (range(4), [1, 2]):
        batches = list(host_batches.evaluation(cfg, np.asarray(rows), COUNT))
        assert len(batches) == 4
        for step, batch in enumerate(batches):
            wanted = np.minimum(4 * step + np.asarray(rows), COUNT - 1)
            assert batch["index"].tolist() == wanted.tolist()
            assert batch["valid"].tolist() == [i not in (5, 12) for i in wanted]


def test_a_run_of_broken_images_is_bridged(tmp_path):
    name = make(tmp_path, broken=range(7), vocabulary=None)
    (batch,) = take(tiny_records.config(name, COUNT, shuffle=False), 1)
    assert batch["label"][7:].tolist() == [i % 5 for i in range(7, COUNT)]
    assert batch["valid"].all() and batch["index"].tolist() == list(range(COUNT))


def test_a_split_that_cannot_be_decoded_is_refused(tmp_path):
    name = make(tmp_path, broken=range(COUNT), vocabulary=None)
    with pytest.raises(
        UserError, match="none of the last .* images of host_batches_test can be decoded"
    ):
        take(tiny_records.config(name, 4), 1)


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 600])
def test_rows_are_read_in_parts(tmp_path, rows):
    name = make(tmp_path, vocabulary=None)
    cfg = tiny_records.config(name, 600, task_feature_lengths={"images": 4, "text": 8})
    chosen = np.arange(600)[-rows:]
    batches = take(cfg, 2, chosen, first=1200)
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["index"], 1200 + 600 * step + chosen)


def test_every_kind_of_image_arrives(tmp_path):
    """Whatever a record's image is like, batches are full and nothing is raised."""

    def encode(form, mode="RGB", **kwargs):
        buffer = io.BytesIO()
        Image.fromarray(tiny_records.picture(1)).convert(mode).save(buffer, form, **kwargs)
        return buffer.getvalue()

    images = [
        encode("JPEG"), encode("JPEG", "L"), encode("JPEG", "CMYK"), encode("PNG", "RGBA"),
        encode("PNG", "L"), encode("WEBP"), encode("GIF", "P"),
        encode("JPEG", progressive=True), encode("PNG", "1"), b"", encode("JPEG")[:300],
    ]  # fmt: skip
    records = [tiny_records.records(i + 1, jpg=data)[i] for i, data in enumerate(images)]
    record_writer.write_shards(tmp_path / "train", records, 1)
    name = tiny_records.task("host_batches_test", tmp_path)
    batch = joined(take(tiny_records.config(name, 8), 6))
    expected = tiny_records.picture(1).mean(axis=(0, 1))
    colours = batch["images"][np.isin(batch["label"], [0])].mean(axis=(1, 2))
    assert batch["valid"].all() and np.abs(colours - expected).mean() < 30
    counts = tasks.get_source(name).records.counts()
    expected = {"bad/empty image", "bad/truncated image", "mended/CMYK", "mended/alpha"}
    assert expected <= counts.keys()
