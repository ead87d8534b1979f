import pathlib
import shutil

import numpy as np
import pytest
from etils import epath
from safetensors import numpy as safetensors_numpy
from weights import malicious

from clipa_t5x.errors import UserError
from clipa_t5x.weights import array_files

ARRAYS = {"a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}


def save(path, kind):
    if kind == "npz":
        with open(path, "wb") as file:  # np.savez would add its own suffix
            np.savez(file, **ARRAYS)
    else:
        safetensors_numpy.save_file(ARRAYS, path)


def refused(path):
    with pytest.raises(UserError) as info, array_files.open_arrays(str(path)):
        pass
    assert "\n" not in str(info.value)
    assert str(path) in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("suffix", ["npz", "safetensors", "bin"])
def test_the_content_tells_what_a_file_is(tmp_path, kind, suffix):
    path = tmp_path / f"weights.{suffix}"
    save(path, kind)
    with array_files.open_arrays(str(path)) as arrays:
        assert {name: array.shape for name, array in arrays.items()} == {
            "a/kernel": (2, 3),
            "b": (2,),
        }
        for name, wanted in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name].read(), wanted)


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt", "pkl", "npz", "safetensors"])
@pytest.mark.parametrize("make", [malicious.torch_zip, malicious.pickled], ids=["zip", "pickle"])
def test_pickles_are_refused_whatever_their_name_and_never_run(tmp_path, make, suffix):
    canary, path = tmp_path / "canary", tmp_path / f"weights.{suffix}"
    path.write_bytes(make(canary))
    message = refused(path)
    assert "runs whatever code it holds" in message
    assert ".safetensors" in message
    assert not canary.exists()


def test_a_pickle_of_the_oldest_protocol_is_no_array_file(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "weights.npz"
    path.write_bytes(malicious.pickled(canary, protocol=0))
    assert "neither .npz nor .safetensors" in refused(path)
    assert not canary.exists()
    path = path.rename(tmp_path / "weights.pt")
    assert "runs whatever code it holds" in refused(path)
    assert not canary.exists()


def test_an_archive_of_objects_is_refused_and_never_run(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "weights.npz"
    path.write_bytes(malicious.object_npz(canary))
    assert "pickle" in refused(path)
    assert not canary.exists()


def test_a_header_whose_length_looks_like_a_pickle(tmp_path):
    # 0x0280 bytes of header: the file begins as a pickle of protocol 2 does.
    path = tmp_path / "weights.safetensors"
    text = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x0280)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with array_files.open_arrays(str(path)) as arrays:
        assert arrays["w"].read() == 0


@pytest.mark.parametrize("name", ["../up", "a//b", "/root", "a\nb", "x" * 2000, "a\x1b[2Jb"])
def test_names_that_could_do_harm_are_refused(tmp_path, name):
    path = tmp_path / "weights.safetensors"
    safetensors_numpy.save_file({name: np.ones(1)}, path)
    assert "is no name of an array" in refused(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not an array", b"PK\x03\x04 and no more"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "weights.npz"
    path.write_bytes(content)
    refused(path)


def test_what_is_no_file_is_refused(tmp_path):
    assert "there is no file" in refused(tmp_path / "absent.npz")
    assert "there is no file" in refused(tmp_path)


class _Bucket(pathlib.PurePosixPath):
    """A file system that only a URL leads to."""

    folder = None

    def is_file(self):
        return (self.folder / self.name).is_file()

    def copy(self, to):
        shutil.copy(self.folder / self.name, to)


def test_a_remote_file_is_copied_and_named_as_it_was_given(tmp_path):
    epath.register_path_cls("bucket://")(_Bucket)
    _Bucket.folder = tmp_path
    save(tmp_path / "w.npz", "npz")
    with array_files.open_arrays("bucket://somewhere/w.npz") as arrays:
        np.testing.assert_array_equal(arrays["b"].read(), ARRAYS["b"])
    (tmp_path / "w.npz").write_bytes(b"PK\x03\x04 and no more")
    assert refused("bucket://somewhere/w.npz").startswith("bucket://somewhere/w.npz cannot be read")


def test_a_url_that_nothing_reads_is_refused():
    assert "is a URL that cannot be read" in refused("https://example.org/w.npz")


def test_storage_that_does_not_answer_is_an_error_of_one_line(monkeypatch):
    def unanswered(path):
        raise OSError("Error executing an HTTP request:\n could not resolve host")

    monkeypatch.setattr(type(array_files.epath.Path("x")), "is_file", unanswered)
    with pytest.raises(UserError, match="cannot be read .Error executing .* resolve host.: copy"):
        array_files.is_file("gs://bucket/w.npz")
