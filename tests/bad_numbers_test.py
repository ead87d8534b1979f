import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clipa_t5x import bad_numbers, errors, optimizers, partitioning, schedules, train_state, trainer

POLICY = bad_numbers.Policy
SKIP = POLICY("skip", max_in_a_row=2)
SPIKES = POLICY("skip", spike_sigmas=4.0, window=6, warmup=3, max_in_a_row=2)
FSDP = {"logical_axis_rules": partitioning.standard_logical_axis_rules(1, 2)}
SCHEDULE = schedules.warmup_cosine(0.05, 10)


def _nan_where_key_is_one(images, keys):
    """An augmentation that spoils the rows whose key begins with 1."""
    spoilt = (keys[:, 0] == 1)[:, None, None, None]
    return jnp.where(spoilt, jnp.nan, images.astype(jnp.float32) / 127.5 - 1.0)


@pytest.fixture(scope="module")
def make_trainer(tiny_model, tiny_batch):
    @functools.cache
    def make(policy, num_devices=1, num_microbatches=1):
        batch = {**tiny_batch(), "augment_keys": jnp.zeros((16, 2), jnp.uint32)}
        return trainer.Trainer(
            model=tiny_model(image={"drop_path_rate": 0.3}),
            optimizer=optimizers.adamw(SCHEDULE, eps=0.1),
            partitioner=partitioning.PjitPartitioner(devices=jax.devices()[:num_devices], **FSDP),
            batch_spec={k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items()},
            num_microbatches=num_microbatches,
            augment=_nan_where_key_is_one,
            bad_numbers=policy,
        )

    return make


@pytest.fixture(scope="module")
def run(tiny_batch):
    """Returns a function that steps through batches, bad ones where `bad` says so.

    It gives host copies of the states, the first included, and of the metrics.
    """

    def go(subject, bad, state=None, first=0):
        state = subject.init_state(seed=0) if state is None else state
        states, metrics = [jax.tree.map(np.array, state)], []
        sharding = NamedSharding(subject.mesh, P(("replica", "data")))
        for i, is_bad in enumerate(bad, first):
            keys = jnp.zeros((16, 2), jnp.uint32).at[5, 0].set(is_bad)
            batch = jax.device_put({**tiny_batch(seed=i), "augment_keys": keys}, sharding)
            before = state
            state, step_metrics = subject.compiled_train_step(before, batch)
            assert all(x.is_deleted() for x in jax.tree.leaves(before)), "not donated"
            states.append(jax.tree.map(np.array, state))
            metrics.append(jax.device_get(step_metrics))
        return states, metrics

    return go


def _assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tree), jax.device_get(expected))


def _assert_close(tree, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, expected)


def _parts(opt_state, kind):
    (part,) = [
        x
        for x in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
        if isinstance(x, kind)
    ]
    return part


# Within the step.


def test_a_bad_step_changes_what_counts_steps_and_nothing_else(make_trainer, run):
    states, metrics = run(make_trainer(SKIP), [0, 1, 0, 0])
    before, after = states[1:3]
    assert np.isnan(metrics[1]["loss"]) and np.isnan(metrics[1]["grad_norm"])
    _assert_equal(after.params, before.params)
    adam, schedule = optax.ScaleByAdamState, optax.ScaleByScheduleState
    _assert_equal(_parts(after.opt_state, adam), _parts(before.opt_state, adam))
    assert [_parts(s.opt_state, adam).count for s in states] == [0, 1, 1, 2, 3]
    assert [_parts(s.opt_state, schedule).count for s in states] == [0, 1, 2, 3, 4]
    assert [s.step for s in states] == [0, 1, 2, 3, 4]
    _assert_equal(after.rng, before.rng)
    # What is neither is the guard: the bad norm left its statistics alone.
    _assert_equal(after.guard, before.guard.replace(in_a_row=np.int32(1), skipped=np.int32(1)))
    assert [s.guard.in_a_row for s in states] == [0, 0, 1, 0, 0]
    assert [s.guard.count for s in states] == [0, 1, 1, 2, 3]
    assert states[-1].guard.skipped == 1 and not states[-1].guard.frozen
    # The rate keeps its timetable.
    rates = [m["learning_rate"] for m in metrics]
    np.testing.assert_allclose(rates, [SCHEDULE(step) for step in range(4)], rtol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(states[-1].params))


