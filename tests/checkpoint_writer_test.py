import os
import shutil
import subprocess
import sys
import threading

import experiments
import numpy as np
import pytest
from saved_runs import DATA, abstract, assert_same, one_line_error, restore, small_state

from clipa_t5x import checkpoint_manifest, checkpoint_writer, checkpoints, evaluation_records


def open_run(model_dir, **cfg):
    return checkpoints.Checkpointer(str(model_dir), checkpoints.SaveCheckpointConfig(**cfg))


def names(model_dir):
    return sorted(path.name for path in model_dir.iterdir())


# What fails a save.


def a_file_in_the_way(model_dir, step):
    """As root, nothing is forbidden by permissions."""
    (model_dir / f"checkpoint_{step}").touch()
    return "File exists"


def no_manifest(model_dir, step, monkeypatch):
    rename = os.replace

    def full(source, target, **kwargs):
        if os.path.basename(target) == checkpoint_manifest.FILE:
            raise OSError(28, "No space left on device")
        return rename(source, target, **kwargs)

    monkeypatch.setattr(os, "replace", full)
    return "No space left on device"


def unremovable(model_dir, step, monkeypatch):
    def stuck(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "rmdir", stuck)
    return "Input/output error"


@pytest.mark.parametrize("then", ["close", "save", "restore"])
def test_a_failed_save_fails_the_run(tmp_path, then):
    checkpointer = open_run(tmp_path)
    cause = a_file_in_the_way(tmp_path, 3)
    state = small_state()
    checkpointer.save(3, state, DATA)
    calls = {
        "close": checkpointer.close,
        "save": lambda: checkpointer.save(4, state, DATA),
        "restore": lambda: checkpointer.restore(abstract(state)),
    }
    message = one_line_error(calls[then], tmp_path / "checkpoint_3", cause, "MAX_FAILED_SAVES")
    assert message.startswith("saving ")
    assert checkpoints.all_steps(str(tmp_path)) == []


def test_a_failed_manifest_is_a_failed_save(tmp_path, monkeypatch):
    checkpointer = open_run(tmp_path, keep=1)
    checkpointer.save(1, small_state(), DATA)
    checkpointer.restore(abstract(small_state()))
    cause = no_manifest(tmp_path, 2, monkeypatch)
    checkpointer.save(2, small_state(), DATA)
    one_line_error(checkpointer.close, "checkpoint_2", cause)
    monkeypatch.undo()
    # What was to be replaced is not removed before its successor counts.
    assert checkpoints.all_steps(str(tmp_path)) == [1]
    open_run(tmp_path).close()
    assert names(tmp_path) == ["checkpoint_1"]


def test_a_failed_removal_is_told_and_fails_no_save(tmp_path, monkeypatch, caplog):
    checkpointer = open_run(tmp_path, keep=1)
    checkpointer.save(1, small_state(), DATA)
    checkpointer.restore(abstract(small_state()))
    cause = unremovable(tmp_path, 2, monkeypatch)
    checkpointer.save(2, small_state(seed=2), DATA)
    checkpointer.wait()
    assert f"cannot be removed: {cause}" in caplog.text
    monkeypatch.undo()
    checkpointer.close()
    # The new one counts, and the old one is gone with the next save or start.
    assert_same(restore(tmp_path, abstract(small_state()))[0], small_state(seed=2))
    assert names(tmp_path) == ["checkpoint_2"]


def test_some_may_fail(tmp_path, caplog):
    """Each is told, nothing is left of it, and its step can be saved later."""
    checkpointer = open_run(tmp_path, max_failed_saves=2)
    for step in (1, 2, 3):
        if step != 1:
            a_file_in_the_way(tmp_path, step)
        checkpointer.save(step, small_state(), DATA)
    checkpointer.save(4, small_state(), DATA)
    (tmp_path / "checkpoint_2").unlink()
    checkpointer.save(2, small_state(seed=2, step=2), DATA)
    checkpointer.close()
    assert checkpoints.all_steps(str(tmp_path)) == [1, 2, 4]
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert ["checkpoint_2" in errors[0], "checkpoint_3" in errors[1]] == [True, True]
    assert "1 of 2" in errors[0] and "2 of 2" in errors[1] and len(errors) == 2


