import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
import sample_sets
from sample_sets import COUNT, add_member

from clipa_t5x.data import captions, shard_formats, webdataset
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.data.shard_reader import BlockCache
from clipa_t5x.errors import UserError

FORMAT = webdataset.WebDataset()
TAR_FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def write(path, members, tar_format=tarfile.PAX_FORMAT, **attributes):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            add_member(tar, name, data, **attributes)
    return str(path)


def pairs(count, prefix=""):
    return [(f"{prefix}{i:04d}.{field}", f"{field} {i}".encode() * 100)
            for i in range(count) for field in ("jpg", "txt")]  # fmt: skip


def keys(path):
    return [record["__key__"][0].decode() for record in sample_sets.records(FORMAT, path)]


@pytest.mark.parametrize("tar_format", TAR_FORMATS)
@pytest.mark.parametrize("prefix", ["", "./", "a/b/", "d" * 90 + "/" + "e" * 60 + "/"])
@pytest.mark.parametrize("mtime", [0, 1234567890.75])
def test_archives_as_tarfile_writes_them(tmp_path, tar_format, prefix, mtime):
    path = write(tmp_path / "0.tar", pairs(5, prefix), tar_format, mtime=mtime)
    found = sample_sets.records(FORMAT, path)
    assert not FORMAT.scan(path).problem
    assert [r["__key__"][0].decode() for r in found] == [f"{prefix}{i:04d}" for i in range(5)]
    for i, record in enumerate(found):
        assert record["jpg"] == [b"jpg %d" % i * 100] and record["txt"] == [b"txt %d" % i * 100]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["k" * 200, "f" * 300 + "/" + "k" * 200, "Größe-東京", "k" * 99])
def test_names_that_do_not_fit_a_header(tmp_path, tar_format, key):
    members = [(f"{key}{i}.{field}", b"x") for i in range(3) for field in ("jpg", "txt")]
    path = write(tmp_path / "0.tar", members, tar_format)
    assert keys(path) == [f"{key}{i}" for i in range(3)]


def test_numbers_beyond_octal():
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    info = tarfile.TarInfo("a.jpg")
    info.size = 2**40
    header = info.tobuf(tarfile.GNU_FORMAT)
    member = webdataset.parse_header(header)
    assert member is not None and member.size == 2**40 and member.padded == 2**40 + 512


@pytest.mark.parametrize("place", [0, 100, 130, 150, 200, 400])
def test_a_header_with_another_checksum_is_none(place):
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf())
    assert webdataset.parse_header(bytes(header)) is not None
    header[place] ^= 0x55
    assert webdataset.parse_header(bytes(header)) is None


@pytest.mark.parametrize("header", [b"", bytes(512), b"x" * 511, b"x" * 512, b"\xff" * 512])
def test_what_is_no_header(header):
    assert webdataset.parse_header(header) is None


@pytest.mark.parametrize("name, key, field", [
    ("0001.jpg", "0001", "jpg"),
    ("a.b/0001.seg.PNG", "a.b/0001", "seg.png"),
    ("README", "README", ""),
    ("a/.hidden.jpg", "", ""),
    ("", "", ""),
])  # fmt: skip
def test_names_are_split_at_the_first_dot(name, key, field):
    assert webdataset.split_name(name) == (key, field)


def test_a_sample_is_a_run_of_one_key(tmp_path):
    names = ["a.jpg", "a.txt", "b.jpg", "a.json", "c.txt", "c.jpg", "c/x.jpg"]
    path = write(tmp_path / "0.tar", [(name, name.encode()) for name in names])
    assert keys(path) == ["a", "b", "a", "c", "c/x"]
    assert set(sample_sets.records(FORMAT, path)[3]) == {"__key__", "txt", "jpg"}


