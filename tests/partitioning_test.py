import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import spmd
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clipa_t5x import errors, models, partitioning

ROWS = ("replica", "data")
# Logical axes of an array, then its mesh axes under the rules of (activation, parameter) dims.
LAYOUTS = {
    "a batch's features": (
        ("batch",),
        {(1, 1): P(ROWS), (1, 2): P(ROWS), (2, 1): P(ROWS), (2, 2): P(ROWS)},
    ),
    "activations": (
        ("batch", "length", "embed"),
        {
            (1, 1): P(ROWS, None, None),
            (1, 2): P(ROWS, None, None),
            (2, 1): P(ROWS, None, "model"),
            (2, 2): P(ROWS, None, "model"),
        },
    ),
    "hidden activations": (
        ("batch", "length", "mlp"),
        {dims: P(ROWS, None, "model") for dims in [(1, 1), (1, 2), (2, 1), (2, 2)]},
    ),
    "heads of activations": (
        ("batch", "length", "heads", "kv"),
        {dims: P(ROWS, None, "model", None) for dims in [(1, 1), (1, 2), (2, 1), (2, 2)]},
    ),
    "token table": (
        ("vocab", "embed"),
        {
            (1, 1): P("model", None),
            (1, 2): P("model", "data"),
            (2, 1): P("model", None),
            (2, 2): P("model", "data"),
        },
    ),
    "fc1 kernel": (
        ("layers", "embed", "mlp"),
        {
            (1, 1): P(None, None, "model"),
            (1, 2): P(None, "data", "model"),
            (2, 1): P(None, None, "model"),
            (2, 2): P(None, "data", "model"),
        },
    ),
    "query kernel": (
        ("layers", "embed", "heads", "kv"),
        {
            (1, 1): P(None, None, "model", None),
            (1, 2): P(None, "data", "model", None),
            (2, 1): P(None, None, "model", None),
            (2, 2): P(None, "data", "model", None),
        },
    ),
    "norm": (
        ("layers", "embed"),
        {
            (1, 1): P(None, None),
            (1, 2): P(None, "data"),
            (2, 1): P(None, "model"),
            (2, 2): P(None, "model"),
        },
    ),
    "projection": (
        ("embed", "joint_embed"),
        {
            (1, 1): P(None, None),
            (1, 2): P("data", None),
            (2, 1): P("model", None),
            (2, 2): P("model", None),
        },
    ),
}


def _rules(activations=1, parameters=1, additional=()):
    return partitioning.standard_logical_axis_rules(activations, parameters, additional)


@pytest.mark.parametrize("array", LAYOUTS)
def test_standard_rules_lay_arrays_out_as_t5x_does(array):
    logical, expected = LAYOUTS[array]
    for dims, spec in expected.items():
        assert spmd.logical_to_mesh_axes(logical, _rules(*dims)) == spec, dims


def test_additional_rules_come_after():
    rules = _rules(additional=[("experts", "data"), ("mlp", None)])
    assert spmd.logical_to_mesh_axes(("experts", "mlp"), rules) == P("data", "model")


@pytest.mark.parametrize("dims", [(0, 1), (1, 3)])
def test_other_numbers_of_dimensions_are_refused(dims):
    with pytest.raises(errors.UserError, match=r"_partitioning_dims is [03]; it must be 1 or 2"):
        _rules(*dims)


@pytest.mark.parametrize(
    ("partitions", "replicas", "shape"),
    [(1, 1, (1, 8, 1)), (4, 1, (1, 2, 4)), (2, 2, (2, 2, 2)), (8, 1, (1, 1, 8))],
)
def test_data_takes_the_devices_that_remain(partitions, replicas, shape):
    mesh = partitioning.PjitPartitioner(partitions, replicas).mesh
    assert tuple(mesh.shape.items()) == tuple(zip(("replica", "data", "model"), shape, strict=True))
    assert set(mesh.devices.ravel()) == set(jax.devices())


