import google_crc32c
import numpy as np
import pytest
import trap_weights

from clipa_t5x.towers import position_embeddings
from clipa_t5x.weights import array_files, exporting, layouts


@pytest.mark.parametrize("scan", [False, True])
def test_every_tensor_is_written_from_what_it_is_made_of(tiny_model, tmp_path, scan):
    model = tiny_model(image={"scan_layers": scan}, text={"scan_layers": scan})
    weights = trap_weights.make(model, 16, 8)
    shapes = {name: array.shape for name, array in weights.items()}
    tables = exporting.fixed_tables(model, 16, 8)
    named = {**layouts.unstacked(shapes), **{k: v.shape for k, v in tables.items()}}
    tensors = layouts.open_clip(named)
    held, most = [], []

    def read(name):
        held.append(name)
        most.append(name)
        return weights[name]

    path = str(tmp_path / "w.safetensors")
    written = exporting.write(path, tensors, read, shapes, tables)
    assert sorted(held) == sorted(weights)  # each once
    with array_files.open_arrays(path) as arrays:
        assert list(written) == [tensor.name for tensor in tensors] and arrays.keys() == set(
            written
        )
        for tensor in tensors:
            array = arrays[tensor.name].read()
            entry = written[tensor.name]
            assert entry["shape"] == list(array.shape)
            assert entry["crc32c"] == f"{google_crc32c.value(array.tobytes()):08x}"
            for part, values in zip(tensor.parts, tensor.split(array), strict=True):
                expected = tables.get(part)
                if expected is None:
                    expected = _unstacked(weights, part)
                np.testing.assert_array_equal(values, expected, err_msg=part)


def _unstacked(weights, part):
    if part in weights:
        return weights[part]
    before, _, rest = part.partition("/encoder/layers_")
    index, _, after = rest.partition("/")
    return weights[f"{before}/encoder/layers/{after}"][int(index)]


def test_fixed_tables_are_those_of_the_size_and_learned_ones_are_none(tiny_model):
    tables = exporting.fixed_tables(tiny_model(), 24, 8)
    expected = position_embeddings.sincos_2d(3, 3, 32)
    assert list(tables) == [layouts.IMAGE_POSITIONS]
    np.testing.assert_array_equal(tables[layouts.IMAGE_POSITIONS], expected)
    model = tiny_model(
        image={"position_embedding": "learned"}, text={"position_embedding": "sincos1d"}
    )
    assert list(exporting.fixed_tables(model, 24, 8)) == [layouts.TEXT_POSITIONS]


def test_large_arrays_are_checksummed_in_pieces(monkeypatch):
    array = np.arange(1000, dtype=np.float32).reshape(10, 100).T
    whole = exporting.describe(array)
    monkeypatch.setattr(exporting, "_CHUNK_BYTES", 7)
    assert exporting.describe(array) == whole
    expected = f"{google_crc32c.value(np.ascontiguousarray(array).tobytes()):08x}"
    assert whole == {"shape": [100, 10], "dtype": "float32", "crc32c": expected}
