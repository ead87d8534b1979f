import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipa_t5x import errors, models, optimizers, schedules


def _params():
    return {
        "image_tower": {
            "head": {"kernel": jnp.arange(1.0, 5.0).reshape(2, 2)},
            "norm": {"scale": jnp.ones(2)},
        },
        "text_tower": {"fc1": {"kernel": -jnp.ones((2, 2)), "bias": jnp.full((2,), 0.5)}},
        "logit_scale": jnp.asarray(2.0),
    }


def _grads(params, step, size=1.0):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(size * rng.normal(size=p.shape), p.dtype), params)


def _train(transformation, steps=4, params=None, grads=_grads):
    """Parameters after some updates, and the optimizer's last state."""
    params = _params() if params is None else params
    state = transformation.init(params)
    for step in range(steps):
        updates, state = transformation.update(grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def _assert_close(tree, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), tree, expected)


SCHEDULE = schedules.warmup_cosine(0.1, total_steps=10, warmup_steps=2)


def test_adamw_is_optax_adamw():
    ours = optimizers.adamw(SCHEDULE, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3, decayed=[".*"])
    optaxs = optax.adamw(SCHEDULE, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3)
    _assert_close(_train(ours.transformation)[0], _train(optaxs)[0])


def test_adamw_defaults_are_clipas():
    mask = jax.tree.map(lambda _: False, _params())
    mask["image_tower"]["head"]["kernel"] = mask["text_tower"]["fc1"]["kernel"] = True
    optaxs = optax.adamw(SCHEDULE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.2, mask=mask)
    _assert_close(_train(optimizers.adamw(SCHEDULE).transformation)[0], _train(optaxs)[0])


def test_the_schedule_is_that_of_the_logs():
    assert optimizers.adamw(SCHEDULE).learning_rate_fn is SCHEDULE


def test_the_first_update_of_a_warmup_changes_nothing():
    params, _ = _train(optimizers.adamw(SCHEDULE).transformation, steps=1)
    jax.tree.map(np.testing.assert_array_equal, params, _params())


def _names(mask):
    return {
        optimizers.path_name(path)
        for path, chosen in jax.tree_util.tree_leaves_with_path(mask)
        if chosen
    }


def test_decay_takes_the_kernels_by_default(tiny_model, tiny_batch):
    model = tiny_model()
    params = nn.unbox(
        jax.eval_shape(lambda b: models.init_params(model, jax.random.key(0), b), tiny_batch(1))
    )
    block = [
        *[f"attention/{name}/kernel" for name in ("query", "key", "value", "out")],
        "mlp/fc1/kernel",
        "mlp/fc2/kernel",
    ]
    expected = {f"{t}/encoder/layers/{k}" for t in ("image_tower", "text_tower") for k in block}
    expected |= {"image_tower/patch_embedding/kernel"}
    expected |= {"image_tower/head/kernel", "text_tower/head/kernel"}
    assert _names(optimizers.by_name([r".*/kernel"])(params)) == expected
    released = optimizers.by_name([".*/(kernel|embedding|class_token)"])(params)
    assert _names(released) - expected == {
        "image_tower/class_token",
        "text_tower/token_embedding/embedding",
    }


def test_patterns_match_whole_names():
    assert _names(optimizers.by_name(["kernel", "image_tower", "logit_scale"])(_params())) == {
        "logit_scale"
    }
    assert _names(optimizers.by_name([])(_params())) == set()


def test_frozen_parameters_never_change():
    optimizer = optimizers.adamw(SCHEDULE, frozen=["image_tower/.*"], decayed=[".*"])
    params, _ = _train(optimizer.transformation)
    before = _params()
    jax.tree.map(np.testing.assert_array_equal, params["image_tower"], before["image_tower"])
    free = optimizers.adamw(SCHEDULE, decayed=[".*"])
    _assert_close(params["text_tower"], _train(free.transformation)[0]["text_tower"])
    assert not np.allclose(params["text_tower"]["fc1"]["kernel"], -1.0)


