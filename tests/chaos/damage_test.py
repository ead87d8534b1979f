"""Damaged checkpoints are found, and never restored."""

import random
import shutil

import jax
import numpy as np
import pytest
import saved_runs
from chaos import damage

from clipa_t5x import checkpoints


def values(state):
    return {name: np.asarray(x) for name, x in checkpoints.flatten(state).items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A MODEL_DIR with checkpoints of steps 2 and 4, different in every array."""
    model_dir = tmp_path_factory.mktemp("run")
    states = {step: saved_runs.small_state(seed=step, step=step) for step in (2, 4)}
    checkpointer = checkpoints.Checkpointer(str(model_dir), checkpoints.SaveCheckpointConfig())
    for step, state in states.items():
        checkpointer.save(step, state, {"next_sample": 8 * step})
    checkpointer.close()
    return model_dir, states


def restore(model_dir, like):
    checkpointer = checkpoints.Checkpointer(str(model_dir), checkpoints.SaveCheckpointConfig())
    restored = checkpointer.restore(saved_runs.abstract(like))
    checkpointer.close()
    return restored


@pytest.mark.parametrize(
    "count", [pytest.param(20, id="short"), pytest.param(200, marks=pytest.mark.slow, id="200")]
)
def test_damage_is_found_and_the_checkpoint_before_is_used(run, tmp_path, count, caplog):
    model_dir, states = run
    rng = random.Random(0)
    for trial in range(count):
        copy = tmp_path / str(trial)
        shutil.copytree(model_dir, copy)
        done = damage.damage(copy / "checkpoint_4", rng)
        caplog.clear()
        restored = restore(copy, states[2])
        assert restored.step == 2, done
        assert restored.data_state["next_sample"] == 16
        jax.tree.map(np.testing.assert_array_equal, values(restored.state), values(states[2]))
        file = done.partition(":")[0]
        assert "checkpoint_4 is passed over, and checkpoint_2 is used instead" in caplog.text, done
        assert file in caplog.text, done
        shutil.rmtree(copy)
