import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipa_t5x import hlo_analysis, losses, partitioning

SCALE = 1 / 0.07


def _unit(batch, joint, seed):
    x = np.random.default_rng(seed).normal(size=(batch, joint)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@jax.jit
def _loss(images, texts, scale=SCALE, weights=None):
    return losses.softmax_contrastive(
        jnp.asarray(images), jnp.asarray(texts), jnp.asarray(scale, jnp.float32), weights
    )


def _reference(images, texts, scale=SCALE):
    """The mean of both directions' cross entropies, in float64."""
    logits = scale * images.astype(np.float64) @ texts.astype(np.float64).T

    def cross_entropy(x):
        x = x - x.max(axis=1, keepdims=True)
        return np.mean(np.log(np.exp(x).sum(axis=1)) - np.diagonal(x))

    return 0.5 * (cross_entropy(logits) + cross_entropy(logits.T))


def _sigmoid(images, texts, scale=SCALE, weights=None, **kwargs):
    return losses.sigmoid_contrastive(
        jnp.asarray(images), jnp.asarray(texts), jnp.asarray(scale, jnp.float32), weights,
        logit_bias=jnp.asarray(-10.0), **kwargs,
    )  # fmt: skip


def _softmax(images, texts, scale=SCALE, weights=None, **kwargs):
    return losses.softmax_contrastive(
        jnp.asarray(images), jnp.asarray(texts), jnp.asarray(scale, jnp.float32), weights, **kwargs
    )


BOTH = pytest.mark.parametrize("loss", [_softmax, _sigmoid], ids=["softmax", "sigmoid"])


@BOTH
@pytest.mark.parametrize("num_chunks", [2, 4, 16])
def test_a_chunked_loss_is_the_plain_one(loss, num_chunks):
    images, texts = _unit(16, 8, 0), _unit(16, 8, 1)
    weights = jnp.asarray([1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1], jnp.float32)

    def value_and_grad(chunks, weights):
        def run(x, y, s):
            return loss(x, y, s, weights, num_chunks=chunks)

        return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(images, texts, SCALE)

    for chosen in (None, weights):
        plain, chunked = value_and_grad(1, chosen), value_and_grad(num_chunks, chosen)
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(chunked), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@BOTH
def test_chunks_that_do_not_divide_are_refused(loss):
    for num_chunks, why in (
        (0, "at least 1"),
        ("x", "an integer"),
        (3, "divide .* 8: .* 1, 2, 4, 8"),
    ):
        with pytest.raises(ValueError, match=f"LOSS_CHUNKS is {num_chunks!r}; it must .*{why}"):
            loss(_unit(8, 4, 0), _unit(8, 4, 1), num_chunks=num_chunks)


@BOTH
@pytest.mark.parametrize("num_chunks", [1, 4])
def test_eight_devices_equal_one(loss, num_chunks):
    images, texts = _unit(64, 8, 0), _unit(64, 8, 1)

    def value_and_grad(x, y, s):
        def run(x, y, s):
            return loss(x, y, s, num_chunks=num_chunks)[0]

        return jax.value_and_grad(run, (0, 1, 2))(x, y, s)

    partitioner = partitioning.PjitPartitioner()
    assert partitioner.mesh.size == 8
    with partitioner.activate():
        rows = jax.device_put((images, texts), partitioner.batch_sharding())
        sharded = jax.jit(value_and_grad)(*rows, SCALE)
    plain = jax.jit(value_and_grad)(images, texts, SCALE)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@BOTH
def test_chunks_bound_the_memory(loss):
    def temporaries(num_chunks):
        def run(x, y):
            return loss(x, y, num_chunks=num_chunks)[0]

        x = jax.ShapeDtypeStruct((2048, 8), jnp.float32)
        compiled = jax.jit(jax.grad(run, (0, 1))).lower(x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain, chunked = temporaries(1), temporaries(16)
    assert plain >= 4 * 2048 * 2048  # at least the logits themselves
    assert chunked < plain / 8


@BOTH
def test_chunks_gather_every_text_but_once_a_pass(loss):
    batch, joint, num_chunks = 512, 32, 16
    partitioner = partitioning.PjitPartitioner()
    sharding = partitioner.batch_sharding()
    x = jax.ShapeDtypeStruct((batch, joint), jnp.float32, sharding=sharding)

    def run(x, y):
        return loss(x, y, num_chunks=num_chunks)[0]

    with partitioner.activate():
        grad = jax.jit(jax.grad(run, (0, 1)), out_shardings=sharding)
        text = grad.lower(x, x).compile().as_text()
    gathered = hlo_analysis.analyze(text).collectives["all-gather"]
    # Forward, and again for the backward pass; and never all at once.
    assert gathered.bytes <= 2 * 1.1 * 4 * batch * joint
    assert gathered.bytes / gathered.count <= 4 * batch * joint / num_chunks


def test_sigmoid_contrastive_is_the_papers():
    images, texts = _unit(12, 8, 0), _unit(12, 8, 1)
    logits = SCALE * images.astype(np.float64) @ texts.astype(np.float64).T - 10.0
    signs = 2 * np.eye(12) - 1
    expected = np.sum(np.log1p(np.exp(-signs * logits))) / 12
    np.testing.assert_allclose(_sigmoid(images, texts)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, SCALE, 100.0])
def test_softmax_contrastive_is_the_textbooks(scale):
    images = _unit(32, 8, 0)
    texts = images + 0.3 * _unit(32, 8, 1)
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    loss, _ = _loss(images, texts, scale)
    assert loss.dtype == jnp.float32 and loss.shape == ()
    np.testing.assert_allclose(loss, _reference(images, texts, scale), rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    images, texts = _unit(6, 4, 0), _unit(6, 4, 1)
    grads = jax.jit(jax.grad(lambda x, s: _loss(x, texts, s)[0], argnums=(0, 1)))(images, SCALE)
    direction = _unit(6, 4, 2).astype(np.float64)
    step = 1e-5

    def slope(f):
        return (f(step) - f(-step)) / (2 * step)

    by_images = slope(lambda h: _reference(images + h * direction, texts))
    by_scale = slope(lambda h: _reference(images, texts, SCALE + h))
    np.testing.assert_allclose(np.sum(grads[0] * direction), by_images, rtol=1e-4)
    np.testing.assert_allclose(grads[1], by_scale, rtol=1e-4)


def test_the_loss_is_symmetric_in_its_towers():
    images, texts = _unit(16, 8, 0), _unit(16, 8, 1)
    np.testing.assert_allclose(_loss(images, texts)[0], _loss(texts, images)[0], rtol=1e-6)


def test_the_order_of_pairs_does_not_matter():
    images, texts = _unit(16, 8, 0), _unit(16, 8, 1)
    order = np.random.default_rng(0).permutation(16)
    np.testing.assert_allclose(
        _loss(images, texts)[0], _loss(images[order], texts[order])[0], rtol=1e-6
    )


def test_weight_zero_drops_the_row():
    images, texts = _unit(12, 8, 0), _unit(12, 8, 1)
    kept = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1, 1], bool)
    weights = jnp.asarray(kept, jnp.float32)

    @jax.jit
    def value_and_grad(x, y, w):
        return jax.value_and_grad(lambda x: _loss(x, y, weights=w), has_aux=True)(x)

    (loss, metrics), grads = value_and_grad(images, texts, weights)
    (expected, expected_metrics), expected_grads = value_and_grad(images[kept], texts[kept], None)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], expected_metrics["accuracy"], rtol=1e-6)
    np.testing.assert_array_equal(grads[~kept], np.zeros((3, 8)))
    np.testing.assert_allclose(grads[kept], expected_grads, rtol=1e-4, atol=1e-6)


