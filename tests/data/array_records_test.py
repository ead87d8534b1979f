import pathlib
import threading

import numpy as np
import pytest
import sample_sets
from array_record.python import array_record_module
from sample_sets import COUNT

from clipa_t5x.data import array_records
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.errors import UserError

FORMAT = array_records.ArrayRecord()


def write(path, records, options="group_size:1"):
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


@pytest.fixture
def shard(tmp_path):
    return write(tmp_path / "0.array_record", sample_sets.examples(range(COUNT)))


@pytest.mark.parametrize("options", ["group_size:1", "group_size:4", "group_size:1,uncompressed"])
def test_records_of_any_grouping(tmp_path, options):
    path = write(tmp_path / "0.array_record", sample_sets.examples(range(COUNT)), options)
    assert FORMAT.scan(path).rows.tolist() == [[i] for i in range(COUNT)]
    found = [record["txt"][0].decode() for record in sample_sets.records(FORMAT, path)]
    assert found == [sample_sets.caption(i) for i in range(COUNT)]


def test_a_shard_without_records(tmp_path):
    found = FORMAT.scan(write(tmp_path / "0.array_record", []))
    assert found.rows.shape == (0, 1) and not found.problem


@pytest.mark.parametrize("keep", [0.3, 0.999])
def test_without_its_end_a_shard_is_lost(shard, keep):
    data = pathlib.Path(shard).read_bytes()
    pathlib.Path(shard).write_bytes(data[: int(keep * len(data))])
    found = FORMAT.scan(shard)
    assert found.rows.shape == (0, 1) and "was cut off" in found.problem


@pytest.mark.parametrize("data", [b"no record" * 10_000, b"x", b"\x83\xaf"])
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "0.array_record"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path} is not an ArrayRecord file.*byte 0"):
        FORMAT.scan(str(path))


def test_urls_are_refused_with_the_remedy():
    with pytest.raises(UserError, match="gs://b/0.array_record is .*mount the bucket"):
        FORMAT.scan("gs://b/0.array_record")


def test_a_damaged_record_costs_itself_only(tmp_path):
    records = sample_sets.examples(range(COUNT))
    path = write(tmp_path / "0.array_record", records, "group_size:1,uncompressed")
    data = bytearray(pathlib.Path(path).read_bytes())
    place = data.index(sample_sets.image(4)[-200:-100])
    data[place : place + 20] = bytes(20)
    pathlib.Path(path).write_bytes(data)
    found = sample_sets.records(FORMAT, path)
    assert [isinstance(record, BadRecord) for record in found] == [i == 4 for i in range(COUNT)]
    assert found[4].reason == "damaged shard"


def test_records_that_are_no_examples(tmp_path):
    path = write(tmp_path / "0.array_record", [b"\xffno example"])
    (found,) = sample_sets.records(FORMAT, path)
    assert found.reason == "no tf.train.Example"


def test_a_shard_that_has_shrunk(shard):
    rows = FORMAT.scan(shard).rows
    write(shard, sample_sets.examples(range(2)))
    with FORMAT.open(shard) as opened:
        assert opened.read(rows[1])["key"] == [b"00001"]
        with pytest.raises(BadRecord, match="truncated shard"):
            opened.read(rows[5])
        for number in (-1, 2**40, 2**63 - 1):  # of a damaged index
            with pytest.raises(BadRecord, match=f"has no record {number}"):
                opened.read(np.asarray([number]))
    open(shard, "wb").close()
    with FORMAT.open(shard) as opened, pytest.raises(BadRecord, match="damaged shard"):
        opened.read(rows[0])


def test_a_bounded_number_of_shards_stays_open(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(array_records, "_open", lambda path: opened.append(path) or object())
    readers = array_records._Readers(2)
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths:
        open(path, "wb").close()
    for path in [paths[0], paths[1], paths[0], paths[2], paths[0]]:
        readers.get(path)
    assert opened == paths
    readers.get(paths[1])  # the one that was not used for the longest
    assert opened == [*paths, paths[1]]


def test_threads_share_a_shard(shard):
    rows = FORMAT.scan(shard).rows
    wrong = []

    def read(seed):
        with FORMAT.open(shard) as opened:
            for i in np.random.default_rng(seed).integers(0, COUNT, 300):
                if opened.read(rows[i])["key"] != [b"%05d" % i]:
                    wrong.append(i)

    threads = [threading.Thread(target=read, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
