import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
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

from clipa_t5x import checkpoint_manifest, checkpoints, optimizers, schedules, train_state


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


# What is not whole.


def test_a_killed_save_is_not_a_checkpoint(tmp_path):
    """Neither those of this version nor those of versions that renamed what was finished."""
    state = small_state()
    save(tmp_path, state, 4)
    killed = ["checkpoint_8.orbax-checkpoint-tmp-1700000000", "checkpoint_10"]
    for name in killed:
        shutil.copytree(tmp_path / "checkpoint_4", tmp_path / name)
    (tmp_path / "checkpoint_10" / "manifest.json").unlink()
    (tmp_path / "checkpoint_10" / "UNFINISHED").touch()
    assert checkpoints.locate(str(tmp_path)) == (str(tmp_path), 4)
    assert all((tmp_path / name).exists() for name in killed)
    assert_same(restore(tmp_path, abstract(state))[0], state)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_4"]


def no_manifest(path):
    (path / "manifest.json").unlink()
    return "manifest.json is missing"


def cut_manifest(path):
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text()[:200])
    return "manifest.json is unreadable"


def no_data(path):
    (path / "data" / "metadata").unlink()
    return "data/metadata is missing"


def other_arrays(path):
    array = max((path / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    array.write_bytes(array.read_bytes()[::-1])
    return "has crc32c"


@pytest.mark.parametrize("damage", [no_manifest, cut_manifest, no_data, other_arrays])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, damage):
    older, newer = small_state(), small_state(seed=1)
    save(tmp_path, older, 4)
    save(tmp_path, newer, 8)
    check = damage(tmp_path / "checkpoint_8")
    # A reader leaves it where it is.
    assert checkpoints.locate(str(tmp_path)) == (str(tmp_path), 4)
    assert (tmp_path / "checkpoint_8").exists()
    caplog.clear()
    checkpointer = checkpoints.Checkpointer(str(tmp_path), checkpoints.SaveCheckpointConfig(keep=2))
    restored = checkpointer.restore(abstract(older))
    assert_same(restored.state, older)
    assert restored.step == 4
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    for part in (tmp_path / "checkpoint_8", check, "checkpoint_4 is used instead", ".damaged-"):
        assert str(part) in warning
    # Nothing of a user's is lost, its step can be saved, and it is not counted as kept.
    assert len(list(tmp_path.glob("checkpoint_8.damaged-*"))) == 1
    checkpointer.save(8, newer, DATA)
    checkpointer.close()
    assert checkpoints.all_steps(str(tmp_path)) == [4, 8]
    assert_same(restore(tmp_path, abstract(newer))[0], newer)


def test_a_damaged_checkpoint_in_an_object_store(tmp_path, monkeypatch):
    """Renaming a folder would copy it there: it is marked, and its step is saved in its place."""
    monkeypatch.setattr(checkpoint_manifest, "is_remote", lambda _: True)
    save(tmp_path, small_state(), 4, 8)
    no_data(tmp_path / "checkpoint_8")
    checkpointer = checkpoints.Checkpointer(str(tmp_path), checkpoints.SaveCheckpointConfig())
    assert checkpointer.restore(abstract(small_state())).step == 4
    assert checkpoints.all_steps(str(tmp_path)) == [4]
    newer = small_state(seed=1)
    checkpointer.save(8, newer, DATA)
    checkpointer.close()
    assert_same(restore(tmp_path, abstract(newer))[0], newer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_4", "checkpoint_8"]


def test_random_damage_is_never_restored(tmp_path):
    """Every file of a real checkpoint, flipped or cut at random places."""
    rng = np.random.default_rng(0)
    older, newer = small_state(), small_state(seed=1)
    save(tmp_path, older, 4)
    save(tmp_path, newer, 8)
    files = sorted(p for p in (tmp_path / "checkpoint_8").rglob("*") if p.stat().st_size)
    files = [path for path in files if path.is_file()]
    for i in range(200):
        path = files[i % len(files)]
        whole = path.read_bytes()
        place = int(rng.integers(len(whole)))
        flipped = bytes([whole[place] ^ (1 << int(rng.integers(8)))])
        path.write_bytes(whole[:place] + (flipped + whole[place + 1 :] if i % 2 else b""))
        assert checkpoints.locate(str(tmp_path)) == (str(tmp_path), 4)
        path.write_bytes(whole)
    assert checkpoints.locate(str(tmp_path)) == (str(tmp_path), 8)


def test_a_damaged_checkpoint_that_is_named_is_refused(tmp_path):
    save(tmp_path, small_state(), 4, 8)
    check = no_data(tmp_path / "checkpoint_8")
    one_line_error(
        lambda: checkpoints.locate(f"{tmp_path}/checkpoint_8"),
        "checkpoint_8 is damaged", check, "checkpoint_4",
    )  # fmt: skip
    assert checkpoints.locate(f"{tmp_path}/checkpoint_4") == (str(tmp_path), 4)


def test_no_run_starts_over_where_all_are_damaged(tmp_path):
    save(tmp_path, small_state(), 4, 8)
    checks = [damage(tmp_path / "checkpoint_8") for damage in (no_data,)]
    no_manifest(tmp_path / "checkpoint_4")
    for _ in range(2):  # What is refused is not set aside: it is refused again.
        one_line_error(
            lambda: restore(tmp_path, abstract(small_state())),
            tmp_path, "of 2", "checkpoint_8", checks[0], "start from scratch",
        )  # fmt: skip
    one_line_error(lambda: checkpoints.locate(str(tmp_path)), "no complete checkpoint")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_4", "checkpoint_8"]


def test_what_tensorstore_says_is_not_swallowed(tmp_path, monkeypatch):
    """A disk that fails between verification and restoring."""
    save(tmp_path, small_state(), 4)
    restore_state = ocp.PyTreeCheckpointHandler.restore

    def failing(self, directory, **kwargs):
        for arrays in list((tmp_path / "checkpoint_4" / "state").rglob("d")):
            shutil.rmtree(arrays)
        return restore_state(self, directory, **kwargs)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", failing)
    with pytest.raises(ValueError, match="NOT_FOUND|DATA_LOSS"):
        restore(tmp_path, abstract(small_state()))


def save_as_before(model_dir, state, step):
    """As versions without manifests did."""
    manager = ocp.CheckpointManager(
        model_dir,
        options=ocp.CheckpointManagerOptions(step_prefix="checkpoint"),
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        },
    )
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state.as_tree()),
            data=ocp.args.JsonSave(DATA),
            config=ocp.args.JsonSave({"gin": ""}),
        ),
    )
    manager.close()