def test_without_bad_numbers_training_is_the_same(make_trainer, run):
    guarded, metrics = run(make_trainer(SPIKES), [0] * 4)
    free, free_metrics = run(make_trainer(None), [0] * 4)
    for mine, other in zip(guarded, free, strict=True):
        _assert_equal(mine.replace(guard=None), other)
    more = {"bad_numbers/in_a_row", "bad_numbers/skipped_in_all", "bad_numbers/threshold"}
    for mine, other in zip(metrics, free_metrics, strict=True):
        assert mine.keys() - other.keys() == more
        _assert_equal({name: mine[name] for name in other}, other)
        assert {x.dtype for x in mine.values()} == {np.dtype("float32")}


def test_switched_off_the_step_has_no_trace_of_it(make_trainer):
    free, guarded = (make_trainer(policy) for policy in (None, SKIP))
    assert free.abstract_state.guard is None and free.state_shardings.guard is None
    off, on = (
        str(each.traced_train_step.jaxpr).count("is_finite") for each in (free, guarded)
    )  # the loss's own logsumexp has some, too
    assert on - off == 3


@pytest.mark.parametrize("options", [{"num_devices": 8}, {"num_microbatches": 4}])
def test_verdicts_are_the_same_on_every_mesh_and_in_parts(make_trainer, run, options):
    bad = [0, 1, 0, 0, 1, 1, 0]
    expected, expected_metrics = run(make_trainer(SPIKES), bad)
    subject = make_trainer(SPIKES, **options)
    start = jax.device_put(expected[0], subject.state_shardings)
    states, metrics = run(subject, bad, start)
    for name in ("params", "guard"):
        tolerance = {"rtol": 1e-3, "atol": 1e-4}
        _assert_close(getattr(states[-1], name), getattr(expected[-1], name), **tolerance)
    for key in ("bad_numbers/in_a_row", "bad_numbers/skipped_in_all"):
        assert [m[key] for m in metrics] == [m[key] for m in expected_metrics]
    assert [m["bad_numbers/in_a_row"] for m in metrics] == [0, 1, 0, 0, 1, 2, 2]


def test_the_guard_lies_everywhere_and_the_state_is_written_in_place(make_trainer):
    subject = make_trainer(SPIKES, num_devices=8)
    for x in jax.tree.leaves(subject.abstract_state.guard):
        assert x.shape == () and x.sharding.is_fully_replicated
    memory = subject.compiled_train_step.memory_analysis()
    state = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(subject.abstract_state)
    )
    assert memory.alias_size_in_bytes >= state


@pytest.mark.parametrize(
    "policy, bad, frozen",
    [(POLICY("raise"), [0, 1, 0], 1), (POLICY("rewind"), [0, 1, 0], 1),
     (SKIP, [1, 0, 1, 1, 0], 4)],
)  # fmt: skip
def test_nothing_is_applied_any_more_once_the_host_has_to_look(
    make_trainer, run, policy, bad, frozen
):
    states, metrics = run(make_trainer(policy), bad)
    for state in states[frozen + 1 :]:
        _assert_equal(state.params, states[frozen].params)
    assert [bool(s.guard.frozen) for s in states] == [
        i >= frozen + (policy != SKIP) for i in range(len(states))
    ]
    assert metrics[-1]["bad_numbers/in_a_row"] == policy.freezes_after
    assert np.isfinite(metrics[-1]["loss"])


def test_a_spike_is_found_and_stays_out_of_the_statistics(make_trainer, run):
    subject = make_trainer(SPIKES)
    settled = run(subject, [0] * 5)[0][-1].replace(guard=jax.device_get(bad_numbers.fresh_guard()))
    states, metrics = run(subject, [0] * 4, jax.device_put(settled, subject.state_shardings), 5)
    limits = [float(m["bad_numbers/threshold"]) for m in metrics]
    assert limits[:3] == [math.inf] * 3 and limits[3] < 1.0
    assert all(m["grad_norm"] < limit for m, limit in zip(metrics, limits, strict=True))
    hot = {**states[-1].params, "logit_scale": states[-1].params["logit_scale"] + 3.0}
    before = states[-1].replace(params=hot)
    start = jax.device_put(before, subject.state_shardings)
    (_, after), (values,) = run(subject, [0], start, first=9)
    assert np.isfinite(values["grad_norm"])
    assert values["grad_norm"] > values["bad_numbers/threshold"]
    _assert_equal(after.params, hot)
    _assert_equal(after.guard, before.guard.replace(in_a_row=np.int32(1), skipped=np.int32(1)))


