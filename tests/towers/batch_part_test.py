import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipa_t5x import partitioning
from clipa_t5x.towers import batch_part, layers, token_reduction


def _parts(count):
    return [batch_part.BatchPart(index, count) for index in range(count)]


def _interleaved(parts):
    """Rows of the parts, in the batch's order."""
    return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def test_a_part_is_every_so_manieth_row():
    x = jnp.arange(24).reshape(12, 2)
    for index, part in enumerate(_parts(3)):
        np.testing.assert_array_equal(part.of(x), x[index::3])
    np.testing.assert_array_equal(batch_part.WHOLE.of(x), x)


def test_parts_draw_together_what_the_batch_draws():
    def sampler(num_rows):
        return jax.random.uniform(jax.random.key(0), (num_rows, 3))

    whole = batch_part.WHOLE.draw(sampler, 8)
    np.testing.assert_array_equal(whole, sampler(8))
    parts = [part.draw(sampler, 2) for part in _parts(4)]
    np.testing.assert_array_equal(_interleaved(parts), whole)


@pytest.mark.parametrize("strategy", ["random", "grid", "block"])
def test_a_sample_keeps_its_mask_in_any_part(strategy):
    patches = jnp.broadcast_to(jnp.arange(20.0).reshape(4, 5, 1), (8, 4, 5, 1))

    @jax.jit
    def mask(index):
        part = batch_part.BatchPart(index, 4)
        return token_reduction.mask(jax.random.key(0), part.of(patches), 0.5, strategy, part)

    whole = token_reduction.mask(jax.random.key(0), patches, 0.5, strategy)
    np.testing.assert_array_equal(_interleaved([mask(i) for i in range(4)]), whole)
    assert len(np.unique(whole[..., 0], axis=0)) > 1


def test_a_sample_drops_the_same_paths_in_any_part():
    branch = jnp.ones((16, 2, 3))

    def drop(part):
        return layers.drop_path(part.of(branch), 0.5, lambda: jax.random.key(0), part)

    whole = drop(batch_part.WHOLE)
    np.testing.assert_array_equal(_interleaved([drop(part) for part in _parts(4)]), whole)
    assert 0 < np.count_nonzero(whole) < whole.size


def test_every_device_takes_its_share_of_a_part_from_its_own_rows():
    partitioner = partitioning.PjitPartitioner(num_partitions=2, num_replicas=2)
    sharding = partitioner.batch_sharding()
    x = jax.device_put(jnp.arange(32.0).reshape(16, 2), sharding)
    compiled = jax.jit(lambda x, i: batch_part.BatchPart(i, 4).of(x)).lower(x, 1).compile()
    part = compiled(x, 1)
    np.testing.assert_array_equal(part, np.asarray(x)[1::4])
    assert part.sharding.is_equivalent_to(sharding, 2)
    assert not re.findall(r"all-|collective|reduce-scatter", compiled.as_text())
