import csv
import io
import os
import random

import numpy as np
import pytest
import sample_sets
import tensorflow as tf

from clipa_t5x.data import image_tables
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.errors import UserError

CSV = image_tables.CSV()


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def records(folder, text, table=CSV):
    path = folder / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return sample_sets.records(table, path)


def random_table(seed):
    """Rows of odd values, and the table's text by the csv module."""
    rng = random.Random(seed)
    pieces = ['"', ",", "\n", "\r\n", "word", " ", "é", "\t", ""]
    rows = [
        ["a.jpg", *("".join(rng.choices(pieces, k=rng.randrange(6))) for _ in range(2))]
        for _ in range(50)
    ]
    buffer = io.StringIO(newline="")
    quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    writer = csv.writer(buffer, quoting=quoting, lineterminator=rng.choice(["\n", "\r\n"]))
    writer.writerows([["image", "one", "two"], *rows])
    return rows, buffer.getvalue()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("chunk_bytes", [7, 2**22])
def test_rows_are_what_the_csv_module_reads(folder, monkeypatch, seed, chunk_bytes):
    monkeypatch.setattr(image_tables._rows, "__defaults__", (chunk_bytes,))
    rows, text = random_table(seed)
    found = records(folder, text)
    assert [[r["one"][0].decode(), r["two"][0].decode()] for r in found] == [r[1:] for r in rows]


@pytest.mark.parametrize("text", [
    "image,txt\na.jpg,one\nb.jpg,two",  # no newline at the end
    "\ufeffimage,txt\na.jpg,one\nb.jpg,two\n",
    "image,txt\r\na.jpg,one\r\n\r\nb.jpg,two\r\n\r\n",
    'image,txt\n"a.jpg","one"\n"b.jpg",two\n',
    "id,image,txt\n1,a.jpg,one\n2,b.jpg,two\n",
    "id,filepath,txt\n1,a.jpg,one\n2,b.jpg,two\n",
])  # fmt: skip
def test_tables_as_they_are_written(folder, text):
    found = records(folder, text)
    assert [r["jpg"] for r in found] == [[b"a.jpg"], [b"b.jpg"]]
    assert [r["txt"] for r in found] == [[b"one"], [b"two"]]
    assert [r["__key__"] for r in found] == [[b"a.jpg"], [b"b.jpg"]]


def test_quotes_within_a_value_are_text(folder):
    found = records(folder, 'image,txt\na.jpg,a 5" pipe\nb.jpg,7" more"\n')
    assert [r["txt"] for r in found] == [[b'a 5" pipe'], [b'7" more"']]


def test_quotes_may_mean_nothing(folder):
    table = image_tables.CSV(delimiter="\t", quotechar="")
    found = records(folder, 'image\ttxt\na.jpg\t"open\nb.jpg\tend"\n', table)
    assert [r["txt"] for r in found] == [[b'"open'], [b'end"']]


def test_columns_of_the_same_name_are_several_captions(folder):
    (found,) = records(folder, "image,txt,txt,label\na.jpg,one,two,3\n")
    assert found["txt"] == [b"one", b"two"] and found["label"] == [b"3"]


def test_the_image_is_in_its_columns_field_too(folder):
    (found,) = records(folder, "picture,txt\na.jpg,one\n", image_tables.CSV(image_column="picture"))
    assert found["picture"] == found["jpg"] == [b"a.jpg"]
    (found,) = records(folder, "image,jpg\na.jpg,other\n")
    assert found["image"] == [b"a.jpg"] and found["jpg"] == [b"other"]


