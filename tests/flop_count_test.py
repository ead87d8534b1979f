import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from clipa_t5x import flop_count, partitioning

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 16), jnp.float32)
PRODUCT = 2 * 8 * 16 * 16


def _count(fn, *shapes):
    return flop_count.traced(jax.jit(fn).trace(*shapes))


def test_a_product_is_two_operations_a_multiplication():
    assert _count(lambda x, w: x @ w, X, W) == PRODUCT
    batched = jax.ShapeDtypeStruct((5, 8, 16), jnp.float32)
    assert _count(lambda x, w: jnp.einsum("bij,jk->bik", x, w), batched, W) == 5 * PRODUCT
    heads = jax.ShapeDtypeStruct((5, 8, 4, 4), jnp.float32)
    attention = _count(lambda q: jnp.einsum("blhk,bmhk->bhlm", q, q), heads)
    assert attention == 2 * 5 * 4 * 8 * 8 * 4


def test_what_is_no_product_costs_nothing():
    assert _count(lambda x: jnp.exp(x).sum(), X) == 0


def test_a_convolution_counts_its_kernel():
    images = jax.ShapeDtypeStruct((2, 3, 8, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((7, 3, 4, 4), jnp.float32)
    conv = _count(lambda x, k: jax.lax.conv(x, k, (4, 4), "VALID"), images, kernel)
    assert conv == 2 * (2 * 7 * 2 * 2) * (3 * 4 * 4)


def test_loops_count_as_often_as_they_run():
    def looped(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, length=6)[0]

    assert _count(looped, X, W) == 6 * PRODUCT
    assert _count(jax.grad(lambda x, w: looped(x, w).sum(), (0, 1)), X, W) == 3 * 6 * PRODUCT


def test_of_branches_the_dearest_counts():
    def branched(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert _count(branched, X, W) == 2 * PRODUCT


def test_rematerialisation_counts_what_it_repeats():
    def layers(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    plain = _count(jax.grad(layers, (0, 1)), X, W)
    again = _count(jax.grad(jax.checkpoint(layers), (0, 1)), X, W)
    assert plain == 6 * PRODUCT and again == 8 * PRODUCT


def test_sharded_parts_count_on_all_their_devices():
    mesh = partitioning.PjitPartitioner().mesh
    assert mesh.size == 8
    sharded = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    assert _count(sharded, X, W) == PRODUCT


@pytest.mark.parametrize("custom", [jax.custom_jvp, jax.custom_vjp])
def test_custom_rules_count_the_function_alone(custom):
    function = custom(lambda x, w: x @ w)
    if custom is jax.custom_jvp:
        function.defjvp(lambda primals, tangents: (function(*primals), primals[0] @ primals[1]))
    else:
        function.defvjp(lambda x, w: (x @ w @ w, w), lambda w, g: (g @ w.T, w))
    assert _count(lambda x, w: function(x, w), X, W) == PRODUCT
