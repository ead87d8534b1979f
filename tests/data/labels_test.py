import io

import numpy as np
import pytest

from clipa_t5x.data import labels
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.errors import UserError


def npy(values, dtype):
    file = io.BytesIO()
    np.save(file, np.asarray(values, dtype))
    return file.getvalue()


@pytest.mark.parametrize("values, found", [
    ([3, 0], [3, 0]), ([], []), ([b"7"], [7]), ([b" 4, 9 2\n"], [4, 9, 2]), ([b""], []),
    ([b"1", b"5"], [1, 5]), ([5, -1, -1], [5]), ([npy([0, 1, 0, 1], "float32")], [1, 3]),
    ([npy([0, 0], "int64")], []), ([npy([True, False], bool)], [0]),
])  # fmt: skip
def test_an_image_has_any_number_of_labels(values, found):
    row = labels.several({"cls": values}, "cls")
    assert (row.dtype, row.shape) == (np.int32, (labels.MAX_LABELS,))
    assert row.tolist() == found + [-1] * (labels.MAX_LABELS - len(found))


def huge():
    """An array's file whose header states what is not there."""
    data = npy([0.0] * 10, "float64")
    return data.replace(b"(10,), }   ", b"(10000000,)}")


@pytest.mark.parametrize("record, reason", [
    ({}, "missing label"), ({"cls": [b"cat"]}, "label is no number"),
    ({"cls": [2**40]}, "label out of range"), ({"cls": [npy(["a"], "S1")]}, "label is no array"),
    ({"cls": [npy([[1, 0]], "int8")]}, "label is no array"),
    ({"cls": [npy([1, 0], "int64")[:-1]]}, "label is no array"),
    ({"cls": [b"\x93NUMPY"]}, "label is no array"), ({"cls": [huge()]}, "label is no array"),
])  # fmt: skip
def test_what_is_no_label_is_a_bad_record(record, reason):
    with pytest.raises(BadRecord) as caught:
        labels.several(record, "cls")
    assert caught.value.reason == reason


def test_too_many_labels_are_refused():
    with pytest.raises(UserError, match="has 129 labels in field 'cls', more than 128"):
        labels.several({"cls": list(range(129))}, "cls")


def test_arrays_tell_how_many_classes_there_are():
    assert labels.num_classes({"npy": [npy([0, 1, 0], "int8")]}, "npy") == 3
    assert labels.num_classes({"npy": [b"1 2"]}, "npy") is None
    assert labels.num_classes({}, "npy") is None
    with pytest.raises(BadRecord):
        labels.num_classes({"npy": [huge()]}, "npy")
