"""An array that lies in a file, known before it is read, and what a file's refusal says."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from clipa_t5x.errors import UserError

BFLOAT16 = np.dtype(jnp.bfloat16)
# What weights are made of. Whatever else a file may state has no meaning here.
DTYPES = frozenset(
    np.dtype(name)
    for name in ("bool", "float16", "float32", "float64")
    + ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
) | {BFLOAT16}


class StoredArray(NamedTuple):
    """An array in a file.

    Attributes:
      shape: as the file states it, checked against the bytes that are there.
      dtype: one of `DTYPES`.
      read: reads it, as a NumPy array of this shape and dtype; raises `UserError` where the bytes
        are damaged.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


StoredArrays = Mapping[str, StoredArray]


def refusal(path: str, fact: object) -> UserError:
    """The error of a file that is not what it should be: one line, whatever the file says."""
    text = " ".join(f"{fact}".split()).rstrip(".")
    return UserError(f"{path} cannot be read: {text}. Fetch the file again, or write it anew.")
