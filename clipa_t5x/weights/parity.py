"""Proof that weights say the same on both sides: embeddings of a fixed probe, compared."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

FILE = "parity.json"
TOLERANCE = 1e-5
_MAX_VOCABULARY = 30_522  # BERT's ids end here; tables may have more rows, which no text reaches.


class Probe(NamedTuple):
    """A batch of noise that every framework can be given.

    Attributes:
      images: uint8 [rows, size, size, 3].
      ids: int32 [rows, length]; 0 follows the end of every text but the first.
    """

    images: np.ndarray
    ids: np.ndarray


class Embeddings(NamedTuple):
    """What a model makes of a probe: unit float32 [rows, joint] each."""

    images: np.ndarray
    texts: np.ndarray


def probe(rows: int, image_size: int, text_length: int, vocab_size: int, seed: int = 0) -> Probe:
    """The same for the same arguments, on every machine."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (rows, image_size, image_size, 3), np.uint8)
    ids = rng.integers(1, min(vocab_size, _MAX_VOCABULARY), (rows, text_length), np.int32)
    lengths = np.linspace(text_length, 1, rows).round().astype(int)
    ids *= np.arange(text_length) < lengths[:, None]
    return Probe(images, ids)


def embed(model: Any, params: Any, batch: Probe, exact: bool = True) -> Embeddings:
    """Embeds by this package.

    Args:
      model: a `models.ClipModel`.
      params: its parameters.
      batch: what to embed.
      exact: in float32 and at full precision, whatever the model computes in; otherwise in its own
        dtypes, each tower in a program of its own.
    """
    precision: Any = contextlib.nullcontext()
    if exact:
        precision = jax.default_matmul_precision("highest")
        model = model.clone(
            image_tower=model.image_tower.clone(dtype="float32"),
            text_tower=model.text_tower.clone(dtype="float32"),
        )
    embeddings = []
    with precision:
        for inputs, method in zip(batch, ("embed_images", "embed_text"), strict=True):

            def tower(params: Any, x: jax.Array, method: str = method) -> Any:
                return model.apply({"params": params}, x, method=method)

            # Inputs are the same on every process, and so is what is gathered.
            embedded = jax.jit(tower)(params, np.asarray(inputs))
            embeddings.append(multihost_utils.process_allgather(embedded, tiled=True))
    return Embeddings(*embeddings)


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Of unit embeddings [rows, joint]: 'max_abs_difference' and 'min_cosine'."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return {
        "max_abs_difference": float(np.abs(a - b).max()),
        "min_cosine": float((np.sum(a * b, axis=1) / lengths).min()),
    }


def certificate(
    *,
    source: str,
    target: str,
    layout: str,
    parameters: Mapping[str, Any],
    batch: Probe | None = None,
    compared_with: str = "",
    before: Embeddings | None = None,
    after: Embeddings | None = None,
    computed_in: Sequence[str] = ("float32", "float32"),
    differing_arrays: Sequence[str] | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """What `parity.json` holds.

    Args:
      source: where the weights come from.
      target: where they went.
      layout: of the target, or the source's where that is another's.
      parameters: by name there: 'shape', 'dtype', 'crc32c', and 'from': of an export, the names
        here that it is made of; of an import, name, shape, dtype and crc32c of each of the source's
        arrays that it is made of.
      batch: what was embedded; None where nothing was.
      compared_with: which implementation made `after`.
      before: the source's embeddings.
      after: the target's.
      computed_in: dtypes of the image and the text tower, in both.
      differing_arrays: names of those that were read back from the target's files and are not as
        they were written; None where none was read back.
      tolerance: largest absolute difference that passes; a cosine passes from 1 minus it.
    """
    found: dict[str, Any] = {
        "source": source,
        "target": target,
        "layout": layout,
        "num_parameters": sum(int(np.prod(entry["shape"])) for entry in parameters.values()),
        "parameters": dict(parameters),
    }
    if batch is None or before is None or after is None:
        if differing_arrays is None:
            return {**found, "probe": None, "passed": None}
        differing = list(differing_arrays)
        return {**found, "probe": None, "differing_arrays": differing, "passed": not differing}
    compared = {
        "image_embeddings": difference(before.images, after.images),
        "text_embeddings": difference(before.texts, after.texts),
    }
    passed = all(
        values["max_abs_difference"] <= tolerance and values["min_cosine"] >= 1 - tolerance
        for values in compared.values()
    )
    return {
        **found,
        "probe": {"images": list(batch.images.shape), "texts": list(batch.ids.shape), "seed": 0},
        "compared_with": compared_with,
        "computed_in": list(computed_in),
        **compared,
        "tolerance": tolerance,
        "passed": passed,
    }


def write(folder: str, found: Mapping[str, Any]) -> str:
    """Writes a certificate as `parity.json` into a folder; returns a line about it.

    What is no number, such as the difference of an embedding that is NaN, is null there.
    """
    text = json.dumps(_finite(found), indent=2, allow_nan=False)
    (epath.Path(folder) / FILE).write_text(f"{text}\n")
    return summary(found)


def layout_of(folder: str) -> str | None:
    """The layout that a folder's certificate names; None where there is none that can be read."""
    path = epath.Path(folder) / FILE
    try:
        found = json.loads(path.read_text()) if path.exists() else None
    except (ValueError, RecursionError):
        return None
    return found.get("layout") if isinstance(found, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(found: Mapping[str, Any]) -> str:
    """One line for people."""
    parameters = f"{found['num_parameters']:,} numbers in {len(found['parameters'])} arrays"
    if found["passed"] is None:
        return f"{parameters}; embeddings not compared"
    if found["probe"] is None:
        bad = found["differing_arrays"]
        others = f"{len(bad)} are not as they were written: {', '.join(bad[:8])}"
        return f"{parameters}; read back, {others if bad else 'all are as they were written'}"
    image, text = found["image_embeddings"], found["text_embeddings"]
    return (
        f"{parameters}; embeddings differ from those of {found['compared_with']} by at most "
        f"{image['max_abs_difference']:.1e} (images) and {text['max_abs_difference']:.1e} (texts), "
        f"cosine at least {min(image['min_cosine'], text['min_cosine']):.7f}: "
        f"{'within' if found['passed'] else 'beyond'} {found['tolerance']:g}"
    )