def test_statistics_are_the_weighted_mean_and_variance_of_logarithms():
    norms = np.exp(np.random.default_rng(0).normal(1.0, 0.4, 40))
    window, guard, weights = 8, bad_numbers.fresh_guard(), np.zeros(0)
    add = jax.jit(bad_numbers.add_norm, static_argnums=2)
    for n, norm in enumerate(norms, 1):
        guard = add(guard, jnp.float32(norm), window)
        share = 1 / min(n, window)
        weights = np.append(weights * (1 - share), share)
        seen = np.log(norms[:n])
        mean = np.average(seen, weights=weights)
        np.testing.assert_allclose(guard.mean, mean, rtol=1e-5)
        variance = np.average((seen - mean) ** 2, weights=weights)
        np.testing.assert_allclose(guard.variance, variance, rtol=1e-4, atol=1e-9)
        if n <= window:  # NumPy's own, without weights
            np.testing.assert_allclose(guard.variance, seen.var(), rtol=1e-4, atol=1e-9)
        assert guard.count == n


def test_the_threshold_is_so_many_deviations_up():
    guard = bad_numbers.fresh_guard().replace(mean=1.0, variance=0.25, count=jnp.int32(3))
    assert float(bad_numbers.threshold(SPIKES, guard)) == pytest.approx(math.exp(1 + 4 * 0.5))
    early = guard.replace(count=jnp.int32(2))
    assert float(bad_numbers.threshold(SPIKES, early)) == math.inf
    assert float(bad_numbers.threshold(SKIP, guard)) == math.inf
    # Norms that do not move at all leave room for small movements.
    still = guard.replace(variance=0.0)
    assert float(bad_numbers.threshold(SPIKES, still)) == pytest.approx(math.exp(1 + 4 * 0.05))


def _toy_step(policy):
    """A jitted step on a parameter alone: (state, loss, norm) -> (state, metrics)."""

    def step(state, loss, norm, update_norm=1.0):
        after = state.replace(step=state.step + 1, params=state.params + 1.0)
        metrics = {"loss": loss, "grad_norm": norm, "update_norm": update_norm}
        return bad_numbers.guard_update(policy, state, after, metrics)

    return jax.jit(step)


def _toy_state():
    return train_state.TrainState(
        step=jnp.int32(0), params=jnp.float32(0), opt_state=(), rng=jnp.zeros(2, jnp.uint32),
        guard=bad_numbers.fresh_guard(),
    )  # fmt: skip