def test_a_mesh_over_some_of_the_devices():
    devices = jax.devices()[2:4]
    mesh = partitioning.PjitPartitioner(num_partitions=2, devices=devices).mesh
    assert dict(mesh.shape) == {"replica": 1, "data": 1, "model": 2}
    assert set(mesh.devices.ravel()) == set(devices)


@pytest.mark.parametrize(("partitions", "replicas"), [(3, 1), (1, 5), (4, 4), (0, 1), (-1, -1)])
def test_sizes_that_do_not_divide_the_devices_are_refused(partitions, replicas):
    message = f"num_partitions {partitions} x num_replicas {replicas} does not divide the 8 devices"
    with pytest.raises(errors.UserError, match=message):
        _ = partitioning.PjitPartitioner(partitions, replicas).mesh


def test_the_intended_mesh_is_taken_where_it_fits_the_devices():
    def sizes(**kwargs):
        return tuple(partitioning.PjitPartitioner(**kwargs).mesh.shape.values())

    fits, too_large = {"replica": 2, "data": 2, "model": 2}, {"data": 256}
    assert sizes(intended_mesh=fits) == (2, 2, 2)
    assert sizes(intended_mesh=fits, num_partitions=4) == (1, 2, 4)
    assert sizes(intended_mesh=too_large) == (1, 8, 1)
    with pytest.raises(errors.UserError, match="mesh axes .'fsdp'. are unknown"):
        sizes(intended_mesh={"fsdp": 8})


def test_an_abstract_mesh_is_what_is_asked_for_else_intended_else_present():
    here = partitioning.PjitPartitioner(num_partitions=2)
    assert dict(here.abstract_mesh().shape) == {"replica": 1, "data": 4, "model": 2}
    partitioner = partitioning.PjitPartitioner(intended_mesh={"data": 256})
    assert dict(partitioner.abstract_mesh().shape) == {"replica": 1, "data": 256, "model": 1}
    asked = partitioner.abstract_mesh({"model": 4, "replica": 2, "data": 64})
    assert tuple(asked.shape.items()) == (("replica", 2), ("data", 64), ("model", 4))


def test_unknown_mesh_axes_are_refused():
    with pytest.raises(errors.UserError, match=r"mesh axes \['pipeline'\] are unknown"):
        partitioning.PjitPartitioner().abstract_mesh({"pipeline": 2, "data": 2})


def test_parse_mesh():
    assert partitioning.parse_mesh("replica=4, data=64") == {"replica": 4, "data": 64}


@pytest.mark.parametrize("text", ["", "data", "data=x", "data=2=3", "data=0", "data=2,data=4"])
def test_parse_mesh_refuses_what_is_no_mesh(text):
    with pytest.raises(errors.UserError, match=f"--mesh is '{text}'; .*example replica=4"):
        partitioning.parse_mesh(text)


def test_rows_of_a_batch_lie_on_replica_and_data():
    partitioner = partitioning.PjitPartitioner(num_partitions=2, num_replicas=2)
    sharding = partitioner.batch_sharding()
    assert sharding == NamedSharding(partitioner.mesh, P(ROWS))
    assert sharding.shard_shape((16, 8, 8, 3)) == (4, 8, 8, 3)
    assert partitioner.num_batch_parts() == 4
    assert partitioner.num_batch_parts(partitioner.abstract_mesh({"data": 64})) == 64


@pytest.mark.parametrize(
    ("batch_size", "remedy"), [(30, "24 or 32"), (5, "set BATCH_SIZE to 8,"), (0, "to 8,")]
)
def test_a_batch_that_does_not_divide_is_refused_with_sizes_that_do(batch_size, remedy):
    partitioner = partitioning.PjitPartitioner()
    with pytest.raises(errors.UserError, match=f"BATCH_SIZE is {batch_size}, .*8 parts.*{remedy}"):
        partitioner.check_batch_size(batch_size)