def test_folders_links_and_other_files_belong_to_no_sample(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        add_member(tar, "README", b"of the set" * 100)
        for name, kind in (("a", tarfile.DIRTYPE), ("a/l.jpg", tarfile.SYMTYPE)):
            add_member(tar, name, b"", type=kind, linkname="b")
        add_member(tar, "a/1.jpg", b"one")
        add_member(tar, "a/sub", b"", type=tarfile.DIRTYPE)
        add_member(tar, "a/.1.txt", b"hidden")
        add_member(tar, "a/1.txt", b"text")
        hard = tarfile.TarInfo("a/2.jpg")
        hard.type, hard.linkname, hard.size = tarfile.LNKTYPE, "a/1.jpg", 512
        tar.addfile(hard)  # the size is the other file's; no data follows
        add_member(tar, "a/3.jpg", b"three")
    first, second = sample_sets.records(FORMAT, path)
    assert first == {"__key__": [b"a/1"], "jpg": [b"one"], "txt": [b"text"]}
    assert second == {"__key__": [b"a/3"], "jpg": [b"three"]}


def test_global_headers_are_passed_over(tmp_path):
    buffer = io.BytesIO()
    headers = {"comment": "made by someone"}
    with tarfile.open(fileobj=buffer, mode="w", pax_headers=headers) as tar:
        add_member(tar, "a.jpg", b"one")
    (tmp_path / "0.tar").write_bytes(buffer.getvalue())
    assert keys(tmp_path / "0.tar") == ["a"]


def test_chained_archives_are_one(tmp_path):
    parts = [write(tmp_path / f"{x}.tar", pairs(2, x)) for x in "ab"]
    whole = tmp_path / "whole.tar"
    whole.write_bytes(b"".join(pathlib.Path(part).read_bytes() for part in parts))
    assert keys(whole) == ["a0000", "a0001", "b0000", "b0001"]
    assert not FORMAT.scan(str(whole)).problem


def archive(tmp_path, **kwargs):
    """An archive of 5 samples, and the bytes where its members' headers begin."""
    path = pathlib.Path(write(tmp_path / "0.tar", pairs(5), **kwargs))
    with tarfile.open(path) as tar:
        return path, [member.offset for member in tar]


@pytest.mark.parametrize("cut, samples", [
    (lambda at: at[7] + 512 + 100, 3),  # within the data of the last member of a sample
    (lambda at: at[6] + 512 + 100, 3),  # of its first
    (lambda at: at[6] + 100, 3),        # within a header
    (lambda at: at[6], 3),              # before one: nothing says that it is not all
    (lambda at: at[0] + 513, 0),
    (lambda at: 100, 0),
])  # fmt: skip
def test_a_truncated_tail_costs_its_samples_only(tmp_path, cut, samples):
    path, offsets = archive(tmp_path)
    path.write_bytes(path.read_bytes()[: cut(offsets)])
    found = FORMAT.scan(str(path))
    assert len(found.rows) == samples and found.rows.shape[1] == 2
    assert "was cut off at byte " in found.problem
    assert keys(path) == [f"{i:04d}" for i in range(samples)]


def test_what_a_damaged_header_costs_is_its_sample(tmp_path):
    path, offsets = archive(tmp_path)
    data = bytearray(path.read_bytes())
    data[offsets[6] + 5] ^= 0xFF
    path.write_bytes(data)
    found = FORMAT.scan(str(path))
    (tmp_path / "whole").mkdir()
    whole = FORMAT.scan(str(archive(tmp_path / "whole")[0])).rows
    # The samples before, but for the one that the damage may have been of, and those behind.
    kept = [row.tolist() for row in found.rows]
    assert all(row in kept for row in whole[4:].tolist()) and len(kept) >= len(whole) - 2
    assert found.problem == f"is damaged at byte {offsets[6]} of {len(data)}"


@pytest.mark.parametrize("change, reason", [
    (lambda data, at: data[: at[5] + 100], "truncated shard"),
    (lambda data, at: data[: at[5]] + b"x" * 512 + data[at[5] + 512 :], "damaged shard"),
])  # fmt: skip
def test_a_shard_that_changed_after_it_was_scanned(tmp_path, change, reason):
    path, offsets = archive(tmp_path)
    rows = FORMAT.scan(str(path)).rows
    path.write_bytes(change(path.read_bytes(), offsets))
    with FORMAT.open(str(path)) as shard:
        assert shard.read(rows[1])["__key__"] == [b"0001"]
        with pytest.raises(BadRecord) as caught:
            shard.read(rows[2])
    assert caught.value.reason == reason


@pytest.mark.parametrize("data", [b"no tar" * 1000, bytes(10_240), b"\x1f\x8b" + b"x" * 1000])
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(UserError, match="0.tar is not a tar file: .*byte 0"):
        FORMAT.scan(str(tmp_path / "0.tar"))


def sample(tmp_path, content):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    path = write(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.json", raw)])
    (record,) = sample_sets.records(FORMAT, path)
    return record


@pytest.mark.parametrize("value, expected", [
    ("a text", [b"a text"]),
    ("Größe", ["Größe".encode()]),
    (["one", "two"], [b"one", b"two"]),
    (7, [7]),
    (0.5, [b"0.5"]),
    (None, []),
])  # fmt: skip
def test_members_of_the_metadata_are_fields(tmp_path, value, expected):
    record = sample(tmp_path, {"caption": value})
    assert record.get("json:caption") == expected
    assert record["json:caption"] == expected
    assert not record.get("json:other")
    assert record.get("other:caption") is None and record.get("jpg") == [b"x"]


@pytest.mark.parametrize("content", [b"{", b"[1]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_metadata_that_cannot_be_read(tmp_path, content):
    record = sample(tmp_path, content)
    assert record["jpg"] == [b"x"]
    with pytest.raises(BadRecord, match="unreadable metadata: field json"):
        record.get("json:caption")
    assert not shard_formats.has(record, "json:caption")
    assert shard_formats.field_names([record]) == ["__key__", "jpg", "json"]


@pytest.mark.parametrize("size", [b"-0000001000", b"-777", b"+7", b"0o17", b"1_0"])
def test_sizes_that_only_python_reads_are_damage(tmp_path, size):
    # A negative one, behind a right checksum, would send the scan back to where it was, for ever.
    path = pathlib.Path(write(tmp_path / "0.tar", pairs(2)))
    data = bytearray(path.read_bytes())
    at = data.index(b"0001.jpg")
    data[at + 124 : at + 136] = size.ljust(12, b"\0")
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    assert webdataset.parse_header(bytes(data[at : at + 512])) is None
    found = FORMAT.scan(str(path))
    assert found.problem and len(found.rows) <= 2


def test_half_a_surrogate_in_the_metadata(tmp_path):
    (value,) = sample(tmp_path, b'{"caption": "a \\ud800 b"}')["json:caption"]
    text, mended = captions.clean(value)
    assert text.decode() == "a \ufffd\ufffd\ufffd b" and mended == "invalid UTF-8"


def test_a_task_may_use_the_metadata(tmp_path):
    sample_sets.write(tmp_path, "tar")
    from clipa_t5x.data import sources

    fields = sources.RecordFields("png;jpg", {"json:caption": 1.0}, "json:label")
    source = sources.ImageTextSource(str(tmp_path), FORMAT, fields)
    found = sample_sets.read(source)
    assert [c.decode() for c in found["caption"]] == [sample_sets.caption(i) for i in range(COUNT)]
    assert found["label"].tolist() == [sample_sets.label(i) for i in range(COUNT)]


def test_a_remote_archive(tmp_path):
    import tensorflow as tf

    path, _ = archive(tmp_path)
    with tf.io.gfile.GFile("ram://webdataset/0.tar", "wb") as f:
        f.write(path.read_bytes())
    remote = "ram://webdataset/0.tar"
    rows = FORMAT.scan(remote).rows
    np.testing.assert_array_equal(rows, FORMAT.scan(str(path)).rows)
    with FORMAT.open(remote, BlockCache(2**14, 1000)) as shard:
        assert [shard.read(row)["__key__"][0] for row in rows] == [b"%04d" % i for i in range(5)]
