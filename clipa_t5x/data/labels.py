"""What a record says of an image's class, or of its classes, where it may have several or none."""

import io

import numpy as np
from numpy.lib import format as npy_format

from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.data.shard_formats import Fields
from clipa_t5x.errors import UserError

# Of one image: more than any published set of many labels has.
MAX_LABELS = 128
_NPY_START = b"\x93NUMPY"


def one(record: Fields, name: str) -> int:
    """The label in a record's field: an integer, or the text of one.

    Raises:
      BadRecord: there is no such field, or no int32 in it.
    """
    values = record.get(name)
    if not values:
        raise BadRecord("missing label", f"no field {name!r}")
    return _number(name, values[0])


def several(record: Fields, name: str) -> np.ndarray:
    """All labels in a record's field, int32 [MAX_LABELS], -1 after the last.

    The field holds integers, texts with integers between blanks or commas, or an array in NumPy's
    format that is 1 where an image belongs to a class, as clip_benchmark writes it. An image may
    have no label.

    Raises:
      BadRecord: there is no such field, or something else in it.
      UserError: there are more than MAX_LABELS.
    """
    values = record.get(name)
    if values is None:
        raise BadRecord("missing label", f"no field {name!r}")
    found: list[int] = []
    for value in values:
        if isinstance(value, bytes) and value.startswith(_NPY_START):
            found += np.flatnonzero(_multi_hot(name, value)).tolist()
        elif isinstance(value, bytes):
            found += [_number(name, part) for part in value.replace(b",", b" ").split()]
        else:
            found.append(_number(name, value))
    found = [label for label in found if label >= 0]
    if len(found) > MAX_LABELS:
        raise UserError(
            f"an image has {len(found)} labels in field {name!r}, more than {MAX_LABELS}: name the "
            "field with an image's labels by labels_key."
        )
    return np.asarray(found + [-1] * (MAX_LABELS - len(found)), np.int32)


def num_classes(record: Fields, name: str) -> int | None:
    """Of how many classes a record's array says whether the image belongs; None without an array.

    Raises:
      BadRecord: the array is damaged.
    """
    for value in record.get(name) or ():
        if isinstance(value, bytes) and value.startswith(_NPY_START):
            return len(_multi_hot(name, value))
    return None


def _number(name: str, value: bytes | int) -> int:
    try:
        label = int(value)
    except ValueError as error:
        raise BadRecord("label is no number", f"{name} {value!r}") from error
    if abs(label) > np.iinfo(np.int32).max:
        raise BadRecord("label out of range", f"{name} {label} is no int32")
    return label


def _multi_hot(name: str, data: bytes) -> np.ndarray:
    """The array in a file of NumPy's; what its header states is compared with what is there."""
    file = io.BytesIO(data)
    try:
        version = npy_format.read_magic(file)
        read_header = {(1, 0): npy_format.read_array_header_1_0,
                       (2, 0): npy_format.read_array_header_2_0}[version]  # fmt: skip
        shape, _, dtype = read_header(file)
        if len(shape) != 1 or dtype.kind not in "biuf":
            raise ValueError(f"it is {dtype} {shape}, not one number for each class")
        if shape[0] * dtype.itemsize != len(data) - file.tell():
            raise ValueError(f"{dtype} {shape} is not what follows its header")
        return np.frombuffer(data, dtype, offset=file.tell())
    except (ValueError, KeyError, OverflowError, EOFError) as error:
        raise BadRecord("label is no array", f"{name}: {error}") from error
