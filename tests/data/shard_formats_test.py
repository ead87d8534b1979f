import numpy as np
import pytest

from clipa_t5x.data import shard_formats
from clipa_t5x.data.bad_records import BadRecord


@pytest.mark.parametrize("fields, names, expected", [
    ({"jpg": [b"a"]}, "jpg", b"a"),
    ({"png": [b"b"]}, "jpg;png", b"b"),
    ({"png": [b"b"], "jpg": [b"a"]}, "jpg;png", b"a"),
    ({"png": [b"b"], "jpg": []}, "jpg;png", b"b"),
    ({"jpg": [b"a", b"b"]}, "jpg", b"a"),
])  # fmt: skip
def test_the_first_field_that_is_there(fields, names, expected):
    assert shard_formats.first_present(fields, names) == expected


@pytest.mark.parametrize("fields, reason", [
    ({}, "missing image"),
    ({"jpg": [], "other": [b"a"]}, "missing image"),
    ({"jpg": [b""]}, "empty image"),
    ({"jpg": [7]}, "field of another type"),
])  # fmt: skip
def test_a_record_without_an_image(fields, reason):
    with pytest.raises(BadRecord) as caught:
        shard_formats.first_present(fields, "jpg;png")
    assert caught.value.reason == reason


def test_names_of_all_records_fields():
    records = [{"b": [1], "a": [2]}, {}, {"c": [b""], "a": [1]}]
    assert shard_formats.field_names(records) == ["a", "b", "c"]
    assert shard_formats.field_names([]) == []


class Shard:
    """A shard whose odd records are damaged."""

    def read(self, row):
        if row[0] % 2:
            raise BadRecord("odd", str(row[0]))
        return {"n": [int(row[0])]}


def test_damaged_records_come_as_errors():
    found = list(shard_formats.iterate(Shard(), np.arange(4)[:, None]))
    assert found[0] == {"n": [0]} and found[2] == {"n": [2]}
    assert [getattr(found[i], "reason", None) for i in (1, 3)] == ["odd", "odd"]


def test_a_field_of_metadata_that_cannot_be_read_is_not_there():
    class Damaged(dict):
        def get(self, name, default=None):
            raise BadRecord("unreadable metadata")

    assert not shard_formats.has(Damaged(), "json:a")
    assert shard_formats.has({"a": []}, "a") and not shard_formats.has({"a": []}, "b")
