"""Both towers as StableHLO that jax alone runs: no code of this package, no model description."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from clipa_t5x.weights import array_files, array_writers, exporting, layouts, parity

PARAMETERS = "parameters.safetensors"
SIGNATURE = "signature.json"
TOWERS = ("image_tower", "text_tower")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def module_file(tower: str) -> str:
    """Name of a tower's file."""
    return f"{tower}.stablehlo"


def export_towers(
    model: Any, shapes: Mapping[str, Any], image_size: int, text_length: int
) -> dict[str, bytes]:
    """Serialized `jax.export` artefacts of both towers, by file name.

    Each is a function of (parameters by name, inputs): uint8 [batch, size, size, 3] or int32
    [batch, length], to unit float32 [batch, joint], for any batch. Parameters are no constants in
    it: they are several GiB, which every program that loads it would hold twice.

    Args:
      model: a `models.ClipModel`.
      shapes: by parameter name.
      image_size: pixels.
      text_length: tokens.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    inputs = {
        "image_tower": ((batch, image_size, image_size, 3), np.uint8, "embed_images"),
        "text_tower": ((batch, text_length), np.int32, "embed_text"),
    }
    modules = {}
    for tower, (shape, dtype, method) in inputs.items():

        def embed(params: Mapping[str, jax.Array], x: jax.Array, method: str = method) -> jax.Array:
            # Embedding has no use for them, but a model is not bound without.
            unused = dict.fromkeys((layouts.LOGIT_SCALE, layouts.LOGIT_BIAS), jnp.zeros(()))
            tree = traverse_util.unflatten_dict({**unused, **params}, sep="/")
            return model.apply({"params": tree}, x, method=method)

        params = {
            name: jax.ShapeDtypeStruct(s.shape, np.float32)
            for name, s in shapes.items()
            if name.startswith(f"{tower}/")
        }
        exported = jax.export.export(jax.jit(embed), platforms=PLATFORMS)(
            params, jax.ShapeDtypeStruct(shape, dtype)
        )
        modules[module_file(tower)] = bytes(exported.serialize())
    return modules


def write(
    output_dir: str,
    model: Any,
    shapes: Mapping[str, Any],
    read: exporting.Read,
    image_size: int,
    text_length: int,
    preprocessing: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Writes the artefacts, the parameters and what they take, into a folder.

    Args:
      output_dir: local or remote, there.
      model: as for `export_towers`.
      shapes: as for `export_towers`.
      read: reads a parameter by its name.
      image_size: pixels.
      text_length: tokens.
      preprocessing: what makes the inputs, of 'images' and 'texts', for `signature.json`.

    Returns:
      What became of every parameter, as `exporting.write`.
    """
    folder = epath.Path(output_dir)
    stated = {name: jax.ShapeDtypeStruct(s.shape, np.float32) for name, s in shapes.items()}
    written = {}
    with array_writers.open_writer(f"{folder / PARAMETERS}", stated) as writer:
        for name in shapes:
            array = read(name).astype(np.float32, copy=False)
            writer.write(name, array)
            written[name] = {**exporting.describe(array), "from": [name]}
    for name, content in export_towers(model, shapes, image_size, text_length).items():
        (folder / name).write_bytes(content)
    signature = {
        "image_tower": {"inputs": ["batch", image_size, image_size, 3], "dtype": "uint8"},
        "text_tower": {"inputs": ["batch", text_length], "dtype": "int32"},
        "preprocessing": preprocessing,
        "parameters": PARAMETERS,
        "platforms": PLATFORMS,
    }
    (folder / SIGNATURE).write_text(json.dumps(signature, indent=2) + "\n")
    return written


def embed(folder: str, batch: parity.Probe) -> parity.Embeddings:
    """What the artefacts in a folder make of a probe, at full precision of this machine's."""
    path = epath.Path(folder)
    embeddings = []
    with array_files.open_arrays(f"{path / PARAMETERS}") as arrays:
        for tower, inputs in zip(TOWERS, batch, strict=True):
            module = jax.export.deserialize(bytearray((path / module_file(tower)).read_bytes()))
            names = [name for name in arrays if name.startswith(f"{tower}/")]
            params = {name: jnp.asarray(arrays[name].read()) for name in names}
            embeddings.append(np.asarray(module.call(params, jnp.asarray(inputs))))
    return parity.Embeddings(*embeddings)
