import json
import os

import pytest
from etils import epath

from clipa_t5x import checkpoint_folders, checkpoint_manifest


def make(model_dir, step, size=100):
    folder = checkpoint_folders.folder_of(str(model_dir), step)
    checkpoint_folders.begin(folder)
    (folder / "state" / "array").write_bytes(bytes(size))
    (folder / "data" / "metadata").write_text("{}")
    checkpoint_manifest.write(folder, step, {}, {})
    checkpoint_folders.finish(folder)
    return folder


def is_whole(folder):
    step = int(folder.name.partition("_")[2])
    return checkpoint_folders.newest_whole(str(folder.parent), [step])[0] == step


def test_it_counts_from_its_manifest_on(tmp_path):
    folder = checkpoint_folders.folder_of(str(tmp_path), 3)
    checkpoint_folders.begin(folder)
    assert not checkpoint_folders.is_complete(folder)
    assert checkpoint_folders.steps_there(str(tmp_path)) == []
    checkpoint_manifest.write(folder, 3, {}, {})
    assert checkpoint_folders.is_complete(folder)
    assert checkpoint_folders.complete_steps(str(tmp_path)) == [3]
    checkpoint_folders.finish(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config", "data", "manifest.json", "state"]


def test_one_that_counts_is_not_begun_again(tmp_path):
    folder = make(tmp_path, 3)
    with pytest.raises(FileExistsError):
        checkpoint_folders.begin(folder)
    assert is_whole(folder)


class KilledError(BaseException):
    """Nothing may catch it: a process that is killed does nothing more."""


@pytest.fixture
def killed_after(monkeypatch):
    """Returns a function that runs another one up to its nth change of a folder."""
    changes = ("unlink", "remove", "rmdir", "mkdir", "rename", "replace", "utime", "open")

    def run(action, n):
        left = n

        def counted(real):
            def call(*args, **kwargs):
                nonlocal left
                if left == 0:
                    raise KilledError
                left -= 1
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in changes:
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                action()
            except KilledError:
                return True
        return False

    return run


def test_a_removal_that_is_killed_anywhere(tmp_path, killed_after):
    """It leaves the whole checkpoint, or what the next start clears away."""
    n = ends = 0
    while not ends:
        model_dir = tmp_path / str(n)
        model_dir.mkdir()
        older, newer = make(model_dir, 1), make(model_dir, 2)
        ends = not killed_after(lambda gone=older: checkpoint_folders.remove(gone), n)
        for folder in (older, newer):
            assert not checkpoint_folders.is_complete(folder) or is_whole(folder)
        checkpoint_folders.clear_leftovers(str(model_dir))
        there = {path.name for path in model_dir.iterdir()}
        assert there in ({"checkpoint_2"}, {"checkpoint_1", "checkpoint_2"})
        assert all(is_whole(folder) for folder in (older, newer) if folder.exists())
        n += 1
    assert n > 5 and there == {"checkpoint_2"}


def test_a_save_that_is_killed_anywhere(tmp_path, killed_after):
    n = ends = 0
    while not ends:
        model_dir = tmp_path / str(n)
        model_dir.mkdir()
        older = make(model_dir, 1)
        ends = not killed_after(lambda to=model_dir: make(to, 2), n)
        steps = checkpoint_folders.steps_there(str(model_dir))
        whole, _ = checkpoint_folders.newest_whole(str(model_dir), steps)
        assert whole == steps[-1] and is_whole(older)
        checkpoint_folders.clear_leftovers(str(model_dir))
        assert len(list(model_dir.iterdir())) == len(steps)
        n += 1
    assert n > 5 and whole == 2


def test_what_is_cleared(tmp_path):
    make(tmp_path, 1)
    for name in ("checkpoint_2", "checkpoint_3.orbax-checkpoint-tmp-17/state", "train"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "checkpoint_4").mkdir()
    (tmp_path / "checkpoint_4" / "file").touch()  # Not known to be ours.
    (tmp_path / "checkpoint_5").touch()
    checkpoint_folders.clear_leftovers(str(tmp_path))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint_1", "checkpoint_4", "checkpoint_5", "train"]
    assert checkpoint_folders.steps_there(str(tmp_path)) == [1, 4]
    assert checkpoint_folders.complete_steps(str(tmp_path)) == [1]
    checkpoint_folders.clear_leftovers(str(tmp_path / "absent"))


def test_the_newest_whole_one_is_found(tmp_path):
    folders = [make(tmp_path, step) for step in (2, 4, 6, 10)]
    (folders[3] / "state" / "array").unlink()
    (folders[2] / "state" / "array").write_bytes(bytes(99))
    step, damages = checkpoint_folders.newest_whole(str(tmp_path), [2, 4, 6, 10])
    assert step == 4
    assert damages == {
        10: "state/array is missing",
        6: "state/array has 99 bytes instead of 100",
    }
    assert checkpoint_folders.newest_whole(str(tmp_path), []) == (None, {})
    assert checkpoint_folders.newest_whole(str(tmp_path), [6])[0] is None


def test_setting_aside_loses_nothing(tmp_path):
    folder = make(tmp_path, 2)
    became = checkpoint_folders.set_aside(folder)
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith("checkpoint_2.damaged-") and aside.name in became
    assert (aside / "state" / "array").read_bytes() == bytes(100)
    assert checkpoint_folders.steps_there(str(tmp_path)) == []


def test_what_orbax_committed_counts_without_a_manifest(tmp_path):
    folder = epath.Path(tmp_path) / "checkpoint_2"
    for item in ("state", "data", "config"):
        (folder / item).mkdir(parents=True)
    commit = folder / "_CHECKPOINT_METADATA"
    for text in ("", "[]", "{}", '{"commit_timestamp_nsecs": null}'):
        commit.write_text(text)
        assert not checkpoint_folders.is_complete(folder)
    commit.write_text(json.dumps({"commit_timestamp_nsecs": 17}))
    assert checkpoint_folders.is_complete(folder) and checkpoint_folders.is_unverifiable(folder)
    checkpoint_folders.empty(folder)
    assert not checkpoint_folders.is_complete(folder)
    assert [path.name for path in folder.iterdir()] == ["UNFINISHED"]
