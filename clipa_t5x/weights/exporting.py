"""Writes parameters in another layout, holding one of them (or a q, k and v) at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import jax
import numpy as np

from clipa_t5x.towers import position_embeddings, vision_transformer
from clipa_t5x.weights import array_files, array_writers, layouts

Read = Callable[[str], np.ndarray]
_CHUNK_BYTES = 2**24


def fixed_tables(model: Any, image_size: int, text_length: int) -> dict[str, np.ndarray]:
    """Position tables that are no parameters here, under the names that learned ones have.

    Args:
      model: a `models.ClipModel`.
      image_size: pixels.
      text_length: tokens.
    """
    image, text = model.image_tower, model.text_tower
    tables = {}
    if image.position_embedding == "sincos2d":
        grid = vision_transformer.patch_grid(image_size, image_size, image.patch_size)
        tables[layouts.IMAGE_POSITIONS] = position_embeddings.sincos_2d(*grid, image.width)
    if text.position_embedding == "sincos1d":
        tables[layouts.TEXT_POSITIONS] = position_embeddings.sincos_1d(text_length, text.width)
    return tables


def write(
    path: str,
    tensors: Sequence[layouts.Tensor],
    read: Read,
    shapes: Mapping[str, Sequence[int]],
    tables: Mapping[str, np.ndarray],
    prefix: str = "",
) -> dict[str, dict[str, Any]]:
    """Writes tensors as float32, each from the parameters that it is made of.

    Args:
      path: see `array_writers.open_writer`.
      tensors: of a layout.
      read: reads a parameter, whole, by its name here.
      shapes: of the parameters here, stacked where they are.
      tables: arrays that need not be read.
      prefix: before every name in the file.

    Returns:
      By name in the file: shape, dtype, crc32c (of the bytes, hexadecimal), and the parameters that
      it comes from.
    """
    owners = _owners(shapes)
    stated = {prefix + t.name: jax.ShapeDtypeStruct(t.shapes[0], np.float32) for t in tensors}
    written = {}
    with array_writers.open_writer(path, stated) as writer:
        for group in _by_source(tensors, owners):
            names = {owners[part][0] for part in group[0].parts if part in owners}
            arrays = {name: read(name) for name in sorted(names)}
            for tensor in group:
                parts = [_part(part, owners, arrays, tables) for part in tensor.parts]
                array = tensor.join(parts).astype(np.float32, copy=False)
                writer.write(prefix + tensor.name, array)
                written[prefix + tensor.name] = {
                    **describe(array),
                    "from": [owners[part][0] for part in tensor.parts if part in owners],
                }
            del arrays
    return {name: written[name] for name in stated}


def describe(array: np.ndarray) -> dict[str, Any]:
    """Shape, dtype and checksum of an array, as JSON has them."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    checksum = 0
    for start in range(0, data.size, _CHUNK_BYTES):
        checksum = google_crc32c.extend(checksum, data[start : start + _CHUNK_BYTES].tobytes())
    return {"shape": list(array.shape), "dtype": array.dtype.name, "crc32c": f"{checksum:08x}"}


def differing(path: str, written: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the arrays that a file does not hold as they were written; reads one at a time.

    Args:
      path: of a file that `write` made.
      written: what it returned.

    Raises:
      UserError: the file is damaged.
    """
    with array_files.open_arrays(path) as arrays:
        return [
            name
            for name, entry in written.items()
            if name not in arrays
            or any(entry[key] != value for key, value in describe(arrays[name].read()).items())
        ]


def _owners(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, int | None]]:
    """By an unstacked name: the parameter that holds it, and where in its stack."""
    owners: dict[str, tuple[str, int | None]] = {}
    for name, shape in shapes.items():
        if layouts.is_stacked(name):
            layers = layouts.layer_names(name, shape[0])
            owners.update({layer: (name, i) for i, layer in enumerate(layers)})
        else:
            owners[name] = (name, None)
    return owners


def _by_source(
    tensors: Sequence[layouts.Tensor], owners: Mapping[str, tuple[str, int | None]]
) -> Iterator[list[layouts.Tensor]]:
    """Tensors that are made of the same parameters, together."""
    groups: dict[tuple[str, ...], list[layouts.Tensor]] = {}
    for tensor in tensors:
        key = tuple(owners[part][0] if part in owners else part for part in tensor.parts)
        groups.setdefault(key, []).append(tensor)
    yield from groups.values()


def _part(
    name: str,
    owners: Mapping[str, tuple[str, int | None]],
    arrays: Mapping[str, np.ndarray],
    tables: Mapping[str, np.ndarray],
) -> np.ndarray:
    if name not in owners:
        return tables[name]
    owner, index = owners[name]
    return arrays[owner] if index is None else arrays[owner][index]
