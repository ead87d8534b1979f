import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipa_t5x import partitioning
from clipa_t5x.data import input_pipeline
from clipa_t5x.evaluators import evaluator


@pytest.mark.parametrize("model", [1, 2, 8])
def test_gather_is_the_whole_batch(model):
    devices = np.array(jax.devices()).reshape(1, 8 // model, model)
    sharding = NamedSharding(
        Mesh(devices, partitioning.MESH_AXES), PartitionSpec(("replica", "data"))
    )
    values = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    gathered = evaluator.gather(
        jax.device_put(values, sharding), input_pipeline.BatchLayout(sharding)
    )
    assert isinstance(gathered, np.ndarray)
    np.testing.assert_array_equal(gathered, values)
