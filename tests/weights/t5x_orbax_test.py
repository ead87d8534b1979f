"""Checkpoints laid out as T5X lays them out by orbax, whose contents are known."""

import json

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from saved_runs import one_line_error

from clipa_t5x.weights import array_sources, t5x_orbax

PARAMS = {"image_tower": {"head": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}},
          "logit_scale": np.float32(2.5)}  # fmt: skip


def write(folder, params=PARAMS, **others):
    """A checkpoint_<step> folder."""
    tree = {"target": params, "state": {"step": np.int32(3)}, **others}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True)
    ocp.Checkpointer(handler).save((folder / "state").absolute(), tree)
    return folder


@pytest.fixture
def run(tmp_path):
    newest = {**PARAMS, "logit_scale": np.float32(7.5)}
    write(tmp_path / "checkpoint_9", newest)
    write(tmp_path / "checkpoint_5")
    (tmp_path / "checkpoint_10.orbax-checkpoint-tmp").mkdir()
    return tmp_path


@pytest.mark.parametrize(("name", "scale"), [("checkpoint_5", 2.5), ("", 7.5)])
def test_parameters_are_read_by_name(run, name, scale):
    path = str(run / name)
    assert array_sources.is_source(path)
    with array_sources.open_source(path) as arrays:
        assert sorted(arrays) == ["image_tower/head/kernel", "logit_scale"]
        kernel = arrays["image_tower/head/kernel"]
        assert (kernel.shape, kernel.dtype) == ((2, 3), np.float32)
        np.testing.assert_array_equal(kernel.read(), PARAMS["image_tower"]["head"]["kernel"])
        assert arrays["logit_scale"].read() == np.float32(scale)


@pytest.mark.parametrize(("name", "step"), [("checkpoint_5/", 5), ("", 9), ("nowhere", 0)])
def test_the_step_is_the_folders(run, name, step):
    assert t5x_orbax.step(str(run / name)) == step


def test_bfloat16_stays_so(tmp_path):
    write(tmp_path / "checkpoint_1", {"a": np.asarray(jnp.ones(3, jnp.bfloat16))})
    with t5x_orbax.open_checkpoint(str(tmp_path)) as arrays:
        assert arrays["a"].dtype == jnp.bfloat16 and arrays["a"].read().dtype == jnp.bfloat16


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"tree_metadata": [1]}', "[" * 100_000])
def test_a_tree_that_is_none_is_no_checkpoint(run, text):
    (run / "checkpoint_9" / "state" / "_METADATA").write_text(text)
    assert t5x_orbax.find(str(run / "checkpoint_9")) is None
    one_line_error(
        lambda: t5x_orbax.open_checkpoint(str(run / "checkpoint_9")).__enter__(), "checkpoint_9"
    )


def test_other_folders_are_none(tmp_path):
    assert t5x_orbax.find(str(tmp_path / "nowhere")) is None
    (tmp_path / "checkpoint_1" / "state").mkdir(parents=True)
    tree = {"tree_metadata": {"x": {"key_metadata": [{"key": "params"}]}}}
    (tmp_path / "checkpoint_1" / "state" / "_METADATA").write_text(json.dumps(tree))
    assert t5x_orbax.find(str(tmp_path)) is None


def test_damage_is_told(run):
    data = run / "checkpoint_9" / "state"
    for path in data.rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:-9])

    def read():
        with t5x_orbax.open_checkpoint(str(run)) as arrays:
            for array in arrays.values():
                array.read()

    one_line_error(read, "checkpoint_9")


def test_dtypes_that_weights_have_not_are_refused(tmp_path):
    write(tmp_path / "checkpoint_1", {"a": np.ones(3, np.complex64)})
    one_line_error(lambda: t5x_orbax.open_checkpoint(str(tmp_path)).__enter__(), "complex64")
