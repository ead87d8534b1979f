import json

import numpy as np
import pytest
import trap_weights
from flax import traverse_util

from clipa_t5x.weights import parity

ARRAYS = {"w": {"shape": [2, 3], "dtype": "float32", "crc32c": "00000000", "from": ["w"]}}


def units(seed=0):
    x = np.random.default_rng(seed).normal(size=(4, 8)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def certificate(images, texts, **kwargs):
    before = parity.Embeddings(units(0), units(1))
    return parity.certificate(
        source="a", target="b", layout="clipa", parameters=ARRAYS,
        batch=parity.probe(4, 8, 8, 64), compared_with="another", before=before,
        after=parity.Embeddings(images, texts), **kwargs,
    )  # fmt: skip


def test_the_probe_is_a_function_of_its_arguments_and_has_texts_of_all_lengths():
    first, second = parity.probe(4, 16, 8, 40_000), parity.probe(4, 16, 8, 40_000)
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.ids, second.ids)
    assert [int((row != 0).sum()) for row in first.ids] == [8, 6, 3, 1]
    assert first.ids.max() < 30_522
    assert first.images.shape == (4, 16, 16, 3) and first.images.dtype == np.uint8


def test_equal_embeddings_pass():
    found = certificate(units(0), units(1))
    assert found["passed"] and found["num_parameters"] == 6
    assert found["image_embeddings"]["max_abs_difference"] == 0
    assert found["text_embeddings"]["min_cosine"] == pytest.approx(1)
    assert "within 1e-05" in parity.summary(found)


@pytest.mark.parametrize("side", [0, 1])
def test_one_number_beyond_the_tolerance_fails(side):
    embeddings = [units(0), units(1)]
    embeddings[side] = embeddings[side].copy()
    embeddings[side][2, 3] += 1e-3
    found = certificate(*embeddings)
    assert not found["passed"] and "beyond 1e-05" in parity.summary(found)
    name = ("image_embeddings", "text_embeddings")[side]
    assert found[name]["max_abs_difference"] == pytest.approx(1e-3, rel=1e-3)
    assert certificate(*embeddings, tolerance=2e-3)["passed"]


def test_a_turned_embedding_fails_by_its_cosine():
    assert certificate(-units(0), units(1))["image_embeddings"]["min_cosine"] == pytest.approx(-1)


def test_what_was_not_embedded_neither_passes_nor_fails(tmp_path):
    found = parity.certificate(source="a", target="b", layout="clipa", parameters=ARRAYS)
    line = parity.write(str(tmp_path), found)
    assert found["passed"] is None and "not compared" in line
    assert json.loads((tmp_path / parity.FILE).read_text()) == found


def test_embeddings_are_float32_s_whatever_the_model_computes_in(tiny_model):
    batch = parity.probe(3, 16, 8, 64)
    params = traverse_util.unflatten_dict(trap_weights.make(tiny_model(), 16, 8), sep="/")
    exact = parity.embed(tiny_model(), params, batch)
    half = parity.embed(
        tiny_model(image={"dtype": "bfloat16"}, text={"dtype": "bfloat16"}), params, batch
    )
    np.testing.assert_array_equal(exact.images, half.images)
    np.testing.assert_array_equal(exact.texts, half.texts)
    np.testing.assert_allclose(np.linalg.norm(exact.images, axis=1), 1, atol=1e-6)


def test_what_is_no_number_fails_and_is_null(tmp_path):
    broken = units(0)
    broken[1, 2] = np.nan
    found = certificate(broken, units(1))
    assert not found["passed"] and "nan (images)" in parity.write(str(tmp_path), found)

    def refuse(constant):
        raise ValueError(constant)

    read = json.loads((tmp_path / parity.FILE).read_text(), parse_constant=refuse)
    assert read["image_embeddings"]["max_abs_difference"] is None and read["passed"] is False
    assert parity.layout_of(str(tmp_path)) == "clipa"
    (tmp_path / parity.FILE).write_text("[")
    assert parity.layout_of(str(tmp_path)) is parity.layout_of(str(tmp_path / "nowhere")) is None
