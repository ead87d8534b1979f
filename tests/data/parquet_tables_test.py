import io
import pathlib
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sample_sets
import tensorflow as tf

from clipa_t5x.data import parquet_tables
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.errors import UserError

FORMAT = parquet_tables.Parquet()


def write(path, columns, row_group_size=4):
    sample_sets.write_parquet(path, columns, row_group_size)
    return str(path)


def images(count):
    return {"image": [b"image %d" % i for i in range(count)]}


@pytest.mark.parametrize("size", [1, 4, 100])
def test_rows_of_any_grouping(tmp_path, size):
    path = write(tmp_path / "0.parquet", images(9), size)
    rows = FORMAT.scan(path).rows
    assert rows.tolist() == [[i // size, i % size] for i in range(9)]
    found = sample_sets.records(FORMAT, path)
    assert [r["jpg"] for r in found] == [[b"image %d" % i] for i in range(9)]
    assert found[0]["image"] == found[0]["jpg"]


def test_values_of_all_types(tmp_path):
    columns = {
        **images(2),
        "texts": [["one", "two"], []],
        "whole": pa.array([3.0, 0.5]),
        "flag": [True, False],
        "small": pa.array([7, None], pa.int8()),
        "words": pa.array(["a", "b"]).dictionary_encode(),
        "when": pa.array([0, 1], pa.timestamp("s")),
        "nested": [{"a": 1}, {"a": 2}],
    }
    first, second = sample_sets.records(FORMAT, write(tmp_path / "0.parquet", columns))
    values = {k: v for k, v in first.items() if k not in ("image", "jpg", "__key__")}
    assert values == {
        "texts": [b"one", b"two"], "whole": [3], "flag": [1], "small": [7], "words": [b"a"]
    }  # fmt: skip
    assert set(second) - {"image", "jpg", "__key__"} == {"flag", "words"}


def test_images_embedded_or_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"file")
    cells = [
        {"bytes": b"data", "path": "x.jpg"},
        {"bytes": None, "path": "a.jpg"},
        {"bytes": b"data", "path": None},
        {"bytes": None, "path": None},
        None,
        {"bytes": None, "path": "absent.jpg"},
    ]
    found = sample_sets.records(FORMAT, write(tmp_path / "0.parquet", {"image": cells}))
    assert [r["jpg"] for r in found[:3]] == [[b"data"], [b"file"], [b"data"]]
    assert [r["__key__"] for r in found[:3]] == [[b"x.jpg"], [b"a.jpg"], [b""]]
    reasons = ["missing image", "missing image", "missing image file"]
    assert [r.reason for r in found[3:]] == reasons


def test_only_the_columns_asked_for_are_read(tmp_path):
    path = write(tmp_path / "0.parquet", {**images(3), "txt": ["a"] * 3, "other": ["b"] * 3})
    table = parquet_tables.Parquet(read_columns=["image", "txt"])
    assert set(sample_sets.records(table, path)[0]) == {"image", "jpg", "txt", "__key__"}


def test_a_remote_file(tmp_path):
    buffer = io.BytesIO()
    pq.write_table(pa.table(images(9)), buffer, row_group_size=4)
    with tf.io.gfile.GFile("ram://parquet/0.parquet", "wb") as f:
        f.write(buffer.getvalue())
    found = sample_sets.records(FORMAT, "ram://parquet/0.parquet")
    assert [r["jpg"] for r in found] == [[b"image %d" % i] for i in range(9)]


@pytest.mark.parametrize("keep", [0.4, 0.99])
def test_without_its_end_a_file_is_lost(tmp_path, keep):
    path = write(tmp_path / "0.parquet", images(50))
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(data[: int(keep * len(data))])
    found = FORMAT.scan(path)
    assert found.rows.shape == (0, 2)
    assert "was cut off" in found.problem and "\n" not in found.problem


@pytest.mark.parametrize("columns, said", [
    (None, "is not a parquet file"),
    ({"txt": ["a"]}, "no column image or .* its columns are txt: set Parquet.image_column"),
])  # fmt: skip
def test_what_is_no_table_of_images_is_refused(tmp_path, columns, said):
    path = tmp_path / "0.parquet"
    path.write_bytes(b"nothing of the kind")
    if columns:
        write(path, columns)
    with pytest.raises(UserError, match=said):
        FORMAT.scan(str(path))


def test_a_damaged_row_group_costs_itself_only(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "0.parquet"
    table = pa.table({"image": [rng.bytes(1000) for _ in range(12)]})
    pq.write_table(table, path, row_group_size=4, write_page_checksum=True, use_dictionary=False)
    first = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[first : first + 40] = bytes(40)
    path.write_bytes(data)
    found = sample_sets.records(FORMAT, path)
    assert [isinstance(r, BadRecord) for r in found] == [4 <= i < 8 for i in range(12)]
    assert found[4].reason == "damaged shard"


def test_memory_is_bounded(tmp_path):
    path = write(tmp_path / "0.parquet", {"image": [bytes(1000)] * 40})
    for most in (0, 9000):
        table = parquet_tables.Parquet(cache_bytes=most)
        sample_sets.records(table, path)
        assert 4000 < table.row_groups.num_bytes < max(5000, most)


def test_a_row_group_is_decoded_once_for_all_threads():
    groups, loads = parquet_tables._RowGroups(), []
    started, go_on = threading.Event(), threading.Event()

    def load():
        loads.append(1)
        started.set()
        go_on.wait(10)
        return pa.table({"a": [1]})

    found = []
    threads = [
        threading.Thread(target=lambda: found.append(groups.get(("p", 0), load, 100)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    started.wait(10)
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and len(found) == 4


def test_what_failed_is_tried_again():
    groups = parquet_tables._RowGroups()

    def fail():
        raise OSError("the network")

    with pytest.raises(OSError, match="the network"):
        groups.get(("p", 0), fail, 100)
    assert groups.get(("p", 0), lambda: pa.table({"a": [1]}), 100).num_rows == 1


def test_texts_that_are_no_utf8_cost_their_rows_only(tmp_path):
    path = tmp_path / "0.parquet"
    texts = pa.array([b"good", b"caf\xe9"]).view(pa.string())
    write(path, {**images(2), "txt": texts})
    good, bad = sample_sets.records(FORMAT, path)
    assert good["txt"] == [b"good"]
    assert isinstance(bad, BadRecord) and bad.reason == "damaged shard"


def test_columns_of_one_name_twice(tmp_path):
    path = tmp_path / "0.parquet"
    table = pa.table([pa.array([b"image"]), pa.array(["a"]), pa.array(["b"])], ["image", "t", "t"])
    pq.write_table(table, path)
    (found,) = sample_sets.records(FORMAT, path)
    assert isinstance(found, BadRecord) and "\n" not in str(found)


def test_more_rows_than_bytes_can_hold(tmp_path):
    # Rows that are all the same take no bytes; an index of them would.
    path = tmp_path / "0.parquet"
    pq.write_table(pa.table({"image": pa.nulls(10**6, pa.binary())}), path)
    assert path.stat().st_size < 10**5
    found = FORMAT.scan(str(path))
    assert found.rows.shape == (0, 2)
    assert "states 1000000 rows, more than" in found.problem
