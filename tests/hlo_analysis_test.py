import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clipa_t5x import hlo_analysis, partitioning

TRIPS = 5


@pytest.fixture(scope="module")
def mesh():
    return partitioning.PjitPartitioner().mesh


def _compiled(mesh, fn, shape, in_spec, out_spec):
    body = jax.shard_map(fn, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, in_spec))
    return jax.jit(body).lower(x).compile().as_text()


def test_collectives_are_counted_with_their_bytes(mesh):
    def fn(x):  # [4, 32] on each of 8 devices
        gathered = jax.lax.all_gather(x, "data", tiled=True)  # [32, 32]
        summed = jax.lax.psum(x * 2, "data")  # [4, 32]
        scattered = jax.lax.psum_scatter(jnp.sin(gathered), "data", tiled=True)  # from [32, 32]
        moved = jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)])
        return summed + scattered + moved

    found = hlo_analysis.analyze(_compiled(mesh, fn, (32, 32), P("data"), P("data")))
    assert found.unknown_loops == 0
    assert found.collectives == {
        "all-gather": hlo_analysis.Collective(1, 32 * 32 * 4),
        "all-reduce": hlo_analysis.Collective(1, 4 * 32 * 4),
        "reduce-scatter": hlo_analysis.Collective(1, 32 * 32 * 4),
        "collective-permute": hlo_analysis.Collective(1, 4 * 32 * 4),
    }


def test_loops_count_as_often_as_they_run(mesh):
    def fn(x):
        def layer(carry, _):
            whole = jax.lax.all_gather(carry, "data", tiled=True)

            def inner(c, _):
                return jax.lax.psum(jnp.sin(c), "data"), None

            c, _ = jax.lax.scan(inner, whole[:4], length=3)
            return c, None

        return jax.lax.scan(layer, x, length=TRIPS)[0]

    found = hlo_analysis.analyze(_compiled(mesh, fn, (32, 32), P("data"), P("data")))
    assert found.unknown_loops == 0
    assert found.collectives == {
        "all-gather": hlo_analysis.Collective(TRIPS, TRIPS * 32 * 32 * 4),
        "all-reduce": hlo_analysis.Collective(3 * TRIPS, 3 * TRIPS * 4 * 32 * 4),
    }


def test_a_loop_without_a_known_end_counts_once():
    def fn(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x * 2, x)

    text = jax.jit(fn).lower(jax.ShapeDtypeStruct((4,), jnp.float32)).compile().as_text()
    assert hlo_analysis.analyze(text).unknown_loops == 1


# As XLA's TPU compiler writes: no trip counts but in conditions, a reduce-scatter as a fusion, a
# hidden collective in every fusion that hides it, and cycles; 24 rows of each of 64 devices.
TPU_LIKE = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (input: bf16[1536,128]) -> bf16[24,128] {
  %input = bf16[1536,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[1536,128]{1,0:T(8,128)(2,1)} all-reduce(%input), to_apply=%add
  ROOT %slice = bf16[24,128]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={24,128}
}

%async_collective_fusion.1 (b: bf16[24,128]) -> bf16[1536,128] {
  %b = bf16[24,128]{1,0} parameter(0)
  ROOT %ag.1 = bf16[1536,128]{1,0} all-gather(%b), channel_id=9, dimensions={0}
}

%async_collective_fusion.2 (d: bf16[24,128]) -> bf16[1536,128] {
  %d = bf16[24,128]{1,0} parameter(0)
  ROOT %ag.2 = bf16[1536,128]{1,0} all-gather(%d), channel_id=9, dimensions={0}
}

%condition (p: (s32[], bf16[24,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(48)
  %p = (s32[]{:T(128)}, bf16[24,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (q: (s32[], bf16[24,128])) -> (s32[], bf16[24,128]) {
  %q = (s32[]{:T(128)}, bf16[24,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[24,128]{1,0} get-tuple-element(%q), index=1
  %ag = (bf16[24,128]{1,0}, bf16[1536,128]{1,0:T(8,128)(2,1)}) all-gather-start(%x), dimensions={0}
  %agd = bf16[1536,128]{1,0} all-gather-done(%ag)
  %fusion.7 = bf16[24,128]{1,0} fusion(%agd), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"window_config":{"estimated_cycles":"1000"}}
  ROOT %t = (s32[], bf16[24,128]) tuple(%c, %fusion.7)
}

ENTRY %main (a: bf16[24,128]) -> bf16[24,128] {
  %a = bf16[24,128]{1,0} parameter(0)
  %start = s32[]{:T(128)} constant(2)
  %state = (s32[], bf16[24,128]) tuple(%start, /*index=1*/%a)
  %f.1 = bf16[1536,128]{1,0} fusion(%a), kind=kOutput, calls=%async_collective_fusion.1
  %f.2 = bf16[1536,128]{1,0} fusion(%a), kind=kOutput, calls=%async_collective_fusion.2
  %while.1 = (s32[], bf16[24,128]) while(%state), condition=%condition, body=%body
  ROOT %out = bf16[24,128]{1,0} copy(%w), backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""  # noqa: E501


def test_programs_for_tpus_are_read():
    found = hlo_analysis.analyze(TPU_LIKE)
    own, whole, trips = 24 * 128 * 2, 1536 * 128 * 2, 48 - 2
    assert found == hlo_analysis.Analysis(
        collectives={
            # In the loop, and one that is spread over two fusions.
            "all-gather": hlo_analysis.Collective(trips + 1, (trips + 1) * whole),
            "reduce-scatter": hlo_analysis.Collective(trips, trips * whole),
        },
        cycles=trips * 1000 + 7,
        # Every trip gathers and scatters; the copy writes. What is hidden ends elsewhere.
        bytes_accessed=trips * 2 * (own + whole) + own,
        unknown_loops=0,
    )
