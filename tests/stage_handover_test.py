import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from saved_runs import assert_same, filled, one_line_error, save

from clipa_t5x import checkpoints, stage_handover
from clipa_t5x.errors import UserError


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


def load(saved, trainer, resized=checkpoints.RestoreCheckpointConfig.resized):
    return stage_handover.load_params(str(saved), trainer.abstract_state.params, resized)


@pytest.mark.parametrize("devices, partitions", [(8, 1), (8, 4), (1, 1)])
def test_parameters_go_over_by_name(saved, state, make_trainer, devices, partitions):
    trainer = make_trainer(devices=devices, partitions=partitions)
    params, notes, *_ = load(saved, trainer, ())
    assert_same(jax.device_get(params), jax.device_get(state.params))
    assert notes == []
    shardings = jax.tree.leaves(trainer.state_shardings.params)
    for x, sharding in zip(jax.tree.leaves(params), shardings, strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.parametrize("length", [8, 16, 32, 4, 11])
def test_text_positions_are_interpolated(saved, state, make_trainer, length):
    params, notes, *_ = load(saved, make_trainer(length=length))
    old = np.asarray(state.params["text_tower"]["position_embedding"])
    centres = (np.arange(length) + 0.5) * 8 / length - 0.5
    expected = np.stack([np.interp(centres, np.arange(8), column) for column in old.T], axis=1)
    new = params["text_tower"]["position_embedding"]
    np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)
    name = "text_tower/position_embedding"
    assert notes == ([] if length == 8 else [f"{name}: 8 -> {length} positions"])
    rest, kept = checkpoints.flatten(params), checkpoints.flatten(state.params)
    for other in rest.keys() - {name}:
        np.testing.assert_array_equal(rest[other], kept[other])


@pytest.mark.parametrize("size, new_size", [(2, 4), (2, 3), (4, 2), (3, 3)])
def test_image_positions_are_resized_as_a_grid(size, new_size):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(1 + size**2, 5)).astype(np.float32)
    resized = stage_handover.resize_image_positions(jnp.asarray(table), 1 + new_size**2)
    centres = (np.arange(new_size) + 0.5) * size / new_size - 0.5

    def along(values, axis):
        return np.apply_along_axis(lambda v: np.interp(centres, np.arange(size), v), axis, values)

    expected = along(along(table[1:].reshape(size, size, 5), 0), 1).reshape(-1, 5)
    np.testing.assert_array_equal(resized[0], table[0])
    np.testing.assert_allclose(resized[1:], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows, new_rows", [(4, 17), (17, 16), (6, 5)])
def test_image_positions_that_are_no_square(rows, new_rows):
    table = jnp.zeros((rows, 4))
    one_line_error(
        lambda: stage_handover.resize_image_positions(table, new_rows),
        f"{rows} and {new_rows} rows", "sincos2d",
    )  # fmt: skip


def test_learned_image_positions_are_handed_over(tmp_path, make_trainer):
    learned = {"position_embedding": "learned"}
    small, large = make_trainer(image=learned), make_trainer(image=learned, pixels=32)
    state = filled(small)
    save(tmp_path, state, 1)
    params, notes, *_ = load(tmp_path, large)
    old = state.params["image_tower"]["position_embedding"]
    new = params["image_tower"]["position_embedding"]
    assert (old.shape, new.shape) == ((5, 16), (17, 16))
    np.testing.assert_allclose(new, stage_handover.resize_image_positions(old, 17), rtol=1e-6)
    assert notes == ["image_tower/position_embedding: 5 -> 17 positions"]


def test_fixed_image_positions_need_no_hand_over(saved, make_trainer):
    large = make_trainer(pixels=32)
    assert "image_tower/position_embedding" not in checkpoints.saved_params(str(saved), 6)
    assert load(saved, large).notes == []


def test_only_what_is_declared_is_resized(saved, make_trainer):
    longer = make_trainer(length=16)
    one_line_error(
        lambda: load(saved, longer, ()),
        "text_tower/position_embedding is (8, 16) there and (16, 16) here", "a different model",
    )  # fmt: skip
    wider = make_trainer(text={"width": 32})
    one_line_error(lambda: load(saved, wider), "a different model", "20 parameters differ")


def test_a_new_stage_begins_with_a_fresh_optimizer(saved, state, trainer):
    params, *_ = load(saved, trainer, ())
    fresh = trainer.init_state(0, params)
    counts = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(fresh.opt_state)
        if jax.tree_util.keystr(path).endswith("count")
    ]
    assert len(counts) == 2  # Adam's and the schedule's
    assert all(int(count) == 0 for count in counts)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(fresh.opt_state))
    assert int(fresh.step) == 0
    assert_same(fresh.params, state.params)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_parameters_come_from_a_file_as_from_a_checkpoint(tmp_path, make_trainer, suffix):
    """Under their names, resized where that is declared, and no others."""
    old, new = make_trainer(), make_trainer(length=12)
    params = filled(old).params
    arrays = {f"params/{k}": np.asarray(v) for k, v in checkpoints.flatten(params).items()}
    path = str(tmp_path / f"weights.{suffix}")
    if suffix == "npz":
        np.savez(path, step=np.int32(3), **arrays)
    else:
        safetensors.numpy.save_file(arrays, path)
    loaded = stage_handover.load_params(path, old.abstract_state.params)
    assert (loaded.model_dir, loaded.step, loaded.notes) == (None, 0, [])
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    for x, wanted in zip(
        jax.tree.leaves(loaded.params), jax.tree.leaves(old.abstract_state.params), strict=True
    ):
        assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
    resized = checkpoints.RestoreCheckpointConfig().resized
    longer = stage_handover.load_params(path, new.abstract_state.params, resized)
    assert longer.params["text_tower"]["position_embedding"].shape[0] == 12
    with pytest.raises(
        UserError, match=r"weights.* is of a different model \(TASK.*\): 1 parameters differ"
    ):
        stage_handover.load_params(path, new.abstract_state.params)