@pytest.mark.parametrize(
    ("saved", "step", "waits"), [([], 3, True), ([], 2, False), ([1], 3, False)]
)
def test_training_waits_where_a_kill_would_cost_too_much(tmp_path, monkeypatch, saved, step, waits):
    """At most three steps after the newest that counts: before a fourth the save has ended."""
    checkpointer = open_run(tmp_path, period=1, max_unsaved_steps=3)
    for whole in saved:
        checkpointer.save(whole, small_state(), DATA)
        checkpointer.wait()
    may_end, write = threading.Event(), checkpoint_manifest.write

    def write_slowly(*args):
        may_end.wait(60)
        return write(*args)

    monkeypatch.setattr(checkpoint_manifest, "write", write_slowly)
    checkpointer.save(2, small_state(), DATA)
    release = threading.Timer(0.2, may_end.set)
    release.start()
    checkpointer.limit_unsaved(step)
    assert may_end.is_set() == waits
    assert checkpoints.all_steps(str(tmp_path)) == [*saved, 2][: len(saved) + waits]
    checkpointer.close()
    release.join()


def test_no_more_may_fail_than_are_allowed(tmp_path):
    checkpointer = open_run(tmp_path, max_failed_saves=1)
    for step in (1, 2):
        a_file_in_the_way(tmp_path, step)
        checkpointer.save(step, small_state(), DATA)
    one_line_error(lambda: checkpointer.save(3, small_state(), DATA), "checkpoint_2", "File exists")


def test_the_last_save_must_not_fail(tmp_path):
    checkpointer = open_run(tmp_path, max_failed_saves=9)
    a_file_in_the_way(tmp_path, 1)
    checkpointer.save(1, small_state(), DATA)
    one_line_error(checkpointer.close, "checkpoint_1", "File exists", "all but the last")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(mount)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk(small_disk, caplog):
    """The failed save makes room for the next one again."""
    checkpointer = open_run(small_disk, max_failed_saves=1)
    checkpointer.save(1, small_state(), DATA)
    large = small_state()
    values = np.random.default_rng(0).normal(size=(1000, 700)).astype(np.float32)
    checkpointer.save(2, large.replace(params={"kernel": values}), DATA)
    checkpointer.save(3, small_state(), DATA)
    with pytest.raises(checkpoints.UserError, match="checkpoint_4 failed: No space left on device"):
        checkpointer.save(4, large.replace(params={"kernel": values}), DATA)
        checkpointer.close()
    assert "checkpoint_2 failed: No space left on device" in caplog.text
    assert checkpoints.all_steps(str(small_disk)) == [1, 3]
    assert shutil.disk_usage(small_disk).used < 400_000


def test_what_will_not_fit_is_refused(small_disk):
    checkpointer = open_run(small_disk, keep=5, period=10)
    large = abstract(small_state()).replace(
        params={"kernel": checkpoints.jax.ShapeDtypeStruct((100_000,), np.float32)}
    )
    checkpointer.check_space(large, 0, 30)  # three, of 400 kB each
    one_line_error(
        lambda: checkpointer.check_space(large, 0, 1000),
        "0.0024 GB", "0.0004 GB each", "6 at once", "0.0021 GB left", small_disk,
        "KEEP_CHECKPOINTS", "CHECKPOINT_PERIOD", "MODEL_DIR",
    )  # fmt: skip
    checkpointer.check_space(large, 995, 1000)
    one_line_error(lambda: open_run(small_disk, keep=None, period=10).check_space(large, 0, 1000),
                   "100 at once")  # fmt: skip


# What is kept.


