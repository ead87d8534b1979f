"""A model's parameters from one file, under the names that they have here.

What `checkpoints` does for its own folders, up to the placing of arrays on devices.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from clipa_t5x.errors import UserError
from clipa_t5x.weights import array_files
from clipa_t5x.weights.stored_arrays import StoredArray, StoredArrays

PREFIX = "params/"


@dataclasses.dataclass(frozen=True)
class ParameterFile:
    """An open file of parameters.

    Attributes:
      path: where it is, for people.
      saved: arrays by parameter name, such as 'image_tower/head/kernel'; nothing of them is read.
    """

    path: str
    saved: StoredArrays

    def restore(self, request: Any) -> Any:
        """Reads parameters, one after the other, each laid out as it is asked for.

        Args:
          request: tree of `jax.ShapeDtypeStruct` with shardings, of the file's names and shapes.

        Returns:
          The same tree of `jax.Array`; bfloat16, float16 and float64 become the dtype asked for.

        Raises:
          UserError: an array is damaged, is of integers, or holds NaN or Inf.
        """

        def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            values = self._values(name, self.saved[name], leaf.dtype)
            return jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index: values[index]
            )

        return jax.tree_util.tree_map_with_path(place, request)

    def _values(self, name: str, stored: StoredArray, dtype: Any) -> np.ndarray:
        if not jax.numpy.issubdtype(stored.dtype, jax.numpy.floating):
            raise UserError(
                f"{name} of {self.path} is of {stored.dtype.name}, and parameters are floating-"
                "point numbers: give the file that training or a conversion wrote."
            )
        with np.errstate(over="ignore"):  # What is beyond the dtype is told of below.
            values = stored.read().astype(dtype, copy=False)
        bad = values.size - int(np.isfinite(values).sum())
        if bad:
            raise UserError(
                f"{name} of {self.path} holds {bad} numbers of {values.size} that are NaN, Inf or "
                f"beyond {np.dtype(dtype).name}: every loss would be NaN. Give weights of a run "
                "that did not diverge."
            )
        return values


@contextlib.contextmanager
def open_parameters(path: str) -> Iterator[ParameterFile]:
    """Opens a `.npz` or `.safetensors` file of parameters.

    Where names begin with 'params/', those are the parameters, without it, and whatever else the
    file holds, such as an optimizer's state, is left there.

    Args:
      path: local or remote.

    Raises:
      UserError: as `array_files.open_arrays`.
    """
    with array_files.open_arrays(path) as arrays:
        prefix = PREFIX if any(name.startswith(PREFIX) for name in arrays) else ""
        saved = {
            name.removeprefix(prefix): array
            for name, array in arrays.items()
            if name.startswith(prefix)
        }
        yield ParameterFile(path, saved)
