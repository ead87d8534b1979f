import json

import jax.export
import numpy as np
import trap_weights
from flax import traverse_util

from clipa_t5x.weights import parity, serving


def test_artefacts_give_the_model_s_embeddings(tiny_model, tmp_path):
    model = tiny_model(init_logit_bias=-10.0)
    weights = trap_weights.make(model, 16, 8)
    written = serving.write(str(tmp_path), model, weights, weights.__getitem__, 16, 8, {"texts": 1})
    assert written.keys() == weights.keys()
    batch = parity.probe(5, 16, 8, 64)
    served = serving.embed(str(tmp_path), batch)
    expected = parity.embed(model, traverse_util.unflatten_dict(weights, sep="/"), batch)
    np.testing.assert_allclose(served.images, expected.images, atol=2e-6)
    np.testing.assert_allclose(served.texts, expected.texts, atol=2e-6)
    signature = json.loads((tmp_path / serving.SIGNATURE).read_text())
    assert signature["image_tower"] == {"inputs": ["batch", 16, 16, 3], "dtype": "uint8"}
    assert signature["preprocessing"] == {"texts": 1}


def test_the_batch_is_any_and_accelerators_are_served(tiny_model):
    model = tiny_model()
    modules = serving.export_towers(model, trap_weights.make(model, 16, 8), 16, 8)
    exported = jax.export.deserialize(bytearray(modules["text_tower.stablehlo"]))
    assert exported.platforms == ("cpu", "cuda", "rocm", "tpu")
    assert str(exported.in_avals[-1]) == "int32[batch,8]"
