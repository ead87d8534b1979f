import pickle

import clipa_files
import numpy as np
import pytest
import safetensors.numpy

from clipa_t5x.errors import UserError
from clipa_t5x.weights import array_sources

ARRAYS = {"a/b/w": np.ones(3, np.float32), "a/v": np.zeros(2, np.float32), "z": np.ones(1, "f")}


def names(path):
    assert array_sources.is_source(str(path))
    with array_sources.open_source(str(path)) as arrays:
        return set(arrays)


def refused(path, *words):
    with pytest.raises(UserError) as caught, array_sources.open_source(str(path)):
        pass
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_file_and_a_part_of_it(tmp_path):
    np.savez(tmp_path / "w.npz", **ARRAYS)
    assert names(tmp_path / "w.npz") == set(ARRAYS)
    assert names(f"{tmp_path}/w.npz:a") == {"b/w", "v"}
    assert names(f"{tmp_path}/w.npz:a/b/") == {"w"}
    with array_sources.open_source(f"{tmp_path}/w.npz:a") as arrays:
        np.testing.assert_array_equal(arrays["b/w"].read(), ARRAYS["a/b/w"])
    refused(f"{tmp_path}/w.npz:b", "nothing under 'b'", "a, z")


def test_a_file_with_a_colon_in_its_name_is_a_file(tmp_path):
    np.savez(tmp_path / "w:a.npz", **ARRAYS)
    assert names(tmp_path / "w:a.npz") == set(ARRAYS)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_folder_as_hugging_face_lays_it_out(tmp_path, name):
    safetensors.numpy.save_file(ARRAYS, tmp_path / name)
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert names(tmp_path) == set(ARRAYS)


def test_safetensors_are_preferred_to_a_pickle_which_is_refused(tmp_path):
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps({"w": 1}))
    refused(tmp_path, "is a pickle", "convert it to .safetensors")
    safetensors.numpy.save_file(ARRAYS, tmp_path / "open_clip_model.safetensors")
    assert names(tmp_path) == set(ARRAYS)


def test_a_folder_of_t5x(tmp_path):
    clipa_files.write_t5x(tmp_path, ARRAYS, inline=("z",))
    assert names(tmp_path) == set(ARRAYS)


def test_what_is_no_source(tmp_path):
    assert not array_sources.is_source(str(tmp_path))
    assert not array_sources.is_source(str(tmp_path / "nowhere.npz:x"))
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert array_sources.is_source(str(tmp_path))
    refused(tmp_path, "there are no weights at", "open_clip_model.safetensors")
    with pytest.raises(UserError, match="URL"):
        array_sources.is_source("strange://bucket/w.npz")


@pytest.mark.parametrize("start", ["hf-hub:", "hf://", "https://huggingface.co/"])
def test_how_to_download_is_said(start):
    with pytest.raises(UserError, match="run `hf download org/ViT-L --local-dir ViT-L` first"):
        array_sources.is_source(f"{start}org/ViT-L")
