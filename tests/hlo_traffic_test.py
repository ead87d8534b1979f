import jax
import jax.numpy as jnp
import pytest

from clipa_t5x import hlo_text, hlo_traffic

LAYERS, ROWS, WIDTH = 12, 64, 256
WEIGHTS = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
STACKED = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
STACKED_BYTES, X_BYTES = 4 * LAYERS * WIDTH**2, 4 * ROWS * WIDTH


def _compiled(fn, *shapes):
    return jax.jit(fn).lower(*shapes).compile()


def _bytes(compiled_or_text):
    text = compiled_or_text if isinstance(compiled_or_text, str) else compiled_or_text.as_text()
    return hlo_traffic.bytes_accessed(*hlo_text.parse(text))


def _layer(x, w):
    return jnp.tanh(x @ w), None


def _scanned(w, x):
    return jax.lax.scan(_layer, x, w)[0]


def _unrolled(w, x):
    for i in range(LAYERS):
        x, _ = _layer(x, w[i])
    return x


def _separate(ws, x):
    for w in ws:
        x, _ = _layer(x, w)
    return x


def test_an_elementwise_program_reads_and_writes_once():
    assert _bytes(_compiled(lambda x: jnp.tanh(x) * 2 + 1, X)) == 2 * X_BYTES


def test_a_loop_counts_all_its_trips():
    """XLA's own figure for the same layers without a loop, which has none to count wrongly."""
    unrolled = _compiled(_unrolled, STACKED, X)
    expected = unrolled.cost_analysis()["bytes accessed"]
    assert _bytes(unrolled) == pytest.approx(expected, rel=1e-4)
    scanned = _compiled(_scanned, STACKED, X)
    # The loop's own state is copied once, and XLA sees one trip alone.
    assert _bytes(scanned) == pytest.approx(expected, rel=0.02)
    assert scanned.cost_analysis()["bytes accessed"] < expected / 6


def test_a_backward_pass_without_loops_is_what_xla_says():
    grad = _compiled(jax.grad(lambda ws, x: _separate(ws, x).sum()), [WEIGHTS] * LAYERS, X)
    assert _bytes(grad) == pytest.approx(grad.cost_analysis()["bytes accessed"], rel=1e-4)


def test_slices_and_updates_count_as_much_as_they_touch():
    def rows(stacked, i):
        return jnp.tanh(jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False))

    index = jax.ShapeDtypeStruct((), jnp.int32)
    one = STACKED_BYTES // LAYERS
    assert _bytes(_compiled(rows, STACKED, index)) == pytest.approx(2 * one, abs=100)

    def update(stacked, x, i):
        return jax.lax.dynamic_update_index_in_dim(stacked, jnp.tanh(x), i, 0)

    donated = jax.jit(update, donate_argnums=0).lower(STACKED, WEIGHTS, index).compile()
    assert _bytes(donated) == pytest.approx(2 * one, abs=100)