def test_batches_that_divide_pass():
    partitioning.PjitPartitioner().check_batch_size(24)
    partitioner = partitioning.PjitPartitioner(num_partitions=8)
    partitioner.check_batch_size(3)
    with pytest.raises(errors.UserError, match="not a multiple of the 256 parts"):
        partitioner.check_batch_size(128, partitioner.abstract_mesh({"replica": 4, "data": 64}))


def test_without_a_rule_for_the_batch_every_device_holds_all_of_it():
    partitioner = partitioning.PjitPartitioner(logical_axis_rules=[("embed", None)])
    assert partitioner.batch_sharding().is_fully_replicated
    assert partitioner.num_batch_parts() == 1
    partitioner.check_batch_size(3)


def _boxed(**shapes):
    return {
        name: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names=axes)
        for name, (shape, axes) in shapes.items()
    }


def test_a_logical_axis_without_a_rule_is_refused_by_name():
    boxed = {"tower": _boxed(kernel=((8, 8), ("embed", "experts")))}
    with pytest.raises(errors.UserError, match=r"\['tower'\]\['kernel'\] has .* axis 'experts'"):
        partitioning.PjitPartitioner().param_shardings(boxed)


def test_a_dimension_that_does_not_divide_is_refused_by_name():
    boxed = {"tower": _boxed(fits=((8, 8), ("embed", "mlp")), kernel=((8, 6), ("embed", "mlp")))}
    partitioner = partitioning.PjitPartitioner(num_partitions=4)
    message = r"dimension 1 of parameter tower/kernel \(8, 6\) is 6, .* 4 parts .* model: .* to 8\."
    with pytest.raises(errors.UserError, match=message):
        partitioner.param_shardings(boxed)


def test_a_dimension_over_two_mesh_axes_is_split_by_their_product():
    rules = [("embed", ("data", "model")), ("mlp", None)]
    partitioner = partitioning.PjitPartitioner(num_partitions=2, logical_axis_rules=rules)
    shardings = partitioner.param_shardings(_boxed(kernel=((16, 3), ("embed", "mlp"))))
    assert shardings["kernel"].shard_shape((16, 3)) == (2, 3)
    with pytest.raises(errors.UserError, match="is 12, not a multiple of the 8 parts .*dataxmodel"):
        partitioner.param_shardings(_boxed(kernel=((12, 3), ("embed", "mlp"))))


def test_a_models_parameters_fall_into_their_shards(tiny_model, tiny_batch):
    model = tiny_model()
    boxed = jax.eval_shape(lambda b: models.init_params(model, jax.random.key(0), b), tiny_batch(1))
    partitioner = partitioning.PjitPartitioner(num_partitions=2, logical_axis_rules=_rules(1, 2))
    shardings = partitioner.param_shardings(boxed)
    shards = jax.tree.map(lambda x, s: s.shard_shape(x.shape), nn.unbox(boxed), shardings)
    layers = shards["image_tower"]["encoder"]["layers"]
    assert layers["mlp"]["fc1"] == {"kernel": (2, 8, 32), "bias": (2, 32)}
    assert layers["mlp"]["fc2"] == {"kernel": (2, 32, 8), "bias": (2, 8)}
    assert layers["attention"]["query"] == {"kernel": (2, 8, 2, 8), "bias": (2, 2, 8)}
    assert layers["attention"]["out"] == {"kernel": (2, 2, 8, 8), "bias": (2, 8)}
    assert shards["text_tower"]["token_embedding"]["embedding"] == (32, 8)
    assert shards["image_tower"]["patch_embedding"]["kernel"] == (8, 8, 3, 8)
    assert shards["logit_scale"] == ()


def test_constraints_of_traced_code_follow_the_active_rules():
    partitioner = partitioning.PjitPartitioner(num_partitions=2)

    def constrain(x):
        return spmd.with_logical_constraint(x, ("batch", "mlp"))

    x = np.zeros((8, 4), np.float32)
    with partitioner.activate():
        inside = jax.jit(constrain)(x)
    assert inside.sharding.is_equivalent_to(NamedSharding(partitioner.mesh, P(ROWS, "model")), 2)
    assert jax.jit(constrain)(x).sharding.is_fully_replicated