def save_evaluated(model_dir, metrics, **cfg):
    checkpointer = open_run(model_dir, **cfg)
    for step, values in metrics.items():
        checkpointer.save(step, small_state(), DATA, values)
    checkpointer.close()
    return checkpoints.all_steps(str(model_dir))


def test_the_best_are_kept(tmp_path):
    name = "inference_eval/digit/accuracy"
    metrics = {1: {name: 0.2}, 2: {name: 0.9}, 3: {}, 4: {name: 0.5}, 5: {name: float("nan")}}
    rules = {"keep": 1, "keep_best": 1, "best_metric": name}
    assert save_evaluated(tmp_path, metrics, **rules) == [2, 5]
    # Another start knows them from the disk.
    assert save_evaluated(tmp_path, {6: {name: 0.8}, 7: {}}, **rules) == [2, 7]
    assert save_evaluated(tmp_path, {8: {name: 0.1}}, **rules, best_mode="min") == [8]


def test_the_best_may_be_found_by_another_process(tmp_path):
    name = "inference_eval/digit/accuracy"
    rules = {"keep": 1, "keep_best": 1, "best_metric": name}
    (tmp_path / evaluation_records.FOLDER).mkdir()
    for step, value in ((1, 0.2), (2, 0.9), (3, float("nan"))):
        results = {"inference_eval/digit": {"accuracy": value}}
        record = evaluation_records.Evaluation(step, 0.0, results)
        (tmp_path / evaluation_records.file_name(step)).write_text(record.to_json())
    (tmp_path / evaluation_records.file_name(4)).write_text("{")
    assert save_evaluated(tmp_path, {1: {}, 2: {}, 3: {}, 4: {}, 5: {}}, **rules) == [2, 5]


def test_a_metric_that_nobody_gives_is_told_once(tmp_path, caplog):
    metrics = {1: {}, 2: {"a/loss": 1.0, "a/accuracy": 0.5}, 3: {"a/loss": 2.0}}
    rules = {"keep": 1, "keep_best": 1, "best_metric": "a/acuracy", "keep_period": 2}
    assert save_evaluated(tmp_path, metrics, **rules) == [2, 3]
    (warning,) = [r.getMessage() for r in caplog.records if "BEST_METRIC" in r.getMessage()]
    assert "a/acuracy" in warning and "a/accuracy, a/loss" in warning


def test_causes_are_short():
    error = ValueError("RESOURCE_EXHAUSTED: Error writing \"x\" [os_error_code='28']")
    assert checkpoint_writer.cause(error) == "No space left on device"
    assert checkpoint_writer.cause(OSError(30, "Read-only file system", "f")) == (
        "Read-only file system (f)"
    )
    assert checkpoint_writer.cause(KeyError()) == "KeyError"
    assert checkpoint_writer.cause(RuntimeError("one\ntwo")) == "RuntimeError: one"


# Several processes.


# Process 1 alone cannot write for a while, as on a node with a bad disk.
SAVING = """
import json, pathlib, resource, signal, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from clipa_t5x import agreement, checkpoints, train_state

model_dir, allowed, address, count, index = sys.argv[1], int(sys.argv[2]), *(
    a.partition("=")[2] for a in sys.argv[3:]
)
jax.distributed.initialize(address, int(count), int(index))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
mesh = Mesh(np.array(jax.devices()), ("data",))
rows, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
whole = np.random.default_rng(0).normal(size=(8, 20_000)).astype(np.float32)

def put(values, sharding):
    return jax.make_array_from_callback(values.shape, sharding, lambda i: values[i])

def state(step):
    return train_state.TrainState(
        step=put(np.int32(step), replicated),
        params={"kernel": put(whole * step, rows)},
        opt_state={},
        rng=put(np.zeros(2, np.uint32), replicated),
    )

def limit_files(size):
    if jax.process_index() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(1)
)
run = checkpoints.Checkpointer(
    model_dir, checkpoints.SaveCheckpointConfig(keep=2, max_failed_saves=allowed)
)
assert run.restore(abstract) is None
run.save(1, state(1), {"next": 1})
run.wait()
limit_files(10_000)
run.save(2, state(2), {"next": 2})
failure = ""
try:
    run.wait()
except checkpoints.UserError as error:
    failure = str(error)
limit_files(resource.RLIM_INFINITY)
# Both know, in the same words.
assert agreement.agree("failures", failure, json.dumps) == json.dumps([failure, failure])
assert ("File too large" in failure) == (allowed == 0), failure
for step in (3, 4):
    run.save(step, state(step), {"next": step})
run.wait()
assert checkpoints.all_steps(model_dir) == [3, 4]

def damage():
    files = [p for p in pathlib.Path(model_dir, "checkpoint_4").rglob("d/*") if p.is_file()]
    path = max(files, key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    return ""

agreement.same_for_all("damaged", damage)
restored = run.restore(abstract)
assert restored.step == 3 and restored.data_state == {"next": 3}
for shard in restored.state.params["kernel"].addressable_shards:
    np.testing.assert_array_equal(shard.data, 3 * whole[shard.index])
run.save(4, state(4), {"next": 4})
run.close()
assert checkpoints.locate(model_dir) == (model_dir, 4)
"""


