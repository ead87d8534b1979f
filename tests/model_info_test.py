import json
import pathlib
import re

import jax
import numpy as np
import pytest

from clipa_t5x import model_info, optimizers, partitioning, run_tables, schedules, trainer

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "model_info_tiny.txt"
FSDP = partitioning.standard_logical_axis_rules(1, 2)


@pytest.fixture(scope="module")
def describe(tiny_model, tiny_batch):
    """Returns a function from a mesh's shape to (the description, the trainer)."""

    def make(**mesh_shape):
        partitioner = partitioning.PjitPartitioner(logical_axis_rules=FSDP)
        batch_spec = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tiny_batch(16).items()
        }
        mesh = partitioner.abstract_mesh(mesh_shape)
        subject = trainer.Trainer(
            model=tiny_model(),
            optimizer=optimizers.adamw(schedules.warmup_cosine(1e-3, 10), mu_dtype="bfloat16"),
            partitioner=partitioner,
            batch_spec=batch_spec,
            mesh=mesh,
        )
        axes = partitioner.logical_axes(subject.boxed_params)
        text = model_info.describe(subject.abstract_state, axes, batch_spec, partitioner, mesh)
        return text, subject

    return make


def _rows(text):
    """Cells of the table of parameters: name, shape, logical axes, mesh axes, bytes."""
    table = text.split("\n\n")[1].splitlines()[1:]
    return [re.split(r"  +", line) for line in table]


def test_every_parameter_has_its_row(describe):
    text, subject = describe(data=1)
    params = {
        optimizers.path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(subject.abstract_state.params)
    }
    shapes = {row[0]: row[1] for row in _rows(text)}
    assert shapes == {
        name: " x ".join(map(str, leaf.shape)) or "scalar" for name, leaf in params.items()
    }


def test_rows_name_their_own_axes(describe):
    rows = {row[0]: row[2:] for row in _rows(describe(data=2, model=2)[0])}
    layers = "image_tower/encoder/layers"
    assert rows[f"{layers}/mlp/fc1/kernel"] == [
        "layers, embed, mlp",
        "-, data, model",
        f"{2 * 16 * 32 * 4:,}",
    ]
    assert rows[f"{layers}/mlp/fc1/bias"] == ["layers, mlp", "-, model", f"{2 * 32 * 4:,}"]
    assert rows["text_tower/token_embedding/embedding"][:2] == ["vocab, embed", "model, data"]
    assert rows["logit_scale"] == ["-", "-", "4"]


@pytest.mark.parametrize("mesh", [{"data": 1}, {"data": 4, "model": 2}], ids=str)
def test_bytes_add_up(describe, mesh):
    text, subject = describe(**mesh)
    total = sum(int(row[-1].replace(",", "")) for row in _rows(text))
    params = jax.tree.leaves(subject.abstract_state.params)
    count = sum(int(np.prod(x.shape)) for x in params)
    assert model_info.num_params(subject.abstract_state.params) == count
    assert f"parameters: {count:,}\n" in text
    assert f"parameters per device: {model_info.format_bytes(total)}\n" in text
    if mesh == {"data": 1}:
        assert total == 4 * count
        # Bytes of parameter and moments; then step, two counts of it, and two words of key.
        state = (4 + 2 + 4) * count + 4 * (1 + 2 + 2)
        assert f"optimizer, step): {model_info.format_bytes(state)}\n" in text
    else:
        by_hand = sum(int(np.prod(x.sharding.shard_shape(x.shape))) * 4 for x in params)
        assert total == by_hand < 4 * count


def test_the_record_of_shardings_reads_back(describe):
    text, subject = describe(data=2, model=2)
    record = model_info.sharding_record(subject.abstract_state.params, subject.mesh)
    found = run_tables.sharding(json.loads(json.dumps(record)))
    assert found.mesh == "replica=1, data=2, model=2"
    expected = [[row[0], row[1], row[3], row[4]] for row in _rows(text)]
    assert expected == [
        [row.name, row.shape, row.sharding or "-", f"{row.bytes_per_device:,}"]
        for row in found.parameters
    ]
    assert {row.dtype for row in found.parameters} == {"float32"}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536 * 1024, "1.50 MiB"),
        (10 * 2**30, "10.00 GiB"),
        (5000 * 2**40, "5000.00 TiB"),
    ],
)
def test_format_bytes(count, text):
    assert model_info.format_bytes(count) == text


def test_the_description_reads_as_before(describe, request):
    text, _ = describe(replica=2, data=2, model=2)
    if request.config.getoption("--update_goldens"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "run pytest --update_goldens and review the difference"
