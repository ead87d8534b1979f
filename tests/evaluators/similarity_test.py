import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipa_t5x import partitioning
from clipa_t5x.data import input_pipeline
from clipa_t5x.evaluators import similarity


def layout(devices=8, model=1):
    mesh = Mesh(
        np.array(jax.devices()[:devices]).reshape(1, devices // model, model),
        partitioning.MESH_AXES,
    )
    return input_pipeline.BatchLayout(NamedSharding(mesh, PartitionSpec(("replica", "data"))))


def by_hand(queries, keys, k):
    scores = queries.astype(np.float64) @ keys.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.parametrize("devices, model, rows, block", [
    (8, 1, 1024, 4096), (8, 1, 2, 7), (8, 2, 3, 5), (1, 1, 9, 23), (1, 1, 1, 46),
])  # fmt: skip
def test_nearest_is_a_stable_sort(devices, model, rows, block):
    """Whole numbers of few dimensions: many similarities are equal, and none is rounded."""
    rng = np.random.default_rng(0)
    queries = rng.integers(-2, 3, (29, 2)).astype(np.float32)
    keys = rng.integers(-2, 3, (46, 2)).astype(np.float32)
    found = similarity.nearest(
        queries, keys, 10, layout(devices, model), rows_per_device=rows, block=block
    )
    for value, expected in zip(found, by_hand(queries, keys, 10), strict=True):
        np.testing.assert_array_equal(value, expected)


def test_fewer_keys_than_wanted():
    scores, numbers = similarity.nearest(np.eye(3, 4), np.eye(2, 4), 10, layout())
    assert numbers.tolist() == [[0, 1], [1, 0], [0, 1]]
    assert scores.tolist() == [[1, 0], [1, 0], [0, 0]]


def test_similarities_are_not_all_there_at_once(monkeypatch):
    """Programs are of a part of the queries and a block of keys, whatever their numbers."""
    shapes = []

    def merge(best, queries, keys, *rest):
        shapes.append((queries.shape, keys.shape))
        return original(best, queries, keys, *rest)

    original = similarity._merge
    monkeypatch.setattr(similarity, "_merge", merge)
    queries, keys = np.ones((100, 8), np.float32), np.ones((120, 8), np.float32)
    similarity.nearest(queries, keys, 10, layout(), rows_per_device=4, block=50)
    assert shapes == [((32, 8), (50, 8))] * (4 * 3)