@pytest.mark.parametrize("allowed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_save_and_fail_together(tmp_path, allowed):
    model_dir = tmp_path / "run"
    script = [sys.executable, "-c", SAVING, str(model_dir), str(allowed)]
    errors = experiments.run_processes(script, str(tmp_path), 2, num_devices=2)
    assert [name.partition("-")[0] for name in names(model_dir)] == [
        "checkpoint_3", "checkpoint_4", "checkpoint_4.damaged",
    ]  # fmt: skip
    assert "crc32c" in errors[0] and "checkpoint_3 is used instead" in errors[0]
    manifest = checkpoint_manifest.read(checkpoints.folder_of(str(model_dir), 4))
    assert manifest["process_count"] == 2 and manifest["mesh"] == {"data": 4}


# Kills.


SAVING_ON = """
import sys
import threading
import jax, jax.numpy as jnp
from clipa_t5x import checkpoints, train_state

model_dir = sys.argv[1]
abstract = jax.eval_shape(lambda: {"kernel": jnp.zeros((300, 1000))})

def state(step):
    params = {"kernel": jnp.full((300, 1000), step, jnp.float32)}
    return train_state.TrainState(jnp.int32(step), params, {}, jnp.zeros(2, jnp.uint32))

def struct(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

run = checkpoints.Checkpointer(model_dir, checkpoints.SaveCheckpointConfig(keep=2))
restored = run.restore(jax.tree.map(struct, state(0)))
step = restored.step if restored else 0
if restored:
    assert (restored.state.params["kernel"] == step).all()
while True:
    step += 1
    run.save(step, state(step), {})
    print(step - 1, flush=True)  # What is printed is saved.
"""


def kill_saving_runs(model_dir, count):
    """Kills `count` of them in their saves; each must go on where the one before was."""
    rng = np.random.default_rng(0)
    saved = 0
    for _ in range(count):
        command = [sys.executable, "-c", SAVING_ON, str(model_dir)]
        environment = experiments.environment(1)
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            first = int(run.stdout.readline())
            assert first >= saved
            for _ in range(rng.integers(1, 4)):
                saved = int(run.stdout.readline())
            try:
                run.wait(timeout=rng.uniform(0, 0.1))
            except subprocess.TimeoutExpired:
                run.kill()
            saved = max([saved, *map(int, run.stdout.read().split())])
        steps = checkpoints.all_steps(str(model_dir))
        assert steps[-1] >= saved
        for step in steps:
            checkpoint_manifest.check(checkpoints.folder_of(str(model_dir), step), step)


def test_saves_that_are_killed(tmp_path):
    kill_saving_runs(tmp_path, 2)


@pytest.mark.slow
def test_fifty_saves_that_are_killed(tmp_path):
    kill_saving_runs(tmp_path, 50)
