"""`.safetensors` files from strangers.

The library holds the header to the file's size, the offsets to shapes and dtypes, without gaps or
overlaps. It takes the last of two arrays of one name, which is refused here.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors

from clipa_t5x.weights.stored_arrays import BFLOAT16, StoredArray, StoredArrays, refusal

_LENGTH_BYTES = 8
_DTYPES = {
    "BOOL": np.dtype(bool),
    "BF16": BFLOAT16,
    **{f"F{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
}


@contextlib.contextmanager
def open_safetensors(path: str) -> Iterator[StoredArrays]:
    """Opens a local file, mapped into memory; arrays can be read until it is closed.

    Args:
      path: a file.

    Yields:
      Arrays by name.

    Raises:
      UserError: the header is damaged, names an array twice, or states a dtype that weights do not
        have.
    """
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(safetensors.safe_open(path, framework="np"))
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise refusal(path, f"it is no valid .safetensors file ({error})") from error
        _refuse_repeated_names(path)
        yield {name: _stored_array(path, opened, name) for name in opened.keys()}  # noqa: SIM118


def _refuse_repeated_names(path: str) -> None:
    """Reads the header, which the library has found to be valid and of bounded size."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise refusal(path, f"its header names {twice!r} twice")
        return members

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = file.read(length)
    try:
        json.loads(header, object_pairs_hook=unique)
    except RecursionError as error:
        raise refusal(path, "its header is nested too deeply") from error


def _stored_array(path: str, opened: Any, name: str) -> StoredArray:
    stated = opened.get_slice(name)
    dtype, shape = _DTYPES.get(stated.get_dtype()), tuple(stated.get_shape())
    if dtype is None:
        raise refusal(
            path, f"array {name!r} is of dtype {stated.get_dtype()}, which weights do not have"
        )
    return StoredArray(shape, dtype, lambda: opened.get_tensor(name))