def test_images_anywhere(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "c.jpg"
    other.write_bytes(b"c")
    with tf.io.gfile.GFile("ram://tables/d.jpg", "wb") as f:
        f.write(b"d")
    found = records(folder, f"image\n{other}\n../{folder.name}/a.jpg\nram://tables/d.jpg\n")
    assert [r["jpg"] for r in found] == [[b"c"], [b"a.jpg"], [b"d"]]


def test_a_remote_table(folder):
    for name, data in (("t.csv", b"image,txt\na.jpg,one\n"), ("a.jpg", b"image")):
        with tf.io.gfile.GFile(f"ram://remote/{name}", "wb") as f:
            f.write(data)
    (found,) = sample_sets.records(CSV, "ram://remote/t.csv")
    assert found["jpg"] == [b"image"] and found["txt"] == [b"one"]


@pytest.mark.parametrize("row, reason", [
    ("absent.jpg,x", "missing image file"),
    ("a.jpg/b,x", "missing image file"),
    (",x", "missing image file"),
    ("\0,x", "missing image file"),
    ("ram://tables/absent.jpg,x", "missing image file"),
    ("folder,x", "unreadable image file"),
    ("a.jpg,x,y,z", "damaged row"),
    ("a.jpg," + "x" * 200_000, "damaged row"),
])  # fmt: skip
def test_bad_rows_cost_themselves_only(folder, row, reason):
    (folder / "folder").mkdir()
    first, bad, last = records(folder, f"image,txt\na.jpg,one\n{row}\nb.jpg,two\n")
    assert first["txt"] == [b"one"] and last["txt"] == [b"two"]
    assert isinstance(bad, BadRecord) and bad.reason == reason


@pytest.mark.parametrize("path", ["/dev/zero", "pipe", "x" * 300, "a/" * 3000, "loop", "huge"])
def test_what_is_no_file_of_an_image_costs_its_row_only(folder, path):
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "huge").touch()
    os.truncate(folder / "huge", 2**40)
    bad, good = records(folder, f"image,txt\n{path},one\na.jpg,two\n")
    assert isinstance(bad, BadRecord)
    assert bad.reason in ("unreadable image file", "missing image file")
    assert good["txt"] == [b"two"]


def test_rows_may_be_short_and_no_utf8(folder):
    found = records(folder, b"image,txt,label\na.jpg\nb.jpg,caf\xe9,1\n")
    assert found[0].get("txt") is None
    assert found[1]["txt"] == [b"caf\xe9"]


def test_addresses_on_the_web_are_refused(folder):
    with pytest.raises(UserError, match="web addresses .https://x/a.jpg.*img2dataset"):
        records(folder, "image,txt\nhttps://x/a.jpg,one\n")


@pytest.mark.parametrize("most", [10, 2**24])
def test_an_open_quote_takes_the_rest(folder, monkeypatch, most):
    monkeypatch.setattr(image_tables, "MAX_ROW_BYTES", most)
    path = folder / "table.csv"
    path.write_text('image,txt\na.jpg,one\nb.jpg,"two\na.jpg,three\na.jpg,four\n')
    found = CSV.scan(str(path))
    assert len(found.rows) == 1 and "byte 20 that does not end" in found.problem


@pytest.mark.parametrize("text, said", [
    (b"name,txt\nx,y\n", "no column image or .* its columns are name, txt: set CSV.image_column"),
    (bytes(range(256)) * 10, "does not begin with a header line"),
    (b"\n\n", "does not begin with a header line"),
    (b'"image', "does not begin with a header line"),
])  # fmt: skip
def test_what_is_no_table_of_images_is_refused(folder, text, said):
    with pytest.raises(UserError, match=said):
        records(folder, text)


def test_a_table_without_rows(folder):
    (folder / "t.csv").write_text("image,txt\n")
    found = CSV.scan(str(folder / "t.csv"))
    assert found.rows.shape == (0, 2) and not found.problem


def test_other_options_make_another_index():
    names = {image_tables.CSV(d, q).name for d in ",\t" for q in ('"', "")}
    assert len(names) == 4
    assert image_tables.CSV("\t").patterns["train"] == "train.tsv"


def test_a_table_that_has_shrunk(folder):
    (folder / "t.csv").write_text("image,txt\na.jpg,one\nb.jpg,two\n")
    rows = CSV.scan(str(folder / "t.csv")).rows
    (folder / "t.csv").write_text("image,txt\na.jpg,one\nb.j")
    with CSV.open(str(folder / "t.csv")) as table, pytest.raises(BadRecord, match="damaged row"):
        table.read(np.asarray(rows[1]))
