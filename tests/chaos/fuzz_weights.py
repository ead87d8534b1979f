"""Malformed files and folders of weights, of this package's and of other trainers' layouts.

Of the kinds `FOREIGN` an input has a file `source`: the path, within the folder, that is loaded
into `model()`.
"""

import functools
import io
import json
import pathlib
import struct
import tempfile
import zipfile
import zlib

import clipa_files
import ml_dtypes
import numpy as np
import trap_weights
from chaos import fuzz_mutations as mutations
from flax import serialization
from numpy.lib import format as npy_format
from safetensors import numpy as safetensors_numpy
from weights import malicious

from clipa_t5x import models
from clipa_t5x.towers import text_transformer, vision_transformer
from clipa_t5x.weights import exporting, layouts, open_clip_config

CANARY = "canary"
PIXELS, LENGTH = 8, 4
_PATCH, _VOCABULARY, _OUT_DIM = 4, 24, 6
_IMAGE = {"width": 8, "depth": 2, "mlp_dim": 12, "num_heads": 2}
_TEXT = {"width": 6, "depth": 1, "mlp_dim": 10, "num_heads": 3}
_CONFIG, _WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


@functools.cache
def model():
    """What the weights of other trainers are loaded into: layers of one tower are stacked."""
    return models.ClipModel(
        vision_transformer.VisionTransformer(
            **_IMAGE, patch_size=_PATCH, out_dim=_OUT_DIM, scan_layers=True
        ),
        text_transformer.TextTransformer(
            **_TEXT, vocab_size=_VOCABULARY, out_dim=_OUT_DIM, scan_layers=False
        ),
    )


@functools.cache
def _layouts():
    """Arrays of the model by name, in every layout."""
    own = trap_weights.make(model(), PIXELS, LENGTH)
    shapes = {name: array.shape for name, array in own.items()}
    tables = exporting.fixed_tables(model(), PIXELS, LENGTH)
    tensors = layouts.open_clip(
        {**layouts.unstacked(shapes), **{name: table.shape for name, table in tables.items()}}
    )
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "w.safetensors"
        exporting.write(str(path), tensors, own.__getitem__, shapes, tables)
        open_clip = safetensors_numpy.load_file(path)
    clipa = clipa_files.arrays(
        image=_IMAGE, text=_TEXT, length=LENGTH, patch=_PATCH, vocabulary=_VOCABULARY,
        out_dim=_OUT_DIM,
    )  # fmt: skip
    return {"own": own, "clipa": clipa, "open_clip": open_clip}


