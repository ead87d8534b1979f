"""Weights as CLIPA's trainers name and shape them, written down from its description: for tests.

Nothing here knows `clipa_t5x`: it is what imports are compared with.
"""

import json

import numpy as np
import tensorstore
from flax import serialization

# Unequal on purpose, so that no wrong order of dimensions fits.
IMAGE = {"width": 24, "depth": 2, "mlp_dim": 40, "num_heads": 3}
TEXT = {"width": 16, "depth": 3, "mlp_dim": 28, "num_heads": 2}
OUT_DIM, PATCH, VOCABULARY, LENGTH, PIXELS = 10, 4, 52, 8, 16


def _tower(name, rng, out_dim, *, width, depth, mlp_dim, num_heads):
    head = (num_heads, width // num_heads)

    def weights(*shape):
        return (rng.normal(size=shape) * 0.3).astype(np.float32)

    arrays = {f"{name}/encoder_norm/{x}": 1 + weights(width) for x in ("scale", "bias")}
    arrays[f"{name}/head/kernel"] = weights(width, out_dim)
    for i in range(depth):
        block = f"{name}/Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_1"):
            arrays[f"{block}/{norm}/scale"] = 1 + weights(width)
            arrays[f"{block}/{norm}/bias"] = weights(width)
        attention = f"{block}/MultiHeadDotProductAttention_0"
        for each in ("query", "key", "value"):
            arrays[f"{attention}/{each}/kernel"] = weights(width, *head)
            arrays[f"{attention}/{each}/bias"] = weights(*head)
        arrays[f"{attention}/out/kernel"] = weights(*head, width)
        arrays[f"{attention}/out/bias"] = weights(width)
        arrays[f"{block}/MlpBlock_0/Dense_0/kernel"] = weights(width, mlp_dim)
        arrays[f"{block}/MlpBlock_0/Dense_0/bias"] = weights(mlp_dim)
        arrays[f"{block}/MlpBlock_0/Dense_1/kernel"] = weights(mlp_dim, width)
        arrays[f"{block}/MlpBlock_0/Dense_1/bias"] = weights(width)
    return arrays


def arrays(
    seed=0, *, image=IMAGE, text=TEXT, length=LENGTH, learned_grid=None, patch=PATCH,
    vocabulary=VOCABULARY, out_dim=OUT_DIM,
):  # fmt: skip
    """Arrays by name, without 'params/'; `learned_grid` patches a side where positions are."""
    rng = np.random.default_rng(seed)
    found = {
        "t": np.array([2.5], np.float32),
        "img/cls": rng.normal(size=(1, 1, image["width"])).astype(np.float32),
        "img/embedding/kernel": rng.normal(size=(patch, patch, 3, image["width"])).astype("f"),
        "txt/Embed_0/embedding": 0.02 * rng.normal(size=(vocabulary, text["width"])).astype("f"),
        "txt/pos_embedding": 0.01 * rng.normal(size=(1, length, text["width"])).astype("f"),
        **_tower("img", rng, out_dim, **image),
        **_tower("txt", rng, out_dim, **text),
    }
    if learned_grid:
        shape = (1, 1 + learned_grid**2, image["width"])
        found["img/pos_embedding"] = 0.2 * rng.normal(size=shape).astype(np.float32)
    return found


def heads_joined(found):
    """The same, as the partitioned trainer has it."""

    def joined(name, array):
        if "/MultiHeadDotProductAttention_0/" not in name or array.ndim == 1:
            return array
        if name.endswith("/out/kernel"):
            return array.reshape(-1, array.shape[-1])
        return array.reshape(*array.shape[:-2], -1)

    return {name: joined(name, array) for name, array in found.items()}


