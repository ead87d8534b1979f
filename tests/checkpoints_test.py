import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from clipa_t5x import checkpoints, optimizers, partitioning, schedules, train_state
from clipa_t5x import trainer as trainer_lib
from clipa_t5x.errors import UserError

DATA = {"next_sample": 48, "seed": 7, "shuffle": True, "split": "train", "num_examples": 13}


@pytest.fixture(scope="module")
def make_trainer(tiny_model):
    """Returns a function that makes a trainer on some devices, in some layout."""

    def make(
        *, devices=8, partitions=1, length=8, pixels=16, optimizer=None, image=None, text=None
    ):
        sizes = {"width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 4}
        model = tiny_model(image={**sizes, **(image or {})}, text={**sizes, **(text or {})})
        # Fully sharded, so that every kernel is cut into pieces.
        partitioner = partitioning.PjitPartitioner(
            num_partitions=partitions,
            logical_axis_rules=partitioning.standard_logical_axis_rules(1, 2),
        )
        mesh = jax.sharding.Mesh(
            np.array(jax.devices()[:devices]).reshape(1, devices // partitions, partitions),
            partitioning.MESH_AXES,
        )
        partitioner.__dict__["mesh"] = mesh
        return trainer_lib.Trainer(
            model=model,
            optimizer=optimizer or optimizers.adamw(schedules.warmup_cosine(1e-3, 10)),
            partitioner=partitioner,
            batch_spec={
                "images": jax.ShapeDtypeStruct((8, pixels, pixels, 3), np.uint8),
                "text": jax.ShapeDtypeStruct((8, length), np.int32),
            },
        )

    return make


def filled(trainer, seed=0, step=6):
    """A state of random numbers, laid out as the trainer's; nothing is compiled."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            values = rng.integers(1, 1000, leaf.shape).astype(leaf.dtype)
        else:
            values = rng.normal(size=leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    state = jax.tree.map(fill, trainer.abstract_state)
    sharding = trainer.abstract_state.step.sharding
    return state.replace(step=jax.device_put(np.int32(step), sharding))


@pytest.fixture(scope="module")
def trainer(make_trainer):
    return make_trainer()


@pytest.fixture(scope="module")
def state(trainer):
    return filled(trainer)


def small_state(seed=0, step=6):
    """A state of two arrays, where it does not matter what is saved."""
    values = np.random.default_rng(seed).normal(size=(4, 2)).astype(np.float32)
    return train_state.TrainState(
        step=jnp.int32(step),
        params={"kernel": jnp.asarray(values)},
        opt_state={},
        rng=jnp.zeros(2, jnp.uint32),
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(model_dir, state, *steps, data=DATA, **cfg):
    checkpointer = checkpoints.Checkpointer(str(model_dir), checkpoints.SaveCheckpointConfig(**cfg))
    for step in steps:
        checkpointer.save(step, state, data)
    checkpointer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    """A MODEL_DIR with one checkpoint, to read only."""
    model_dir = tmp_path_factory.mktemp("saved")
    (model_dir / "config.gin").write_text("BATCH_SIZE = 8\n")
    save(model_dir, state, 6)
    return model_dir


def restore(model_dir, abstract_state):
    checkpointer = checkpoints.Checkpointer(str(model_dir), checkpoints.SaveCheckpointConfig())
    restored = checkpointer.restore(abstract_state)
    checkpointer.close()
    return restored


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def one_line_error(function, *parts):
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    return message


# Saving and resuming.


def test_a_restored_state_is_bit_identical(saved, state, trainer):
    restored, data = restore(saved, trainer.abstract_state)
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
    restored, _ = restore(saved, other.abstract_state)
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
    restored, data = restore(tmp_path, abstract(newer))
    assert_same(restored, newer)
    assert data["next_sample"] == 80


@pytest.mark.parametrize("period, due", [(None, [10]), (3, [3, 6, 9, 10]), (5, [5, 10])])
def test_when_a_checkpoint_is_due(tmp_path, period, due):
    cfg = checkpoints.SaveCheckpointConfig(period=period)
    checkpointer = checkpoints.Checkpointer(str(tmp_path), cfg)
    assert [step for step in range(1, 11) if checkpointer.is_due(step, 10)] == due
    assert checkpointer.latest_step() is None


# What is not whole.


def test_a_killed_save_is_not_a_checkpoint(tmp_path):
    state = small_state()
    save(tmp_path, state, 4)
    name = "checkpoint_8.orbax-checkpoint-tmp-1700000000"
    shutil.copytree(tmp_path / "checkpoint_4", tmp_path / name)
    assert checkpoints.locate(str(tmp_path)) == (str(tmp_path), 4)
    assert (tmp_path / name).exists()
    assert_same(restore(tmp_path, abstract(state))[0], state)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_4"]


def no_commit(path):
    (path / "_CHECKPOINT_METADATA").unlink()


def not_committed(path):
    metadata = path / "_CHECKPOINT_METADATA"
    fields = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({**fields, "commit_timestamp_nsecs": None}))


def cut_commit(path):
    metadata = path / "_CHECKPOINT_METADATA"
    metadata.write_text(metadata.read_text()[:20])


def no_state(path):
    shutil.rmtree(path / "state")


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize("damage", [no_commit, not_committed, cut_commit, no_state, empty])
def test_an_incomplete_copy_is_not_chosen(tmp_path, damage):
    save(tmp_path, small_state(), 4)
    shutil.copytree(tmp_path / "checkpoint_4", tmp_path / "checkpoint_8")
    damage(tmp_path / "checkpoint_8")
    assert checkpoints.all_steps(str(tmp_path)) == [4]
    one_line_error(
        lambda: checkpoints.locate(f"{tmp_path}/checkpoint_8"), "checkpoint_8", "['checkpoint_4']"
    )
    checkpointer = checkpoints.Checkpointer(str(tmp_path), checkpoints.SaveCheckpointConfig())
    assert checkpointer.latest_step() == 4
    # Nothing of a user's is lost, and the step can be saved.
    assert len(list(tmp_path.glob("checkpoint_8.incomplete-*"))) == 1
    newer = small_state(seed=1)
    checkpointer.save(8, newer, DATA)
    checkpointer.close()
    assert checkpoints.all_steps(str(tmp_path)) == [4, 8]
    assert_same(restore(tmp_path, abstract(newer))[0], newer)


def test_nothing_but_checkpoints_is_cleared(tmp_path, monkeypatch):
    """As on buckets, where orbax takes any folder without its mark for a half-written one."""
    commit_file = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
    options = ocp.CheckpointManagerOptions
    monkeypatch.setattr(
        ocp,
        "CheckpointManagerOptions",
        lambda **kwargs: options(**kwargs, atomicity_options=commit_file),
    )
    others = ["train/events", "inference_eval/imagenet/events", "stage1/checkpoint_3/state/d",
              "checkpoint_notes/x", "my_checkpoint_3/x"]  # fmt: skip
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("precious")
    (tmp_path / "checkpoint_2").mkdir()
    for step in (4, 8):
        save(tmp_path, small_state(), step)
    assert all((tmp_path / name).read_text() == "precious" for name in others)
    assert checkpoints.all_steps(str(tmp_path)) == [4, 8]


@pytest.mark.parametrize("what", ["checkpoint_3", "state"])
@pytest.mark.parametrize("then", ["close", "save"])
def test_a_failed_save_fails_the_run(tmp_path, monkeypatch, what, then):
    """At the end of the run, or at the next save; saving itself goes on in the background."""
    rename = os.rename

    def full(source, target, **kwargs):
        if os.path.basename(target) == what:
            raise OSError(28, "No space left on device")
        return rename(source, target, **kwargs)

    checkpointer = checkpoints.Checkpointer(str(tmp_path), checkpoints.SaveCheckpointConfig())
    monkeypatch.setattr(os, "rename", full)
    checkpointer.save(3, small_state(), DATA)
    with pytest.raises(OSError, match="No space left"):
        checkpointer.save(4, small_state(), DATA) if then == "save" else checkpointer.close()
    assert checkpoints.all_steps(str(tmp_path)) == []


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

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    found = checkpoints.saved_params(str(saved), 6)
    wanted = checkpoints.flatten(trainer.abstract_state.params)
    assert "text_tower/position_embedding" in found
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (x.shape, x.dtype) for name, x in wanted.items()
    }


# From stage to stage.


def load(saved, trainer, resized=checkpoints.RestoreCheckpointConfig.resized):
    return checkpoints.load_params(str(saved), trainer.abstract_state.params, resized)


@pytest.mark.parametrize("devices, partitions", [(8, 1), (8, 4), (1, 1)])
def test_parameters_go_over_by_name(saved, state, make_trainer, devices, partitions):
    trainer = make_trainer(devices=devices, partitions=partitions)
    params, notes = load(saved, trainer, ())
    assert_same(jax.device_get(params), jax.device_get(state.params))
    assert notes == []
    shardings = jax.tree.leaves(trainer.state_shardings.params)
    for x, sharding in zip(jax.tree.leaves(params), shardings, strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.parametrize("length", [8, 16, 32, 4, 11])
def test_text_positions_are_interpolated(saved, state, make_trainer, length):
    params, notes = load(saved, make_trainer(length=length))
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
    resized = checkpoints.resize_image_positions(jnp.asarray(table), 1 + new_size**2)
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
        lambda: checkpoints.resize_image_positions(table, new_rows),
        f"{rows} and {new_rows} rows", "sincos2d",
    )  # fmt: skip


def test_learned_image_positions_are_handed_over(tmp_path, make_trainer):
    learned = {"position_embedding": "learned"}
    small, large = make_trainer(image=learned), make_trainer(image=learned, pixels=32)
    state = filled(small)
    save(tmp_path, state, 1)
    params, notes = load(tmp_path, large)
    old = state.params["image_tower"]["position_embedding"]
    new = params["image_tower"]["position_embedding"]
    assert (old.shape, new.shape) == ((5, 16), (17, 16))
    np.testing.assert_allclose(new, checkpoints.resize_image_positions(old, 17), rtol=1e-6)
    assert notes == ["image_tower/position_embedding: 5 -> 17 positions"]


def test_fixed_image_positions_need_no_hand_over(saved, make_trainer):
    large = make_trainer(pixels=32)
    assert "image_tower/position_embedding" not in checkpoints.saved_params(str(saved), 6)
    assert load(saved, large)[1] == []


def test_only_what_is_declared_is_resized(saved, make_trainer):
    longer = make_trainer(length=16)
    one_line_error(
        lambda: load(saved, longer, ()),
        "text_tower/position_embedding is (8, 16) there and (16, 16) here", "a different model",
    )  # fmt: skip
    wider = make_trainer(text={"width": 32})
    one_line_error(lambda: load(saved, wider), "a different model", "20 parameters differ")


def test_a_new_stage_begins_with_a_fresh_optimizer(saved, state, trainer):
    params, _ = load(saved, trainer, ())
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