def _archive(members, method=zipfile.ZIP_STORED):
    """A zip file whose bytes depend on nothing else."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


@functools.cache
def _arrays():
    rng = np.random.default_rng(0)
    return {
        "image_tower/head/kernel": rng.normal(size=(8, 4)).astype(np.float32),
        "logit_scale": np.asarray(rng.normal(), np.float32),
        "text_tower/embedding": rng.normal(size=(16, 4)).astype(np.float16),
    }


def _npy(array):
    buffer = io.BytesIO()
    npy_format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _npy_members():
    return [(f"{name}.npy", _npy(array)) for name, array in _arrays().items()]


def _npz(rng):
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    members = _npy_members()
    way = rng.randrange(4)
    if way == 0:
        return {"weights.npz": mutations.spoil(rng, _archive(members, method))}
    place = rng.randrange(len(members))
    name, data = members[place]
    if way == 1:  # behind right checksums of the archive
        data = mutations.spoil(rng, data)
    elif way == 2:
        header = mutations.spoil(rng, data[10:128])
        data = data[:8] + struct.pack("<H", len(header) & 0xFFFF) + header + data[128:]
    else:
        data = data[:10] + mutations.set_digits(rng, data[10:128]) + data[128:]
    members[place] = (rng.choice((name, name, name, "../../canary", "")), data)
    return {"weights.npz": _archive(members, method)}


def _safetensors_bytes():
    return safetensors_numpy.save(_arrays())


def _safetensors(rng):
    data = _safetensors_bytes()
    if rng.random() < 0.4:
        return {"weights.safetensors": mutations.spoil(rng, data)}
    length = int.from_bytes(data[:8], "little")
    header = mutations.spoil_json(rng, json.loads(data[8 : 8 + length]))
    if rng.random() < 0.3:
        header = mutations.spoil(rng, header)
    stated = (
        mutations.number_field(rng, 8) if rng.random() < 0.1 else struct.pack("<Q", len(header))
    )
    return {"weights.safetensors": stated + header + data[8 + length :]}


def _pickles():
    """Files that touch the canary, relative to where the reader works, when they are unpickled."""
    return [
        malicious.torch_zip(CANARY),
        malicious.object_npz(CANARY),
        *(malicious.pickled(CANARY, protocol) for protocol in range(6)),
    ]


def _pickle(rng):
    data = rng.choice(_pickles())
    if rng.random() < 0.7:
        data = mutations.spoil(rng, data, _pickles())
    suffix = rng.choice(("npz", "safetensors", "pt", "bin", "pth"))
    return {f"weights.{suffix}": data}


# Names of what other models have, of stacks, and of nothing.
_OTHER_NAMES = (
    *("visual.trunk.a", "visual.layer1.0", "attn_mask", "logit_bias", "visual.attn_pool.x", "t"),
    *("img/pos_embedding", "txt/pos_embedding", "img/pre_norm/scale", "img/MAPHead_0/probe"),
    *("image_tower/encoder/layers/mlp/fc1/bias", "image_tower/position_embedding", "params/t"),
    *("text_tower/encoder/layers/norm1/bias", "image_tower/encoder/layers_99999999999/norm1/bias"),
    *(
        "../../canary",
        "a" * 900,
        "a/" * 200 + "b",
        "\x1b[2J",
        "\u202e",
        "x\ny",
        "image_tower/",
        "/",
    ),
)
_SHAPES = ((), (1,), (0,), (1, 1), (2**40, 0), (0, 2**40), (3,), (2, 0, 2), (1,) * 30)
_OTHER_DTYPES = ("bool", "int8", "uint64", "float16", "float64", ml_dtypes.bfloat16)
_ODD_VALUES = (np.nan, np.inf, -np.inf, 3e38, 1e-45)


def _spoil_arrays(rng, arrays):
    """One to three arrays are missing, renamed, of another shape or dtype, or of odd numbers."""
    arrays = dict(arrays)
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(list(arrays) or [""])
        array = arrays.pop(name, np.ones(2, np.float32))
        way = rng.randrange(7)
        if way == 1:
            name = rng.choice((*_OTHER_NAMES, f"{name}x", name[:-1], f"a/{name}", name.upper()))
        elif way == 2:
            arrays[rng.choice(_OTHER_NAMES)] = np.ones(rng.choice(_SHAPES), np.float32)
        elif way == 3:
            array = rng.choice((array.T, array.reshape(-1), array[None], np.atleast_1d(array)[:-1]))
        elif way == 4:
            array = np.ones(rng.choice(_SHAPES), array.dtype)
        elif way == 5:
            array = array.astype(rng.choice(_OTHER_DTYPES))
        elif way == 6:
            array = np.where(np.arange(array.size).reshape(array.shape) == 0,
                             np.float32(rng.choice(_ODD_VALUES)), array)  # fmt: skip
        if way:
            arrays[name] = np.ascontiguousarray(array) if array.ndim else array
    return arrays


def _write(arrays, is_npz):
    """A file of arrays."""
    if is_npz:
        return _archive((f"{name}.npy", _npy(array)) for name, array in arrays.items())
    return safetensors_numpy.save({k: np.ascontiguousarray(v) for k, v in arrays.items()})


_PREFIXES = {
    "own": ("", "params/", "a/b/"),
    "clipa": ("", "params/", "opt/target/", "a/b/"),
    "open_clip": ("", "text.", "a/b/"),
}


def _prefixed(layout, prefix):
    arrays = _layouts()[layout]
    if prefix == "text.":
        return {k if k.startswith("visual.") else prefix + k: v for k, v in arrays.items()}
    return {prefix + name: array for name, array in arrays.items()}


def _foreign(rng):
    """A whole model in some layout, in either kind of file; what is spoilt is what it states."""
    layout = rng.choice(list(_PREFIXES))
    prefix = rng.choice(_PREFIXES[layout])
    is_npz = rng.random() < 0.5
    data = _write(_spoil_arrays(rng, _prefixed(layout, prefix)), is_npz)
    if rng.random() < 0.1:
        data = mutations.spoil(rng, data)
    return {"w": data, "source": b"w:a/b" if prefix == "a/b/" else b"w"}


_TREES = ("", "a", "a/b/", "/a/b", "a/b/img", "a/b:a/b", "..", "../a/b", "a//b", "params", "\0",
          "a\nb", "\x1b[2J", "%s{}", "a" * 5000, "/" * 300, "\u202e", ".", "C:\\x")  # fmt: skip


def _subtree(rng):
    """A sound file, or nearly, of which a part is asked for."""
    arrays = {**_prefixed("clipa", "a/b/"), "a/c": np.ones(2), "d": np.ones(1, np.float32)}
    if rng.random() < 0.4:
        arrays = _spoil_arrays(rng, arrays)
    tree = rng.choice((*_TREES, mutations.spoil_text(rng, "a/b")))
    data = _write(arrays, True)
    if rng.random() < 0.1:
        data = mutations.spoil(rng, data)
    return {"w.npz": data, "source": f"w.npz:{tree}".encode("utf-8", "surrogatepass")}


@functools.cache
def _config_json():
    return open_clip_config.config(model(), PIXELS, LENGTH, "squash")


def _folder_files():
    weights = safetensors_numpy.save(_layouts()["open_clip"])
    return {_CONFIG: json.dumps(_config_json()).encode(), _WEIGHTS: weights, "source": b"."}


# What a configuration may say beside what is written here.
_FIELDS = (
    *("timm_model_name", "ls_init_value", "block_type", "qk_norm", "act_kwargs", "norm_kwargs"),
    *("new_thing", "pool_type", "heads", "layers", "mlp_ratio", "head_width", "eps"),
)


def _open_clip_folder(rng):
    files = _folder_files()
    config = json.loads(files[_CONFIG])
    if rng.random() < 0.3:
        section = config["model_cfg"][rng.choice(("vision_cfg", "text_cfg"))]
        section[rng.choice(_FIELDS)] = rng.choice(mutations.VALUES)
    data = mutations.spoil_json(rng, config)
    if rng.random() < 0.2:
        data = mutations.spoil(rng, data)
    way = rng.randrange(10)
    if way == 0:
        files = mutations.spoil_folder(rng, {**files, _CONFIG: data}, keep="source")
    elif way == 1:
        files[_WEIGHTS] = _write(_spoil_arrays(rng, _layouts()["open_clip"]), False)
    else:
        files[_CONFIG] = data
    files["source"] = rng.choice((b".", _WEIGHTS.encode()))
    return files


@functools.cache
def _t5x_files():
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder) / "checkpoint_7"
        root.mkdir()
        clipa_files.write_t5x(root, _layouts()["clipa"], inline=("t", "img/cls"))
        paths = [p for p in sorted(root.rglob("*")) if p.is_file()]
        found = {str(p.relative_to(folder)): p.read_bytes() for p in paths}
    return {**found, "source": b"checkpoint_7"}


def _t5x(rng):
    files = dict(_t5x_files())
    index = "checkpoint_7/checkpoint"
    headers = [path for path in files if path.endswith("/.zarray")]
    way = rng.randrange(6)
    if way == 0:
        files[index] = mutations.spoil(rng, files[index])
    elif way == 1:
        files[index] = _spoil_index(rng, files[index])
    elif way == 2:
        path = rng.choice(headers)
        files[path] = mutations.spoil_json(rng, json.loads(files[path]))
        if rng.random() < 0.25:
            files[path] = mutations.spoil(rng, files[path])
    elif way == 3:
        files = mutations.spoil_folder(rng, files, keep="source")
    else:
        path = rng.choice([p for p in files if p not in (index, "source", *headers)])
        content = zlib.decompress(files[path], 31)
        if way == 4:  # behind right checksums
            content = rng.choice((mutations.spoil(rng, content), _ZEROS, b""))
            files[path] = _gzip(content)
        else:
            files[path] = mutations.spoil(rng, files[path], [_gzip(content) * 2])
    return files


_ZEROS = bytes(2**24)  # Of a piece that states a few hundred: a bomb.


@functools.lru_cache(2)
def _gzip_of_zeros():
    return _deflated(_ZEROS)


def _gzip(content):
    return _gzip_of_zeros() if content is _ZEROS else _deflated(content)


def _deflated(content):
    packer = zlib.compressobj(wbits=31)
    return packer.compress(content) + packer.flush()


def _spoil_index(rng, data):
    """Values of the index's tree exchanged for others, of any type that msgpack has."""
    tree = serialization.msgpack_restore(data)
    odd = [*(v for v in mutations.VALUES if _is_packable(v)), np.ones(3, np.float32), b"\0" * 9,
           np.ones((2, 2), np.int8), np.zeros((2**40, 0), np.float32), "PLACEHOLDER://a", 1j,
           {"driver": "file", "kvstore": {"path": "/etc/passwd"}}]  # fmt: skip
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(mutations.places(tree))
        if not places:
            break
        parent, key = rng.choice(places)
        way = rng.randrange(4)
        if way == 0:
            del parent[key]
        elif way == 1:
            parent[rng.choice(("x", "", "../x", "a\0b", "\x1b[2J", "a" * 3000, "img", "t"))] = (
                parent.pop(key)
            )
        else:
            parent[key] = rng.choice(odd)
    return serialization.msgpack_serialize(tree)


def _is_packable(value):
    try:
        serialization.msgpack_serialize(value)
    except (OverflowError, ValueError, TypeError, UnicodeError):
        return False
    return True


VALID = {
    "npz": lambda: {"weights.npz": _archive(_npy_members())},
    "safetensors": lambda: {"weights.safetensors": _safetensors_bytes()},
    "pickle": lambda: {"weights.npz": _archive(_npy_members())},
    "foreign": lambda: {"w": _write(_prefixed("clipa", "params/"), True), "source": b"w"},
    "subtree": lambda: {"w": _write(_prefixed("clipa", "a/b/"), True), "source": b"w:a/b"},
    "open_clip_folder": _folder_files,
    "t5x": _t5x_files,
}
MAKERS = {
    "npz": _npz,
    "safetensors": _safetensors,
    "pickle": _pickle,
    "foreign": _foreign,
    "subtree": _subtree,
    "open_clip_folder": _open_clip_folder,
    "t5x": _t5x,
}
FOREIGN = ("foreign", "subtree", "open_clip_folder", "t5x")
