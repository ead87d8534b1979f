import json
import os

import numpy as np
import pytest
from etils import epath

from clipa_t5x import checkpoint_manifest, version
from clipa_t5x.checkpoint_manifest import DamageError

MESH = {"data": 4, "model": 2}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of step 8 as far as a manifest can tell: three files of random bytes."""
    rng = np.random.default_rng(0)
    folder = epath.Path(tmp_path) / "checkpoint_8"
    for name, size in (("state/d/0a", 5000), ("state/m", 300), ("data/metadata", 40)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.bytes(size))
    (folder / "data" / "empty").touch()
    (folder / "UNFINISHED").touch()
    checkpoint_manifest.write(folder, 8, {"accuracy": 0.1 + 0.2, "loss": np.float32(2)}, MESH)
    return folder


def damage(folder, **kwargs):
    with pytest.raises(DamageError) as caught:
        checkpoint_manifest.check(folder, 8, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_it_says(folder):
    checkpoint_manifest.check(folder, 8)
    manifest = checkpoint_manifest.read(folder)
    sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
    assert sizes == {"data/empty": 0, "data/metadata": 40, "state/d/0a": 5000, "state/m": 300}
    assert manifest["step"] == 8 and manifest["mesh"] == MESH
    assert manifest["metrics"] == {"accuracy": 0.1 + 0.2, "loss": 2.0}
    assert manifest["process_count"] == 1
    assert manifest["versions"]["clipa_t5x"] == version.__version__
    assert set(manifest["versions"]) == {"clipa_t5x", "git_commit", "jax", "orbax"}


def test_what_is_no_number_is_left_out(folder):
    checkpoint_manifest.write(folder, 8, {"a": float("nan"), "b": float("inf"), "c": 1.0}, {})
    assert checkpoint_manifest.read(folder)["metrics"] == {"c": 1.0}


def test_the_checksum_is_crc32c(folder):
    """The value that everyone gives for these nine digits."""
    (folder / "state" / "m").write_text("123456789")
    checkpoint_manifest.write(folder, 8, {}, {})
    assert checkpoint_manifest.read(folder)["files"]["state/m"]["crc32c"] == "e3069283"


def test_every_flipped_bit_is_found(folder):
    """The manifest's own bits, too; the file is named."""
    rng = np.random.default_rng(1)
    names = ["state/d/0a", "state/m", "data/metadata", "manifest.json"]
    for i in range(200):
        path = folder / names[i % 4]
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        assert damage(folder).startswith(names[i % 4])
        path.write_bytes(whole)
    checkpoint_manifest.check(folder, 8)


def test_every_other_length_is_found(folder):
    rng = np.random.default_rng(2)
    names = ["state/d/0a", "state/m", "data/metadata", "manifest.json"]
    for i in range(60):
        path = folder / names[i % 4]
        whole = path.read_bytes()
        size = len(whole)
        changed = whole[: rng.integers(size)] if i % 3 else whole + b" "
        path.write_bytes(changed)
        message = damage(folder)
        assert message.startswith(names[i % 4])
        if names[i % 4] != "manifest.json":
            assert message.endswith(f"has {len(changed)} bytes instead of {size}")
        path.write_bytes(whole)
    (folder / "data" / "empty").write_text("x")
    assert damage(folder) == "data/empty has 1 bytes instead of 0"


def test_what_is_missing_is_named(folder):
    (folder / "state" / "m").unlink()
    assert damage(folder) == "state/m is missing"
    (folder / "manifest.json").unlink()
    assert damage(folder) == "manifest.json is missing"


def test_a_folder_of_another_step_is_refused(folder):
    with pytest.raises(DamageError, match="manifest.json is of step 8, not 9"):
        checkpoint_manifest.check(folder, 9)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"crc32c": "00000000"}', "{", "\x00" * 9]
)
def test_what_is_no_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    assert damage(folder).startswith("manifest.json ")


def test_a_manifest_of_another_hand_is_refused(folder):
    """One who changes a size must change the checksum: this is against accidents, not attackers."""
    body = json.loads((folder / "manifest.json").read_text())
    body["files"]["state/m"]["size"] = 7
    (folder / "manifest.json").write_text(json.dumps(body, indent=1) + "\n")
    assert damage(folder) == "manifest.json has another checksum than it says"


def test_each_file_is_one_processes_work(folder):
    for name in ("state/d/0a", "state/m", "data/metadata"):
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[::-1])
        found = []
        for part in range(3):
            try:
                checkpoint_manifest.check(folder, 8, part, 3)
            except DamageError as error:
                found.append(str(error))
        assert len(found) == 1 and found[0].startswith(f"{name} has crc32c")
        path.write_bytes(whole)


def resealed(folder, change):
    """Writes a manifest anew, with a checksum that fits."""
    body = checkpoint_manifest.read(folder)
    change(body)
    (folder / checkpoint_manifest.FILE).write_text(checkpoint_manifest._text(body))


@pytest.mark.parametrize("change", [
    lambda body: body.pop("step"),
    lambda body: body.pop("files"),
    lambda body: body.update(files=[]),
    lambda body: body.update(metrics=None),
    lambda body: next(iter(body["files"].values())).pop("size"),
    lambda body: body["files"].update({"../elsewhere": {"size": 1, "crc32c": "0"}}),
    lambda body: body["files"].popitem(),
    lambda body: body["files"].clear(),
])  # fmt: skip
def test_a_manifest_that_does_not_say_all_is_damage(folder, change):
    resealed(folder, change)
    with pytest.raises(checkpoint_manifest.DamageError, match="manifest.json|missing"):
        checkpoint_manifest.check(folder, 6)


@pytest.mark.parametrize("kind", ["pipe", "device", "elsewhere"])
def test_what_is_no_plain_file_is_not_read(folder, kind):
    path = folder / "data" / "empty"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        os.symlink("/dev/zero", path)
    else:
        resealed(
            folder,
            lambda body: body["files"].update({"/dev/zero": body["files"].pop("data/empty")}),
        )
    with pytest.raises(DamageError, match="data/empty is no plain file|/dev/zero is missing"):
        checkpoint_manifest.check(folder, 8)
