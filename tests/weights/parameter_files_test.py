import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trap_weights
from safetensors import numpy as safetensors_numpy

from clipa_t5x import checkpoints
from clipa_t5x.errors import UserError
from clipa_t5x.weights import exporting, layouts, parameter_files

SHARDED = jax.sharding.PartitionSpec("data")


@pytest.fixture(scope="module")
def params(tiny_model, tiny_batch, random_params):
    return random_params(tiny_model(), tiny_batch(2))


def request(params):
    """Shapes of parameters, split over all devices by the first dimension that divides."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))

    def leaf(x):
        split = x.ndim and x.shape[0] % len(jax.devices()) == 0
        spec = SHARDED if split else jax.sharding.PartitionSpec()
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, params)


def save(path, arrays):
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        safetensors_numpy.save_file(arrays, path)
    return str(path)


@pytest.mark.parametrize("prefix", ["", "params/"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_parameters_come_back_sharded(tmp_path, params, suffix, prefix):
    flat = checkpoints.flatten(params)
    arrays = {f"{prefix}{name}": array for name, array in flat.items()}
    if prefix:
        arrays["opt_state/count"] = np.int32(3)
    path = save(tmp_path / f"weights{suffix}", arrays)
    wanted = request(params)
    with parameter_files.open_parameters(path, flat) as file:
        checkpoints.check_same_parameters(file.saved, flat, path, "")
        restored = file.restore(wanted)
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    for array, leaf in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert array.sharding.is_equivalent_to(leaf.sharding, array.ndim)
        assert array.dtype == leaf.dtype
    assert any(not array.is_fully_replicated for array in jax.tree.leaves(restored))


def test_a_state_dict_of_several_devices_training_is_the_model_s(tmp_path, tiny_model):
    model = tiny_model()
    flat = trap_weights.make(model, 16, 8)
    tables = exporting.fixed_tables(model, 16, 8)
    shapes = layouts.unstacked({name: x.shape for name, x in flat.items()})
    tensors = layouts.open_clip({**shapes, **{name: x.shape for name, x in tables.items()}})
    whole = {name: x.shape for name, x in flat.items()}
    exporting.write(
        str(tmp_path / "w.safetensors"), tensors, flat.__getitem__, whole, tables, "module."
    )
    with parameter_files.open_parameters(str(tmp_path / "w.safetensors"), flat) as file:
        for name, array in flat.items():
            np.testing.assert_array_equal(file.saved[name].read(), array, err_msg=name)
        (source,) = file.sources["logit_scale"]
    assert source == "module.logit_scale"


@pytest.mark.parametrize("prefix", ["", "params/"])
def test_the_part_of_a_file_that_has_parameters_is_named(tmp_path, params, prefix):
    flat = checkpoints.flatten(params)
    path = save(tmp_path / "w.npz", {f"run/ema/{prefix}{n}": x for n, x in flat.items()})
    with (
        pytest.raises(UserError, match=r"under 'run/ema': give .*w\.npz:run/ema\."),
        parameter_files.open_parameters(path, flat),
    ):
        pass
    with parameter_files.open_parameters(f"{path}:run/ema", flat) as file:
        assert file.saved.keys() == flat.keys()


def test_a_file_of_another_model_is_refused_before_it_is_read(tmp_path, params):
    flat = checkpoints.flatten(params)
    arrays = {**flat, "logit_scale": np.zeros((2**16,), np.float32)}
    path = save(tmp_path / "weights.npz", arrays)
    with (
        parameter_files.open_parameters(path, flat) as file,
        pytest.raises(UserError, match=r"logit_scale is \(65536,\) there and \(\) here"),
    ):
        checkpoints.check_same_parameters(file.saved, flat, path, "")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_other_precisions_become_the_parameters(tmp_path, dtype):
    values = np.asarray([[1.0, -0.25], [3.5, 0.0]], dtype)
    path = save(tmp_path / "weights.npz", {"w": values})
    wanted = request({"w": jnp.zeros((2, 2), jnp.float32)})
    with parameter_files.open_parameters(path, wanted) as file:
        restored = file.restore(wanted)
    assert restored["w"].dtype == jnp.float32
    np.testing.assert_array_equal(restored["w"], values.astype(np.float32))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([1.0, np.nan, np.inf], np.float32), "w of .* holds 2 numbers of 3"),
        (np.array([1.0, 2.0, 1e200]), "holds 1 numbers of 3 .* beyond float32"),
        (np.array([1, 2, 3]), "w of .* is of int64"),
    ],
)
def test_what_cannot_be_trained_from_is_refused(tmp_path, values, words):
    path = save(tmp_path / "weights.npz", {"w": values})
    wanted = request({"w": jnp.zeros((3,), jnp.float32)})
    with (
        parameter_files.open_parameters(path, wanted) as file,
        pytest.raises(UserError, match=words),
    ):
        file.restore(wanted)
