import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from clipa_t5x.errors import UserError
from clipa_t5x.weights.safetensors_files import open_safetensors


def write(path, header, data=b"", length=None):
    """A file with a header of any bytes, or of an object, and any length stated."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return str(path)


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def refused(path):
    with pytest.raises(UserError) as info, open_safetensors(path) as arrays:
        for array in arrays.values():
            array.read()
    assert "\n" not in str(info.value)
    assert path in str(info.value)
    return str(info.value)


def test_reads_what_the_library_writes(tmp_path):
    path = str(tmp_path / "w.safetensors")
    rng = np.random.default_rng(0)
    wanted = {
        "a/kernel": rng.normal(size=(2, 3)).astype(np.float32),
        "b": np.float64(1.5),
        "half": np.ones(3, np.float16),
        "flags": np.array([True, False]),
        "count": np.arange(4, dtype=np.int64),
    }
    safetensors_numpy.save_file({k: np.asarray(v) for k, v in wanted.items()}, path)
    with open_safetensors(path) as arrays:
        assert set(arrays) == set(wanted)
        for name, value in wanted.items():
            assert arrays[name].shape == np.shape(value)
            found = arrays[name].read()
            assert found.dtype == arrays[name].dtype == value.dtype
            np.testing.assert_array_equal(found, value)


def test_reads_bfloat16(tmp_path):
    wanted = np.asarray(jnp.asarray([1.0, -2.5], jnp.bfloat16))
    path = write(tmp_path / "w", {"w": entry("BF16", offsets=(0, 4))}, wanted.tobytes())
    with open_safetensors(path) as arrays:
        assert arrays["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(arrays["w"].read(), wanted)


@pytest.mark.parametrize(
    ("header", "num_bytes"),
    [
        ({"w": entry()}, 7),
        ({"w": entry()}, 9),
        ({"w": entry(offsets=(1, 9))}, 9),
        ({"w": entry(shape=(3,))}, 8),
        ({"w": entry(shape=(-2,))}, 8),
        ({"w": entry(shape=(2.0,))}, 8),
        ({"w": entry(offsets=(8, 0))}, 8),
        ({"w": entry(shape=(2**62, 8), offsets=(0, 0))}, 0),
        ({"w": entry(shape=(2**32, 2**32), offsets=(0, 0))}, 0),
        ({"w": entry(shape=("9" * 50,))}, 8),
        ({"w": entry("O")}, 8),
        ({"w": entry("C64", (1,))}, 8),
        ({"w": entry("F8_E4M3", (8,))}, 8),
        ({"w": entry(), "v": entry(offsets=(4, 12))}, 12),
        ({"w": entry(), "v": entry(offsets=(12, 20))}, 20),
        ({"w": [1, 2]}, 8),
        (b'{"w": ', 8),
        (b"[" * 5000, 0),
        (b'{"w":' + b"[" * 5000, 0),
        (b'{"w":' + json.dumps(entry()).encode() + b"}\xff\xfe", 8),
    ],
)
def test_headers_that_do_not_fit_are_refused(tmp_path, header, num_bytes):
    refused(write(tmp_path / "w.safetensors", header, bytes(num_bytes)))


def test_two_arrays_of_one_name_are_refused(tmp_path):
    one = json.dumps(entry())
    header = f'{{"w":{one},"w":{json.dumps(entry("I32"))}}}'.encode()
    assert "names 'w' twice" in refused(write(tmp_path / "w", header, bytes(8)))


@pytest.mark.parametrize("length", [0, 1, 1000, 10**8 + 1, 2**63, 2**64 - 1])
def test_lengths_beyond_the_file_are_refused(tmp_path, length):
    refused(write(tmp_path / "w", {"w": entry()}, bytes(8), length))


@pytest.mark.parametrize("size", [0, 4, 8, 20, 70])
def test_truncated_files_are_refused(tmp_path, size):
    path = tmp_path / "w"
    write(path, {"w": entry()}, bytes(8))
    path.write_bytes(path.read_bytes()[:size])
    refused(str(path))
