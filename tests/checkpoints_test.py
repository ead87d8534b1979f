import json

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from saved_runs import (
    DATA,
    abstract,
    assert_same,
    filled,
    one_line_error,
    restore,
    save,
    small_state,
)

from clipa_t5x import checkpoints, optimizers, schedules, train_state


@pytest.fixture(scope="module")
def trainer(make_trainer):
    return make_trainer()


@pytest.fixture(scope="module")
def state(trainer):
    return filled(trainer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    """A MODEL_DIR with one checkpoint, to read only."""
    model_dir = tmp_path_factory.mktemp("saved")
    (model_dir / "config.gin").write_text("BATCH_SIZE = 8\n")
    save(model_dir, state, 6)
    return model_dir


# Saving and resuming.


def test_a_restored_state_is_bit_identical(saved, state, trainer):
    restored, data, _ = restore(saved, trainer.abstract_state)
    assert isinstance(restored, train_state.TrainState)
    assert_same(restored, state)
    assert data == DATA
    assert int(restored.step) == 6
    for x, y in zip(
        jax.tree.leaves(restored), jax.tree.leaves(trainer.state_shardings), strict=True
    ):
        assert x.sharding.is_equivalent_to(y, x.ndim)


@pytest.mark.parametrize("devices, partitions", [(8, 4), (1, 1)])
def test_a_state_moves_to_another_mesh(saved, state, make_trainer, devices, partitions):
    other = make_trainer(devices=devices, partitions=partitions)
    restored, *_ = restore(saved, other.abstract_state)
    assert_same(jax.device_get(restored), jax.device_get(state))
    kernel = restored.params["text_tower"]["head"]["kernel"]
    assert kernel.sharding.mesh.shape == {
        "replica": 1, "data": devices // partitions, "model": partitions,
    }  # fmt: skip


def test_low_precision_moments_are_kept(tmp_path, make_trainer):
    optimizer = optimizers.adamw(schedules.warmup_cosine(1e-3, 10), mu_dtype="bfloat16")
    trainer = make_trainer(optimizer=optimizer)
    state = filled(trainer)
    assert jnp.dtype("bfloat16") in {x.dtype for x in jax.tree.leaves(state.opt_state)}
    save(tmp_path, state, 1)
    assert_same(restore(tmp_path, trainer.abstract_state)[0], state)


def test_a_checkpoint_holds_the_runs_configuration(saved):
    (path,) = (saved / "checkpoint_6" / "config").glob("metadata*")
    assert json.loads(path.read_text()) == {"gin": "BATCH_SIZE = 8\n"}


@pytest.mark.parametrize("keep, kept", [(2, [5, 7]), (1, [7]), (None, [1, 3, 5, 7])])
def test_only_the_newest_are_kept(tmp_path, keep, kept):
    (tmp_path / "train").mkdir()
    save(tmp_path, small_state(), 1, 3, 5, 7, keep=keep)
    assert checkpoints.all_steps(str(tmp_path)) == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"checkpoint_{step}" for step in kept), "train",
    ]  # fmt: skip


def test_a_step_that_is_there_is_left_alone(tmp_path):
    state = small_state()
    save(tmp_path, state, 6)
    save(tmp_path, small_state(seed=1), 6)
    assert_same(restore(tmp_path, abstract(state))[0], state)


def test_the_newest_is_restored(tmp_path):
    newer = small_state(seed=1, step=10)
    save(tmp_path, small_state(), 9)
    save(tmp_path, newer, 10, data={**DATA, "next_sample": 80})
    restored, data, _ = restore(tmp_path, abstract(newer))
    assert_same(restored, newer)
    assert data["next_sample"] == 80


@pytest.mark.parametrize("period, due", [(None, [10]), (3, [3, 6, 9, 10]), (5, [5, 10])])
def test_when_a_checkpoint_is_due(tmp_path, period, due):
    cfg = checkpoints.SaveCheckpointConfig(period=period)
    checkpointer = checkpoints.Checkpointer(str(tmp_path), cfg)
    assert [step for step in range(1, 11) if checkpointer.is_due(step, 10)] == due
    assert checkpointer.restore(abstract(small_state())) is None


# Other models, other optimizers.


def test_another_model_is_refused_by_parameter(saved, make_trainer):
    wider = make_trainer(text={"mlp_dim": 48})
    message = one_line_error(
        lambda: restore(saved, wider.abstract_state),
        saved, "checkpoint_6", "of a different model", "(1, 16, 32) there and (1, 16, 48) here",
        "config.gin",
    )  # fmt: skip
    assert "text_tower/encoder/" in message
    assert "image_tower" not in message


def test_missing_and_unknown_parameters_are_named(saved, make_trainer):
    other = make_trainer(image={"pooling": "map"})
    message = one_line_error(
        lambda: restore(saved, other.abstract_state), "is of a different model"
    )
    assert "image_tower/" in message
    assert "is missing there" in message
    other = make_trainer(text={"position_embedding": "sincos1d"})
    one_line_error(
        lambda: restore(saved, other.abstract_state),
        "1 parameters differ: text_tower/position_embedding is unknown here",
    )  # fmt: skip


def test_many_differences_are_counted():
    saved = {f"p{i}": jax.ShapeDtypeStruct((2,), jnp.float32) for i in range(30)}
    message = one_line_error(
        lambda: checkpoints.check_same_parameters(saved, {}, "there", "Remedy."),
        "30 parameters differ", "p7 is unknown here; ...", "Remedy.",
    )  # fmt: skip
    assert "p8" not in message
    checkpoints.check_same_parameters(saved, dict(saved), "there", "Remedy.")


def test_another_optimizer_is_refused(saved, make_trainer):
    schedule = schedules.warmup_cosine(1e-3, 10)
    sgd = optimizers.Optimizer(optax.sgd(schedule, momentum=0.9), schedule)
    one_line_error(
        lambda: restore(saved, make_trainer(optimizer=sgd).abstract_state),
        "checkpoint_6", "another optimizer's state", "INITIAL_CHECKPOINT_PATH",
    )  # fmt: skip


# Where checkpoints are.


def test_locate(saved):
    for path in (saved, f"{saved}/", f"{saved}/checkpoint_6", f"{saved}/checkpoint_6/"):
        assert checkpoints.locate(str(path)) == (str(saved), 6)


def test_locate_in_the_current_folder(saved, monkeypatch):
    monkeypatch.chdir(saved)
    assert checkpoints.locate("checkpoint_6") == (".", 6)
    assert checkpoints.locate(".") == (".", 6)


def test_nothing_to_locate(saved, tmp_path):
    remedy = ["there is no complete checkpoint", "INITIAL_CHECKPOINT_PATH"]
    one_line_error(lambda: checkpoints.locate(str(tmp_path)), tmp_path, "none", *remedy)
    absent = tmp_path / "absent"
    one_line_error(lambda: checkpoints.locate(str(absent)), absent, "none", *remedy)
    assert not absent.exists()
    other = f"{saved}/checkpoint_7"
    one_line_error(lambda: checkpoints.locate(other), other, "['checkpoint_6']", *remedy)


def test_saved_params_reads_no_array(saved, trainer, monkeypatch):
    def restore(*_, **__):
        raise AssertionError("arrays are read")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore)
    found = checkpoints.saved_params(str(saved), 6)
    wanted = checkpoints.flatten(trainer.abstract_state.params)
    assert "text_tower/position_embedding" in found
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (x.shape, x.dtype) for name, x in wanted.items()
    }