def test_weights_of_zero_throughout_give_a_loss_of_zero():
    loss, metrics = _loss(_unit(4, 8, 0), _unit(4, 8, 1), weights=jnp.zeros(4))
    assert loss == 0 and metrics["accuracy"] == 0


@pytest.mark.parametrize(
    ("images", "texts"),
    [
        (_unit(8, 4, 0), np.tile(_unit(1, 4, 1), (8, 1))),
        (np.zeros((8, 4), np.float32), np.zeros((8, 4), np.float32)),
    ],
    ids=["identical captions", "zero embeddings"],
)
@BOTH
@pytest.mark.parametrize("num_chunks", [1, 4])
def test_batches_that_tell_nothing_have_finite_gradients(loss, num_chunks, images, texts):
    def run(x, y, s):
        return loss(x, y, s, num_chunks=num_chunks)[0]

    value, grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(images, texts, 100.0)
    assert np.isfinite(value) and (loss is _sigmoid or value >= math.log(8) - 1e-5)
    assert all(np.all(np.isfinite(g)) for g in grads)


def test_zero_embeddings_cost_the_logarithm_of_the_batch():
    zeros = np.zeros((8, 4), np.float32)
    np.testing.assert_allclose(_loss(zeros, zeros)[0], math.log(8), rtol=1e-6)


def test_random_embeddings_cost_about_the_logarithm_of_the_batch():
    # E[logsumexp] is about log B + s^2 / 2d, where a cosine of d dimensions has variance 1 / d.
    batch, joint = 512, 512
    loss, _ = _loss(_unit(batch, joint, 0), _unit(batch, joint, 1))
    assert float(loss) == pytest.approx(math.log(batch) + SCALE**2 / (2 * joint), abs=0.1)


@BOTH
def test_of_equally_near_texts_the_first_counts_in_chunks_too(loss):
    same = np.tile(_unit(1, 4, 0), (8, 1))
    for num_chunks in (1, 2, 8):
        assert float(loss(same, same, num_chunks=num_chunks)[1]["accuracy"]) == 1 / 8


def test_accuracy_counts_images_nearest_to_their_own_text():
    images = np.eye(4, dtype=np.float32)
    texts = images[[0, 1, 3, 2]]
    assert float(_loss(images, images)[1]["accuracy"]) == 1.0
    assert float(_loss(images, texts)[1]["accuracy"]) == 0.5
    weights = jnp.asarray([1.0, 1.0, 1.0, 0.0])
    texts = np.stack([images[0], images[1], images[3], -images[3]])
    assert float(_loss(images, texts, weights=weights)[1]["accuracy"]) == pytest.approx(2 / 3)


def test_half_precision_embeddings_are_compared_in_float32():
    images = jnp.asarray(_unit(16, 8, 0), jnp.bfloat16)
    texts = jnp.asarray(_unit(16, 8, 1), jnp.bfloat16)
    loss, _ = _loss(images, texts)
    expected = _reference(np.asarray(images, np.float32), np.asarray(texts, np.float32))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