def write_t5x(folder, found, inline=("t",), chunk=8):
    """A T5X checkpoint: an index in msgpack, and zarr arrays of pieces of up to `chunk` a side."""
    target = {}
    for name, array in found.items():
        *above, last = name.split("/")
        node = target
        for each in above:
            node = node.setdefault(each, {})
        if name in inline:
            node[last] = array
            continue
        dots = f"target.{name.replace('/', '.')}"
        metadata = {
            "shape": list(array.shape),
            "chunks": [min(chunk, size) for size in array.shape],
            "dtype": "bfloat16" if array.dtype.name == "bfloat16" else array.dtype.str,
            "compressor": {"id": "gzip"},
        }
        kvstore = {"driver": "file", "path": str(folder / dots)}
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
        tensorstore.open(spec, create=True).result().write(array).result()
        # As T5X writes them: places that are the bucket's, not this machine's.
        node[last] = {**spec, "kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket"}}
    state = {"step": np.int32(7), "param_states": {"0": {"mu": {"t": np.zeros(1, "f")}}}}
    index = {"version": 3, "optimizer": {"target": target, "state": state}}
    (folder / "checkpoint").write_bytes(serialization.to_bytes(index))
    return str(folder)


def sincos_2d(grid, width):
    """The fixed table [1 + grid^2, width]."""
    k = width // 4
    omega = 1 / 10000 ** (np.arange(k) / (k - 1))
    rows = [np.zeros(width)]
    for y in range(grid):
        for x in range(grid):
            parts = [np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)]
            rows.append(np.concatenate(parts))
    return np.stack(rows)


def _norm(x, found, name):
    variance = (x**2).mean(-1, keepdims=True) - x.mean(-1, keepdims=True) ** 2
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6)
    return normed * found[f"{name}/scale"] + found[f"{name}/bias"]


def _encode(x, found, name, depth):
    for i in range(depth):
        block = f"{name}/Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_0"
        normed = _norm(x, found, f"{block}/LayerNorm_0")
        q, k, v = (
            np.einsum("bld,dhk->bhlk", normed, found[f"{attention}/{each}/kernel"])
            + found[f"{attention}/{each}/bias"][None, :, None]
            for each in ("query", "key", "value")
        )
        scores = np.einsum("bhqd,bhkd->bhqk", q / np.sqrt(q.shape[-1]), k)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("bhqk,bhkd->bqhd", scores, v)
        out = np.einsum("bqhd,hdw->bqw", mixed, found[f"{attention}/out/kernel"])
        x = x + out + found[f"{attention}/out/bias"]
        normed = _norm(x, found, f"{block}/LayerNorm_1")
        dense = f"{block}/MlpBlock_0/Dense_"
        hidden = normed @ found[f"{dense}0/kernel"] + found[f"{dense}0/bias"]
        cubic = hidden + 0.044715 * hidden**3
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * cubic))
        x = x + hidden @ found[f"{dense}1/kernel"] + found[f"{dense}1/bias"]
    return x


def embed(found, images, text, *, pooling="gap", image=IMAGE, text_sizes=TEXT):
    """Unit embeddings [batch, out] of normalised images and token ids, in float64."""
    found = {name: np.asarray(array, np.float64) for name, array in found.items()}
    kernel = found["img/embedding/kernel"]
    p, width = kernel.shape[0], kernel.shape[-1]
    batch, grid = images.shape[0], images.shape[1] // p
    patches = np.asarray(images, np.float64).reshape(batch, grid, p, grid, p, 3)
    tokens = np.einsum("byixjc,ijcw->byxw", patches, kernel).reshape(batch, -1, width)
    cls = np.broadcast_to(found["img/cls"], (batch, 1, width))
    tokens = np.concatenate([cls, tokens], axis=1)
    tokens = tokens + found.get("img/pos_embedding", sincos_2d(grid, width))
    tokens = _encode(tokens, found, "img", image["depth"])
    if pooling == "gap":
        pooled = _norm(tokens[:, 1:].mean(axis=1), found, "img/encoder_norm")
    else:
        pooled = _norm(tokens, found, "img/encoder_norm")[:, 0]
    words = found["txt/Embed_0/embedding"][text] + found["txt/pos_embedding"]
    words = _norm(_encode(words, found, "txt", text_sizes["depth"]), found, "txt/encoder_norm")
    both = pooled @ found["img/head/kernel"], words[:, -1] @ found["txt/head/kernel"]
    return [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in both]


def write_config(path, **model_cfg):
    """An `open_clip_config.json`."""
    path.write_text(json.dumps({"model_cfg": model_cfg}))
