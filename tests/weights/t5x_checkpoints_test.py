import gzip
import json
import tracemalloc

import clipa_files
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from flax import serialization

from clipa_t5x.errors import UserError
from clipa_t5x.weights import t5x_checkpoints

FOUND = {
    "t": np.array([2.5], np.float32),
    "img/head/kernel": np.arange(120, dtype=np.float32).reshape(12, 10),
    "img/head/scale": np.zeros(5, np.float32),
    "txt/pos_embedding": np.ones((1, 3, 4), ml_dtypes.bfloat16),
}


@pytest.fixture
def folder(tmp_path):
    clipa_files.write_t5x(tmp_path, FOUND)
    return tmp_path


def read(folder):
    with t5x_checkpoints.open_checkpoint(str(folder)) as arrays:
        return {name: (array, array.read()) for name, array in arrays.items()}


def refused(folder, *words):
    with pytest.raises(UserError) as caught:
        read(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    assert all(word in message for word in words), message


def rewrite_index(folder, change):
    path = folder / "checkpoint"
    index = serialization.msgpack_restore(path.read_bytes())
    path.write_bytes(serialization.msgpack_serialize(change(index) or index))


def test_parameters_are_read_from_their_folders_and_from_the_index(folder):
    assert t5x_checkpoints.is_checkpoint(str(folder))
    assert (folder / "target.img.head.kernel" / "1.1").is_file()
    assert not (folder / "target.t").exists()
    arrays = read(folder)
    assert arrays.keys() == FOUND.keys()
    for name, wanted in FOUND.items():
        stated, values = arrays[name]
        assert stated.shape == values.shape == wanted.shape
        assert stated.dtype == values.dtype == wanted.dtype
        np.testing.assert_array_equal(values, wanted)


def test_a_folder_may_have_been_moved_and_a_leaf_may_be_a_placeholder(folder, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "checkpoint_9"
    folder.rename(moved)

    def change(index):
        index["optimizer"]["target"]["img"]["head"]["kernel"] = "PLACEHOLDER://target.img.head"

    rewrite_index(moved, change)
    np.testing.assert_array_equal(read(moved)["img/head/kernel"][1], FOUND["img/head/kernel"])


def test_places_that_the_index_names_are_not_followed(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    clipa_files.write_t5x(other, {"secret": np.full((12, 10), 7.0, np.float32)}, inline=())

    def change(index):
        spec = index["optimizer"]["target"]["img"]["head"]["kernel"]
        spec["kvstore"] = {"driver": "file", "path": str(other / "target.secret")}

    rewrite_index(folder, change)
    np.testing.assert_array_equal(read(folder)["img/head/kernel"][1], FOUND["img/head/kernel"])

    def elsewhere(index):
        target = index["optimizer"]["target"]
        target[f"/../../{other.name}/target.secret"] = target["img"]["head"]["kernel"]

    rewrite_index(folder, elsewhere)
    refused(folder, "there is no array")


def test_a_checkpoint_without_its_index_was_cut_off(folder):
    (folder / "checkpoint").unlink()
    assert t5x_checkpoints.is_checkpoint(str(folder))
    refused(folder, "incomplete")


def test_other_folders_are_none(tmp_path):
    (tmp_path / "state").mkdir()
    assert not t5x_checkpoints.is_checkpoint(str(tmp_path))
    assert not t5x_checkpoints.is_checkpoint(str(tmp_path / "nowhere"))


def test_a_missing_piece_is_no_zeros(folder):
    (folder / "target.img.head.kernel" / "1.0").unlink()
    refused(folder, "target.img.head.kernel", "piece (1, 0)")


def test_a_damaged_piece_is_told_of(folder):
    piece = folder / "target.img.head.kernel" / "0.0"
    piece.write_bytes(piece.read_bytes()[:20])
    refused(folder, "target.img.head.kernel", "damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**40, 10]},
        {"shape": [12, 10, 1]},
        {"shape": [-12, 10]},
        {"shape": "x"},
        {"chunks": [0, 8]},
        {"chunks": [2**40, 2**20]},
        {"dtype": "|O"},
        {"dtype": "<M8[ns]"},
        {"dtype": [["a", "<f4"]]},
        {"compressor": {"id": "blosc"}},
        {"compressor": "gzip"},
        {"filters": [{"id": "delta"}]},
        {"dimension_separator": "/"},
        {"order": "A"},
        {"dtype": "(,)f4"},
        {"shape": [11, 10], "chunks": [11, 10]},
    ],
)
def test_headers_that_cannot_be_are_refused(folder, change):
    path = folder / "target.img.head.kernel" / ".zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(folder, "target.img.head.kernel")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"model_checkpoint_path: 'x'",
        b"\x80\x04\x95",
        b"\x81" * 5000,
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        serialization.msgpack_serialize({"optimizer": {}}),
        serialization.msgpack_serialize({"optimizer": {"target": 3}}),
        serialization.msgpack_serialize({"optimizer": {"target": {}}}),
        serialization.msgpack_serialize({"optimizer": {"target": {"w": "text"}}}),
        serialization.msgpack_serialize({"optimizer": {"target": {"w": np.ones(1, "U3")}}}),
    ],
)
def test_indices_that_cannot_be_are_refused(folder, content):
    (folder / "checkpoint").write_bytes(content)
    refused(folder)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">f2"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("compressor", [None, {"id": "zlib", "level": 1}, {"id": "gzip"}])
def test_pieces_are_put_together_as_tensorstore_wrote_them(tmp_path, dtype, order, compressor):
    folder = tmp_path / "target.w"
    wanted = np.arange(210).reshape(5, 6, 7).astype(dtype)
    metadata = {"shape": [5, 6, 7], "chunks": [2, 6, 4], "dtype": dtype, "order": order,
                "compressor": compressor}  # fmt: skip
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}}
    spec["metadata"] = metadata
    tensorstore.open(spec, create=True).result().write(wanted).result()
    index = {"optimizer": {"target": {"w": "PLACEHOLDER://w"}}}
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(index))
    stated, values = read(tmp_path)["w"]
    np.testing.assert_array_equal(values, wanted)
    assert stated.dtype == values.dtype == wanted.dtype.newbyteorder("=")


def test_memory_is_given_for_what_is_there_and_not_for_what_is_stated(folder):
    target = folder / "target.img.head.kernel"
    header = json.loads((target / ".zarray").read_text())
    (target / "0.0").write_bytes(gzip.compress(bytes(2**26)))  # 64 MiB in the place of 256 bytes
    tracemalloc.start()
    refused(folder, "target.img.head.kernel", "piece (0, 0) is damaged")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    wide = {**header, "shape": [2**13, 2**14], "chunks": [2**13, 2**14]}
    (target / ".zarray").write_text(json.dumps(wide))
    (target / "0.0").write_bytes(gzip.compress(bytes(2**20)))
    refused(folder, "target.img.head.kernel", "which cannot come from the")