@pytest.mark.parametrize(
    "loss, norm", [(math.nan, 1.0), (-math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_whatever_is_not_finite_is_bad(loss, norm):
    state, metrics = _toy_step(SKIP)(_toy_state(), loss, norm)
    assert (state.params, state.step, state.guard.count) == (0, 1, 0)
    assert metrics["bad_numbers/in_a_row"] == 1


def test_spikes_in_noise_are_found_and_noise_is_not_a_spike():
    """Norms that fall to a third and scatter by a fifth."""
    rng = np.random.default_rng(1)
    norms = np.exp(rng.normal(0, 0.2, 1000) - np.linspace(0, math.log(3), 1000))
    spikes = {150, 151, 400, 998}
    norms[list(spikes)] *= 10.0
    state, step, found = _toy_state(), _toy_step(POLICY("skip", spike_sigmas=6.0)), set()
    for i, norm in enumerate(norms):
        state, metrics = step(state, 1.0, norm)
        if metrics["bad_numbers/in_a_row"]:
            found.add(i)
    assert found == spikes
    assert (state.params, state.guard.skipped, state.guard.count) == (996, 4, 996)


def test_a_gradient_of_zero_is_no_bad_number():
    state = _toy_state()
    for norm in (0.0, 1.0, 0.0):
        state, metrics = _toy_step(SKIP)(state, 1.0, norm)
        assert metrics["bad_numbers/in_a_row"] == 0
    assert all(np.isfinite(x) for x in jax.tree.leaves(state.guard))


# What the host makes of it.


def _step(loss=1.0, norm=2.0, in_a_row=0, in_all=0, limit=None):
    values = {
        "loss": loss,
        "grad_norm": norm,
        "update_norm": 1.0,
        "bad_numbers/in_a_row": in_a_row,
        "bad_numbers/skipped_in_all": in_all,
    }
    more = {} if limit is None else {"bad_numbers/threshold": limit}
    return {name: np.float32(value) for name, value in {**values, **more}.items()}


def test_means_are_over_the_steps_that_were_applied():
    steps = [
        _step(1.0, 2.0, limit=math.inf),
        _step(math.nan, math.nan, 1, 5, limit=3.5),
        _step(2.0, 9.0, 2, 6, limit=3.5),
        _step(3.0, 3.0, 0, 6, limit=4.0),
    ]
    verdict = bad_numbers.judge(POLICY("skip", spike_sigmas=3.0), 11, steps)
    assert verdict == bad_numbers.Continue(
        {
            "loss": 2.0,
            "grad_norm": 2.5,
            "update_norm": 1.0,
            "bad_numbers/skipped": 2.0,
            "bad_numbers/skipped_in_all": 6.0,
            "bad_numbers/threshold": 4.0,
        },
        "Skipped 2 of 4 updates: the loss is nan at step 12; the grad_norm is 9 at step 13, a "
        "spike: its threshold (SPIKE_SIGMAS) was 3.5.",
    )
    assert all(type(value) is float for value in verdict.values.values())


def test_where_no_step_was_applied_means_are_over_all():
    verdict = bad_numbers.judge(SKIP, 1, [_step(math.nan, 2.0, 1, 1)])
    assert isinstance(verdict, bad_numbers.Continue)
    assert math.isnan(verdict.values["loss"]) and verdict.values["grad_norm"] == 2.0
    assert verdict.values["bad_numbers/skipped"] == 1.0


def test_without_a_policy_all_is_as_it_was():
    steps = [{"loss": np.float32(x), "update_norm": np.float32(1)} for x in (1, 2, 6)]
    expected = bad_numbers.Continue({"loss": 3.0, "update_norm": 1.0}, "")
    assert bad_numbers.judge(None, 1, steps) == expected
    steps[1]["update_norm"] = np.float32(math.inf)
    verdict = bad_numbers.judge(None, 1, steps)
    assert isinstance(verdict, bad_numbers.Stop)
    assert "the update_norm is inf at step 2: training has diverged" in verdict.message


def test_an_update_that_was_applied_and_is_not_finite_ends_the_run_under_every_policy():
    """Where the rate or the optimizer is broken, skipping does not help."""
    for action in bad_numbers.ACTIONS:
        steps = [_step(), {**_step(), "update_norm": np.float32(math.nan)}]
        verdict = bad_numbers.judge(POLICY(action), 1, steps)
        assert isinstance(verdict, bad_numbers.Stop) and "update_norm is nan at step 2" in (
            verdict.message
        )


def test_real_steps_are_judged_by_the_first_bad_one(make_trainer, run):
    bad = [0, 1, 0, 1, 1, 0]
    _, metrics = run(make_trainer(POLICY("raise")), bad)
    verdict = bad_numbers.judge(POLICY("raise"), 1, metrics)
    assert isinstance(verdict, bad_numbers.Stop)
    assert "the loss is nan at step 2 (BAD_NUMBERS_ACTION is 'raise')" in verdict.message
    _, metrics = run(make_trainer(POLICY("rewind")), bad)
    verdict = bad_numbers.judge(POLICY("rewind"), 1, metrics, rewinds=2)
    assert isinstance(verdict, bad_numbers.Rewind) and verdict.bad_step == 2
    verdict = bad_numbers.judge(POLICY("rewind"), 1, metrics, rewinds=3)
    assert isinstance(verdict, bad_numbers.Stop)
    assert "at step 2, and the run was rewound 3 times already" in verdict.message
    _, metrics = run(make_trainer(SKIP), bad)
    assert isinstance(bad_numbers.judge(SKIP, 1, metrics[:4]), bad_numbers.Continue)
    # The row began where the host has looked already.
    verdict = bad_numbers.judge(SKIP, 5, metrics[4:])
    assert isinstance(verdict, bad_numbers.Stop)
    assert "the loss is nan at step 5, and no update since step 4 could be" in verdict.message


def test_messages_are_one_line():
    spike = _step(1.0, 9.0, 10, 10, limit=3.0)
    for policy in (POLICY(a, spike_sigmas=3.0) for a in bad_numbers.ACTIONS):
        verdict = bad_numbers.judge(policy, 7, [spike], rewinds=policy.max_rewinds)
        assert isinstance(verdict, bad_numbers.Stop)
        assert "\n" not in verdict.message
        assert "the grad_norm is 9 at step 7, a spike: its threshold (SPIKE_SIGMAS) was 3" in (
            verdict.message
        )


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"action": "ignore"}, "BAD_NUMBERS_ACTION is 'ignore'; it must be one of"),
        ({"spike_sigmas": 0.5}, "SPIKE_SIGMAS is 0.5; it must be a number of at least 1"),
        ({"spike_sigmas": math.nan}, "SPIKE_SIGMAS is nan"),
        ({"window": 0}, "bad_numbers.Policy.window is 0; it must be an integer"),
        ({"warmup": 2.5}, "bad_numbers.Policy.warmup is 2.5"),
        ({"max_in_a_row": 0}, "bad_numbers.Policy.max_in_a_row is 0"),
        ({"max_rewinds": True}, "bad_numbers.Policy.max_rewinds is True"),
    ],
)
def test_what_is_no_policy_is_refused(setting, message):
    with pytest.raises(errors.UserError, match=message):
        POLICY(**setting)