def test_checkpoints_without_manifests_go_on(tmp_path, state, trainer, caplog):
    save_as_before(tmp_path, state, 6)
    assert checkpoints.locate(f"{tmp_path}/checkpoint_6") == (str(tmp_path), 6)
    caplog.clear()
    checkpointer = checkpoints.Checkpointer(str(tmp_path), checkpoints.SaveCheckpointConfig(keep=1))
    restored = checkpointer.restore(trainer.abstract_state)
    assert_same(restored.state, state)
    assert (restored.data_state, restored.step) == (DATA, 6)
    assert "checkpoint_6 has no manifest: its files cannot be verified" in caplog.text
    checkpointer.save(8, state, DATA)
    checkpointer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_8"]


def test_orbax_alone_reads_a_checkpoint(saved, state):
    """No tool of ours is needed for what is in it."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(saved / "checkpoint_6" / "state")
    for name, value in checkpoints.flatten(tree["params"]).items():
        np.testing.assert_array_equal(value, checkpoints.flatten(state.params)[name])


def test_going_back(tmp_path):
    """Waits for the save that is under way; what is damaged can be saved anew."""
    checkpointer = checkpoints.Checkpointer(str(tmp_path), checkpoints.SaveCheckpointConfig())
    states = {step: small_state(seed=step, step=step) for step in (2, 4, 6)}
    for step, state in states.items():
        checkpointer.save(step, state, {"next": step})
    restored = checkpointer.restore(abstract(states[2]))
    assert restored.step == 6 and restored.data_state == {"next": 6}
    (tmp_path / "checkpoint_6" / "config" / "metadata").write_text("other")
    restored = checkpointer.restore(abstract(states[2]))
    assert_same(restored.state, states[4])
    assert len(list(tmp_path.glob("checkpoint_6.damaged-*"))) == 1
    checkpointer.save(6, states[2], {"next": 60})
    assert checkpointer.restore(abstract(states[2])).data_state == {"next": 60}
    checkpointer.close()
    assert checkpoints.all_steps(str(tmp_path)) == [2, 4, 6]


def test_nothing_but_checkpoints_is_cleared(tmp_path):
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
    assert not (tmp_path / "checkpoint_2").exists()


def test_a_model_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    one_line_error(
        lambda: save(tmp_path / "file" / "run", small_state(), 1),
        "file/run cannot be written", "Not a directory",
    )  # fmt: skip


@pytest.mark.parametrize(
    "cfg, parts",
    [
        ({"period": 0}, ["CHECKPOINT_PERIOD is 0"]),
        ({"keep": 1.5}, ["KEEP_CHECKPOINTS is 1.5"]),
        ({"keep_period": 0}, ["KEEP_CHECKPOINT_PERIOD is 0"]),
        ({"keep_best": -1}, ["KEEP_BEST_CHECKPOINTS is -1"]),
        ({"max_failed_saves": None}, ["MAX_FAILED_SAVES is None"]),
        ({"max_unsaved_steps": 0}, ["MAX_UNSAVED_STEPS is 0"]),
        ({"max_unsaved_steps": 9}, ["MAX_UNSAVED_STEPS is 9", "CHECKPOINT_PERIOD = None"]),
        ({"max_unsaved_steps": 9, "period": 10}, ["MAX_UNSAVED_STEPS is 9", "PERIOD = 10"]),
        ({"best_mode": "mx"}, ["BEST_MODE is 'mx'", "'max' or 'min'"]),
        ({"keep_best": 2}, ["KEEP_BEST_CHECKPOINTS is 2", "BEST_METRIC is not set"]),
    ],
)
def test_what_cannot_be_saved_by(cfg, parts):
    one_line_error(checkpoints.SaveCheckpointConfig(**cfg).check, *parts)
    checkpoints.SaveCheckpointConfig(keep=None, keep_best=1, best_metric="a").check()
    checkpoints.SaveCheckpointConfig(period=10, max_unsaved_steps=10).check()


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


def test_what_the_storage_does_not_give_is_not_passed_over(tmp_path, monkeypatch):
    """It may be whole: the run is refused, and the checkpoint stays as it is."""
    monkeypatch.setattr(checkpoint_manifest, "_PAUSE_SECONDS", 0.0)
    save(tmp_path, small_state(), 2, 4)
    path = tmp_path / "checkpoint_4" / "data" / "metadata"
    path.rename(tmp_path / "kept")
    path.symlink_to("/proc/self/mem")  # Reading it is an input/output error.
    one_line_error(
        lambda: restore(tmp_path, abstract(small_state())),
        "checkpoint_4", "data/metadata cannot be read (Input/output error)", "Mend the storage",
    )  # fmt: skip
    path.unlink()
    (tmp_path / "kept").rename(path)
    assert restore(tmp_path, abstract(small_state())).step == 4


def test_readers_tell_of_a_checkpoint_without_a_manifest(tmp_path, caplog):
    save(tmp_path, small_state(), 2, 4)
    (tmp_path / "checkpoint_4" / "manifest.json").unlink()
    assert checkpoints.locate(str(tmp_path)) == (str(tmp_path), 2)
    assert "checkpoint_2 is used instead: manifest.json is missing" in caplog.text
    one_line_error(
        lambda: checkpoints.locate(f"{tmp_path}/checkpoint_4"), "manifest.json is missing"
    )


def test_parts_of_an_optimizer_without_arrays_are_told_of(tmp_path, make_trainer):
    schedule = schedules.warmup_cosine(1e-3, 10)
    clamped = make_trainer(optimizer=optimizers.adamw(schedule, max_logit_scale=100.0))
    free = make_trainer(optimizer=optimizers.adamw(schedule))
    save(tmp_path, filled(clamped), 6)
    one_line_error(
        lambda: restore(tmp_path, free.abstract_state),
        "checkpoint_6", "another optimizer's state", "MAX_LOGIT_SCALE",
    )  # fmt: skip


def test_a_checkpoint_that_cannot_be_removed_fails_no_save(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    save(tmp_path / "run", small_state(), 2)
    (tmp_path / "run" / "checkpoint_2").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoint_2").symlink_to(tmp_path / "elsewhere")
    save(tmp_path / "run", small_state(), 4, 6, keep=1)
    assert "cannot be removed" in caplog.text
    assert checkpoints.locate(f"{tmp_path}/run/checkpoint_6")[1] == 6


def test_numbers_are_written_in_one_way(tmp_path):
    save(tmp_path, small_state(), 2)
    (tmp_path / "checkpoint_2").rename(tmp_path / "checkpoint_0002")
    assert restore(tmp_path, abstract(small_state())) is None
