import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from clipa_t5x.weights import array_files, array_writers

ARRAYS = {
    "b/kernel": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "a": np.asarray(3.5, np.float32),
    "empty": np.zeros((0, 4), np.float16),
    "moments": np.array([[1.5, -2]], ml_dtypes.bfloat16),
    "count": np.array([7], np.int32),
}


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_arrays_are_read_as_they_were_written_in_any_order(name, tmp_path):
    path = str(tmp_path / name)
    with array_writers.open_writer(path, ARRAYS) as writer:
        for key in reversed(ARRAYS):
            writer.write(key, ARRAYS[key])
    assert [each.name for each in tmp_path.iterdir()] == [name]
    with array_files.open_arrays(path) as found:
        assert found.keys() == ARRAYS.keys()
        for key, array in ARRAYS.items():
            read = found[key].read()
            assert read.dtype == array.dtype and read.shape == array.shape
            assert read.tobytes() == array.tobytes()


def test_the_libraries_read_the_same(tmp_path):
    for name in ("x.npz", "x.safetensors"):
        with array_writers.open_writer(str(tmp_path / name), ARRAYS) as writer:
            for key, array in ARRAYS.items():
                writer.write(key, array)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as found:
        np.testing.assert_array_equal(found["b/kernel"], ARRAYS["b/kernel"])
        assert found["moments"].dtype == "V2"
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found["b/kernel"], ARRAYS["b/kernel"])
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_what_is_not_as_stated_leaves_no_file(name, tmp_path):
    path = str(tmp_path / name)
    with (
        pytest.raises(ValueError, match="a is .* and was stated"),
        array_writers.open_writer(path, ARRAYS) as writer,
    ):
        writer.write("a", np.zeros(3, np.float32))
    with (
        pytest.raises(ValueError, match="not written: b/kernel, empty"),
        array_writers.open_writer(path, ARRAYS) as writer,
    ):
        for key in ("a", "moments", "count"):
            writer.write(key, ARRAYS[key])
    assert not list(tmp_path.iterdir())


class _Store(pathlib.PurePosixPath):
    """A file system that only a URL leads to."""

    folder = None

    def open(self, mode):
        return (self.folder / self.name).open(mode)


def test_a_remote_file_is_written(tmp_path):
    epath.register_path_cls("store://")(_Store)
    _Store.folder = tmp_path
    with array_writers.open_writer("store://somewhere/x.npz", {"a": ARRAYS["a"]}) as writer:
        writer.write("a", ARRAYS["a"])
    assert np.load(tmp_path / "x.npz")["a"] == 3.5
