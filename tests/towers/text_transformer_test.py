import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipa_t5x.towers import layers, position_embeddings, text_transformer

WIDTH, LENGTH, VOCAB, OUT = 16, 6, 20, 5
# Two texts; the first ends in two [PAD], the second's largest id stands at position 2.
IDS = jnp.asarray([[7, 3, 9, 4, 0, 0], [5, 8, 19, 2, 6, 1]], jnp.int32)


def _tower(**kwargs):
    sizes = {"width": WIDTH, "depth": 2, "mlp_dim": 32, "num_heads": 2, "vocab_size": VOCAB}
    return text_transformer.TextTransformer(**{**sizes, "out_dim": OUT, **kwargs})


def _run(tower, params, ids):
    """Outputs of the tower, and the tokens that enter and leave its encoder."""
    seen = {}

    def spy(call, args, kwargs, context):
        outputs = call(*args, **kwargs)
        if isinstance(context.module, layers.Encoder) and context.method_name == "__call__":
            seen["entering"], seen["leaving"] = args[0], outputs
        return outputs

    def apply(params, ids):
        with nn.intercept_methods(spy):
            outputs = tower.apply({"params": params}, ids)
        return outputs, dict(seen)

    return jax.tree.map(np.asarray, jax.jit(apply)(params, ids))


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(_tower(), IDS)


def test_no_mask_unless_asked_for():
    assert text_transformer.attention_mask(IDS, causal=False, mask_padding=False) is None


def test_masks_by_hand():
    ids = jnp.asarray([[4, 0, 0]], jnp.int32)
    causal = text_transformer.attention_mask(ids, causal=True, mask_padding=False)
    np.testing.assert_array_equal(causal[0, 0], [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    padding = text_transformer.attention_mask(ids, causal=False, mask_padding=True)
    np.testing.assert_array_equal(padding[0, 0], [[1, 0, 0], [1, 1, 0], [1, 0, 1]])
    both = text_transformer.attention_mask(ids, causal=True, mask_padding=True)
    np.testing.assert_array_equal(both[0, 0], [[1, 0, 0], [1, 1, 0], [1, 0, 1]])


def _changed_positions(tower, params, others, ids=IDS, other_ids=IDS):
    """Positions of the first text whose output differs between two runs."""
    leaving = _run(tower, params, ids)[1]["leaving"][0]
    other = _run(tower, others, other_ids)[1]["leaving"][0]
    return set(np.flatnonzero(np.abs(leaving - other).max(axis=-1) > 1e-6))


@pytest.mark.parametrize("causal", [True, False])
def test_later_tokens_reach_earlier_positions_unless_causal(params, causal):
    changed = _changed_positions(
        _tower(causal=causal), params, params, other_ids=IDS.at[0, 3].set(11)
    )
    assert changed == ({3, 4, 5} if causal else {0, 1, 2, 3, 4, 5})


@pytest.mark.parametrize("mask_padding", [True, False])
def test_padding_reaches_words_unless_masked(params, mask_padding):
    # Another [PAD] embedding, everything else the same.
    table = params["token_embedding"]["embedding"]
    others = {**params, "token_embedding": {"embedding": table.at[0].set(table[0, ::-1])}}
    changed = _changed_positions(_tower(mask_padding=mask_padding), params, others)
    assert changed == ({4, 5} if mask_padding else {0, 1, 2, 3, 4, 5})


@pytest.mark.parametrize("position_embedding", ["learned", "sincos1d"])
def test_tokens_are_rows_of_the_table_plus_positions(random_params, position_embedding):
    tower = _tower(position_embedding=position_embedding)
    params = random_params(tower, IDS)
    assert ("position_embedding" in params) == (position_embedding == "learned")
    fixed = position_embeddings.sincos_1d(LENGTH, WIDTH)
    positions = np.asarray(params.get("position_embedding", fixed))
    assert positions.shape == (LENGTH, WIDTH)
    expected = np.asarray(params["token_embedding"]["embedding"])[np.asarray(IDS)] + positions
    _, seen = _run(tower, params, IDS)
    np.testing.assert_allclose(seen["entering"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pooling", ["last", "first", "gap", "argmax"])
def test_pooling_by_hand(params, pooling):
    outputs, seen = _run(_tower(pooling=pooling), params, IDS)
    x = seen["leaving"].astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    norm = params["encoder_norm"]
    x = x * np.asarray(norm["scale"]) + np.asarray(norm["bias"])
    pooled = {
        "last": x[:, 5],
        "first": x[:, 0],
        "gap": x[:, 1:].mean(axis=1),
        "argmax": np.stack([x[0, 2], x[1, 2]]),
    }[pooling]
    expected = pooled @ np.asarray(params["head"]["kernel"])
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


def test_without_projection_the_width_comes_out(random_params):
    tower = _tower(out_dim=None)
    params = random_params(tower, IDS)
    assert "head" not in params
    assert jax.eval_shape(tower.apply, {"params": params}, IDS).shape == (2, WIDTH)


def test_first_tables_have_clipas_deviations():
    tower = _tower(vocab_size=2000, width=64)
    ids = jnp.zeros((1, 32), jnp.int32)
    params = nn.unbox(jax.jit(tower.init)(jax.random.key(0), ids))["params"]
    assert params["token_embedding"]["embedding"].std() == pytest.approx(0.02, rel=0.03)
    assert params["position_embedding"].std() == pytest.approx(0.01, rel=0.1)
    assert params["head"]["kernel"].std() == pytest.approx(64**-0.5, rel=0.1)
    # CLIPA's residual scale is that of depth 12, whatever the depth.
    fc2 = params["encoder"]["layers"]["mlp"]["fc2"]["kernel"]
    assert fc2.std() == pytest.approx(64**-0.5 * 24**-0.5, rel=0.1)


def test_bfloat16_is_for_activations_only(params):
    outputs, seen = _run(_tower(dtype="bfloat16"), params, IDS)
    assert {x.dtype for x in (outputs, *seen.values())} == {jnp.dtype("bfloat16")}
    exact, _ = _run(_tower(), params, IDS)
    np.testing.assert_allclose(outputs.astype(np.float32), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"pooling": "tok"}, r"pooling is 'tok'; .*\['argmax', 'first', 'gap', 'last'\]"),
        ({"position_embedding": "sincos2d"}, r"is 'sincos2d'; .*\['learned', 'sincos1d'\]"),
    ],
)
def test_unknown_options_are_refused_with_a_list(setting, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(_tower(**setting).init, jax.random.key(0), IDS)