def test_a_frozen_logit_scale_stays_even_over_its_maximum():
    params = {**_params(), "logit_scale": jnp.asarray(5.0)}
    optimizer = optimizers.adamw(SCHEDULE, frozen=["logit_scale"], max_logit_scale=100.0)
    trained, _ = _train(optimizer.transformation, params=params)
    assert trained["logit_scale"] == 5.0


def test_the_logit_scale_stays_at_or_under_its_maximum():
    def upwards(params, step):
        return {**_grads(params, step), "logit_scale": jnp.asarray(-1.0)}

    def rate(step):
        return jnp.asarray(1.0)

    free, _ = _train(optimizers.adamw(rate).transformation, grads=upwards)
    assert float(jnp.exp(free["logit_scale"])) > 100
    clamped, _ = _train(optimizers.adamw(rate, max_logit_scale=100.0).transformation, grads=upwards)
    assert float(jnp.exp(clamped["logit_scale"])) == pytest.approx(100, rel=1e-5)
    for params in (free, clamped):
        params.pop("logit_scale")
    _assert_close(clamped, free)


def test_the_logit_scale_moves_freely_under_its_maximum_and_comes_back_from_above():
    clamp = optimizers.clamp_logit_scale(10.0)
    for before, update, after in [
        (1.0, 0.25, 1.25),
        (1.0, -0.25, 0.75),
        (2.0, 1.0, np.log(10.0)),
        (4.0, -0.5, np.log(10.0)),
        (4.0, -3.0, 1.0),
    ]:
        params, updates = {"logit_scale": jnp.asarray(before)}, {"logit_scale": jnp.asarray(update)}
        shortened, _ = clamp.update(updates, clamp.init(params), params)
        result = optax.apply_updates(params, shortened)
        assert float(result["logit_scale"]) == pytest.approx(after, rel=1e-6)


def test_clamping_without_parameters_is_refused():
    clamp = optimizers.clamp_logit_scale(10.0)
    with pytest.raises(ValueError, match="needs the parameters"):
        clamp.update({"logit_scale": jnp.zeros(())}, optax.EmptyState())


def test_gradients_are_clipped_by_their_global_norm():
    # A large eps makes Adam's update grow with the gradient, so that clipping shows.
    settings = {"eps": 10.0, "weight_decay": 0.0}
    clipped = optimizers.adamw(SCHEDULE, max_grad_norm=0.5, **settings)

    def shortened(params, step):
        grads = _grads(params, step, size=100.0)
        norm = optax.tree.norm(grads)
        return jax.tree.map(lambda g: g * 0.5 / norm, grads)

    large, _ = _train(clipped.transformation, grads=lambda p, s: _grads(p, s, size=100.0))
    expected, _ = _train(optimizers.adamw(SCHEDULE, **settings).transformation, grads=shortened)
    _assert_close(large, expected)
    tiny = [_train(o.transformation, grads=lambda p, s: _grads(p, s, size=1e-3))[0]
            for o in (clipped, optimizers.adamw(SCHEDULE, **settings))]  # fmt: skip
    _assert_close(*tiny)


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_the_first_moments_dtype_is_chosen_and_the_second_is_float32(mu_dtype):
    optimizer = optimizers.adamw(SCHEDULE, mu_dtype=mu_dtype)
    params, state = _train(optimizer.transformation)
    (adam,) = [s for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s)]
    assert {x.dtype for x in jax.tree.leaves(adam.mu)} == {jnp.dtype(mu_dtype)}
    assert {x.dtype for x in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    exact, _ = _train(optimizers.adamw(SCHEDULE).transformation)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02), params, exact)


def _is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


@pytest.mark.parametrize("setting", ["decayed", "frozen"])
def test_bad_patterns_are_refused(setting):
    with pytest.raises(errors.UserError, match=r"'\(head' in optimizers.adamw is not a regular"):
        optimizers.adamw(SCHEDULE, **{setting: ["(head"]})
