import jax
import jax.numpy as jnp

from clipa_t5x import hlo_text


def test_bytes_of_shapes():
    shape = "(bf16[8,128]{1,0:T(8,128)(2,1)}, (f32[], /*index=1*/pred[3]{0}), s32[2], f8e4m3fn[4])"
    assert hlo_text.num_bytes(shape) == 8 * 128 * 2 + 4 + 3 + 8 + 4


def test_bytes_of_main_memory_alone():
    shape = "(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[2]{0:T(128)}, u32[]{:S(2)})"
    assert hlo_text.num_bytes(shape, main_memory_only=True) == 8
    assert hlo_text.num_bytes(shape) == 8 * 128 * 2 + 8 + 4


def test_elements_of_tuples():
    assert hlo_text.elements("(f32[2]{0:T(8,128)}, (s32[], u32[2,2]))") == [
        "f32[2]{0:T(8,128)}", " (s32[], u32[2,2])"
    ]  # fmt: skip


def test_a_program_is_its_computations():
    def fn(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, length=7)[0]

    text = jax.jit(fn).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile().as_text()
    computations, entry = hlo_text.parse(text)
    ((around, loop),) = (
        (instructions, i)
        for instructions in computations.values()
        for i in instructions
        if i.operation == "while"
    )
    assert hlo_text.trip_count(loop, computations) == 7
    assert set(hlo_text.operands(loop)) <= {i.name for i in around}
    times = {name: count for name, count, _ in hlo_text.visits(computations, entry)}
    assert times[entry] == 1 and max(times.values()) == 7