# Checkpoints.


@pytest.fixture(scope="module")
def saved(make_trainer, run, tmp_path_factory):
    """{policy: (a run's states, folder of the state after step 2)}, written by orbax."""
    found = {}
    for policy in (None, SPIKES):
        states, _ = run(make_trainer(policy), [0, 1 if policy else 0, 0, 0])
        path = tmp_path_factory.mktemp("saved").absolute() / "state"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, states[2].as_tree())
        found[policy] = states, path
    return found


def _restore(path, subject):
    with ocp.StandardCheckpointer() as checkpointer:
        names = list(checkpointer.metadata(path).item_metadata.tree)
        wanted = bad_numbers.as_saved(subject.abstract_state, names)
        tree = checkpointer.restore(path, wanted.as_tree())
    return bad_numbers.as_wanted(train_state.TrainState(**tree), subject.abstract_state)


@pytest.mark.parametrize("now", [None, SPIKES, dataclasses.replace(SPIKES, action="rewind")])
@pytest.mark.parametrize("then", [None, SPIKES])
def test_checkpoints_go_over_between_runs_with_and_without(make_trainer, saved, then, now):
    states, path = saved[then]
    subject = make_trainer(now)
    state = _restore(path, subject)
    _assert_equal(state.replace(guard=None), states[2].replace(guard=None))
    assert jax.tree.structure(state) == jax.tree.structure(subject.abstract_state)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)),
                 state, subject.state_shardings)  # fmt: skip
    if now is not None:
        _assert_equal(state.guard, states[2].guard if then else bad_numbers.fresh_guard())


def test_resumed_in_the_middle_of_a_row_is_uninterrupted(make_trainer, run, saved):
    states, path = saved[SPIKES]
    assert states[2].guard.in_a_row == 1
    subject = make_trainer(SPIKES)
    resumed, _ = run(subject, [0, 0], _restore(path, subject), first=2)
    _assert_equal(resumed[-1], states[-1])


def test_without_a_guard_a_checkpoint_holds_no_word_of_it(saved):
    with ocp.StandardCheckpointer() as checkpointer:
        trees = {
            k: checkpointer.metadata(path).item_metadata.tree for k, (_, path) in saved.items()
        }
    assert set(trees[None]) == {"step", "params", "opt_state", "rng"}
    assert set(trees[SPIKES]) == {"step", "params", "opt_state", "rng", "guard"}


def test_an_update_that_is_not_finite_is_held_back():
    """Of a gradient that is: a learning rate beyond all measure."""
    step = _toy_step(POLICY("skip"))
    state, metrics = step(_toy_state(), 1.0, 1.0, math.inf)
    assert float(state.params) == 0 and float(metrics["bad_numbers/in_a_row"]) == 1
    values = {**_step(in_a_row=1, in_all=1), "update_norm": np.float32(math.inf)}
    verdict = bad_numbers.judge(POLICY("skip"), 3, [values])
    assert "the update_norm is inf at step 3" in verdict.notice