# As XLA's TPU compiler writes: S(1) is fast memory, an all-gather is started, hidden and ended by
# three fusions, and parts of an array are fetched ahead.
TPU_LIKE = """HloModule jit_step, is_scheduled=true

%start (p: bf16[2,128]) -> (bf16[2,128], bf16[16,128]) {
  %p = bf16[2,128]{1,0} parameter(0)
  %ag.1 = bf16[16,128]{1,0} all-gather(%p), channel_id=9, dimensions={0}
  ROOT %c.1 = (bf16[2,128]{1,0}, bf16[16,128]{1,0}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: bf16[2,128], q: bf16[16,128], x: f32[64]) -> (f32[64], bf16[2,128], bf16[16,128]) {
  %p = bf16[2,128]{1,0} parameter(0)
  %q = bf16[16,128]{1,0} parameter(1)
  %x = f32[64]{0} parameter(2)
  %y = f32[64]{0} negate(%x)
  %ag.2 = bf16[16,128]{1,0} all-gather(%p), channel_id=9, dimensions={0}
  ROOT %t = (f32[64]{0}, bf16[2,128]{1,0}, bf16[16,128]{1,0}) tuple(%y, %p, %ag.2)
}

%done (p: bf16[2,128], q: bf16[16,128]) -> bf16[16,128] {
  %p = bf16[2,128]{1,0} parameter(0)
  %q = bf16[16,128]{1,0} parameter(1)
  %ag.3 = bf16[16,128]{1,0} all-gather(%p), channel_id=9, dimensions={0}
  ROOT %c.3 = bf16[16,128]{1,0} custom-call(%p, %q, %ag.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[2,128], b: f32[64]) -> bf16[16,128] {
  %a = bf16[2,128]{1,0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %f.1 = (bf16[2,128]{1,0}, bf16[16,128]{1,0}) fusion(%a), kind=kCustom, calls=%start
  %g.0 = bf16[2,128]{1,0} get-tuple-element(%f.1), index=0
  %g.1 = bf16[16,128]{1,0} get-tuple-element(%f.1), index=1
  %f.2 = (f32[64]{0}, bf16[2,128]{1,0}, bf16[16,128]{1,0}) fusion(%g.0, %g.1, %b), kind=kOutput, calls=%async_collective_fusion.1
  %h.1 = bf16[2,128]{1,0} get-tuple-element(%f.2), index=1
  %h.2 = bf16[16,128]{1,0} get-tuple-element(%f.2), index=2
  %f.3 = bf16[16,128]{1,0} fusion(%h.1, %h.2), kind=kCustom, calls=%done
  %s = ((bf16[16,128]{1,0}), bf16[4,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%f.3), slice={[0:4], [0:128]}
  %sd = bf16[4,128]{1,0:S(1)} slice-done(%s)
  %n = bf16[4,128]{1,0:S(1)} negate(%sd)
  %cs = (bf16[4,128]{1,0}, bf16[4,128]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%n)
  %cd = bf16[4,128]{1,0} copy-done(%cs)
  ROOT %r = bf16[16,128]{1,0} copy(%f.3)
}
"""  # noqa: E501


# A slice of an array that is laid out anew as it is read, in a fusion within the fusion.
RELAID = """HloModule jit_step, is_scheduled=true

%copy_fusion (p: bf16[48,128]) -> bf16[48,128] {
  %p = bf16[48,128]{1,0:T(16,128)(2,1)} parameter(0)
  ROOT %c = bf16[48,128]{1,0:T(8,128)(2,1)} copy(%p)
}

%sliced (q: bf16[48,128], i: s32[]) -> f32[1,128] {
  %q = bf16[48,128]{1,0:T(16,128)(2,1)} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %f = bf16[48,128]{1,0:T(8,128)(2,1)} fusion(%q), kind=kLoop, calls=%copy_fusion
  %s = bf16[1,128]{1,0:T(8,128)(2,1)} dynamic-slice(%f, %i, %i), dynamic_slice_sizes={1,128}
  ROOT %r = f32[1,128]{1,0:T(8,128)} convert(%s)
}

ENTRY %main (a: bf16[48,128], i: s32[]) -> f32[1,128] {
  %a = bf16[48,128]{1,0:T(16,128)(2,1)} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  ROOT %g = f32[1,128]{1,0:T(8,128)} fusion(%a, %i), kind=kLoop, calls=%sliced
}
"""


def test_a_slice_of_what_a_fusion_copies_is_a_slice():
    assert _bytes(RELAID) == 128 * 2 + 128 * 4


def test_programs_for_tpus_count_what_their_hbm_sees():
    gathered, own, hidden = 16 * 128 * 2, 2 * 128 * 2, 2 * 64 * 4
    fetched, stored = 4 * 128 * 2, 4 * 128 * 2
    assert _bytes(TPU_LIKE) == own + hidden + gathered + fetched + stored + 2 * gathered
