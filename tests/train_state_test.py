import jax
import jax.numpy as jnp
import numpy as np

from clipa_t5x import train_state


def _state(step, seed=0):
    return train_state.TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={"w": jnp.ones(2)},
        opt_state=(jnp.zeros(2),),
        rng=jax.random.key_data(jax.random.key(seed)),
    )


def _key(state):
    return tuple(np.asarray(jax.random.key_data(state.step_rng())))


def test_a_steps_key_is_a_function_of_seed_and_step():
    assert _key(_state(7)) == _key(_state(7))
    assert len({_key(_state(step, seed)) for step in range(10) for seed in range(3)}) == 30


def test_a_steps_key_is_the_same_when_jitted():
    jitted = jax.jit(lambda state: jax.random.key_data(state.step_rng()))(_state(7))
    assert tuple(np.asarray(jitted)) == _key(_state(7))


def test_every_field_is_a_branch_of_the_tree_by_name():
    paths = jax.tree_util.tree_leaves_with_path(_state(0))
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [
        ".step",
        ".params['w']",
        ".opt_state[0]",
        ".rng",
    ]


def test_as_a_tree_a_state_holds_no_field_that_is_none():
    state = _state(3)
    tree = state.as_tree()
    assert list(tree) == ["step", "params", "opt_state", "rng"]
    assert tree["params"] is state.params
    assert train_state.TrainState(**tree) == state
    assert list(state.replace(guard=jnp.zeros(())).as_tree())[-1] == "guard"
