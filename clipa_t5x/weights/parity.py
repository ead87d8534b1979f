"""Proof that weights say the same on both sides: embeddings of a fixed probe, compared."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

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


def embed(model: Any, params: Any, batch: Probe) -> Embeddings:
    """Embeds by this package, in float32 and at full precision whatever the model computes in.

    Args:
      model: a `models.ClipModel`.
      params: its parameters, NumPy's or laid out over the devices of all processes, which then all
        call this, with the same probe.
      batch: what is embedded.
    """
    exact = model.clone(
        image_tower=model.image_tower.clone(dtype="float32"),
        text_tower=model.text_tower.clone(dtype="float32"),
    )

    def both(params: Any, images: jax.Array, ids: jax.Array) -> Any:
        return exact.apply({"params": params}, {"images": images, "text": ids}, method="embed")

    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    whole = {}
    if isinstance(sharding, jax.sharding.NamedSharding):  # Every process gets all of the result.
        replicated = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        whole["out_shardings"] = replicated
    with jax.default_matmul_precision("highest"):
        images, texts = jax.jit(both, **whole)(params, *batch)
    return Embeddings(np.asarray(images), np.asarray(texts))


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
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """What `parity.json` holds.

    Args:
      source: where the weights come from.
      target: where they went.
      layout: of the target, or the source's where that is another's.
      parameters: by name in that layout: 'shape', 'dtype', 'crc32c', and 'from', the names here.
      batch: what was embedded; None where nothing was.
      compared_with: which implementation made `after`.
      before: the source's embeddings.
      after: the target's.
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
        return {**found, "probe": None, "passed": None}
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
        **compared,
        "tolerance": tolerance,
        "passed": passed,
    }


def write(folder: str, found: Mapping[str, Any]) -> str:
    """Writes a certificate as `parity.json` into a folder; returns a line about it."""
    (epath.Path(folder) / FILE).write_text(json.dumps(found, indent=2) + "\n")
    return summary(found)


def summary(found: Mapping[str, Any]) -> str:
    """One line for people."""
    parameters = f"{found['num_parameters']:,} numbers in {len(found['parameters'])} arrays"
    if found["passed"] is None:
        return f"{parameters}; embeddings not compared"
    image, text = found["image_embeddings"], found["text_embeddings"]
    return (
        f"{parameters}; embeddings differ from those of {found['compared_with']} by at most "
        f"{image['max_abs_difference']:.1e} (images) and {text['max_abs_difference']:.1e} (texts), "
        f"cosine at least {min(image['min_cosine'], text['min_cosine']):.7f}: "
        f"{'within' if found['passed'] else 'beyond'} {found['tolerance']:g}"
    )
