import importlib.util

import pytest

from clipa_t5x import errors, topologies

ALL = [kind for kind in topologies.KINDS.values() if kind.torus_dims]
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the extra 'tpu'"
)


def test_names_are_a_kind_and_a_number_of_chips():
    topology = topologies.parse("v4-256")
    assert (topology.kind.name, topology.num_chips, topology.shape) == ("v4", 256, (4, 8, 8))
    assert topologies.parse("v5e-256").shape == (16, 16)
    assert topologies.parse("v5e-256").num_devices == 256
    assert topologies.parse("tpu7x-64").num_devices == 128
    assert topologies.parse("gpu-h100-8").kind.name == "gpu-h100"
    assert topologies.parse("cpu-3").num_chips == 3
    for kind in ALL:
        for larger in topologies.parse(f"{kind.name}-4").larger():
            assert topologies.parse(larger.name) == larger


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9-8", "--topology is 'v9-8'; it must be one of v4-{4"),
        ("v5e", "'v5e'; it must be one of"),
        ("cpu-0", "'cpu-0'; it must be one of"),
        ("v5e-7", "there is no v5e of 7 chips: v5e-1, v5e-4, v5e-8"),
        ("v4-1", "there is no v4 of 1 chips: v4-4"),
    ],
)
def test_unknown_names_are_refused_with_those_there_are(name, message):
    with pytest.raises(errors.UserError) as refused:
        topologies.parse(name)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "rings"),
    [
        ("v4-256", (True, True, True)),
        ("v5p-32", (False, False, False)),
        ("v5p-64", (True, True, True)),
        ("v5e-256", (True, True, False)),
        ("v5e-128", (False, True, False)),
        ("v6e-64", (False, False, False)),
    ],
)
def test_which_dimensions_are_rings(name, rings):
    assert topologies.wraps(topologies.parse(name)) == rings


def test_larger_topologies_are_of_the_same_kind():
    names = [t.name for t in topologies.parse("v5e-64").larger()]
    assert names == ["v5e-128", "v5e-256"]
    assert topologies.parse("v6e-256").larger() == []
    assert topologies.parse("gpu-a100-8").larger()[0].num_chips == 16


def test_clocks_are_those_that_google_names():
    # 1.05 GHz (v4, Jouppi et al. 2023, table 4); 1.5 and 1.75 GHz by the same units.
    clocks = {kind.name: kind.clock for kind in ALL}
    expected = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
    assert clocks.pop("tpu7x") is None  # not published
    assert clocks == pytest.approx(expected, rel=0.003)
    assert topologies.parse("cpu-1").kind.clock is None


def test_cpu_topologies_are_real_devices_and_gpus_none():
    assert len(topologies.parse("cpu-4").devices() or ()) == 4
    assert topologies.parse("gpu-h100-8").devices() is None
    with pytest.raises(errors.UserError, match="jax has started with 8 CPU devices"):
        topologies.parse("cpu-16").devices()


@pytest.mark.slow
@NEEDS_LIBTPU
@pytest.mark.parametrize("name", ["v4-4", "v5e-1", "v5e-4", "v5p-8", "v6e-16", "tpu7x-8"])
def test_tpu_slices_have_a_device_for_every_chip_or_core(name):
    topology = topologies.parse(name)
    devices = topology.devices()
    assert devices is not None and len(devices) == topology.num_devices
    assert topology.num_devices == topology.num_chips * (2 if name.startswith("tpu7x") else 1)
    assert {device.platform for device in devices} == {"tpu"}


@pytest.mark.slow
@NEEDS_LIBTPU
def test_a_kind_that_libtpu_lacks_is_refused_in_one_line():
    kind = topologies.Kind("v99", 1e9, 1e12, 1, 2, "v6e-4")
    with pytest.raises(errors.UserError, match="libtpu .* does not know v99") as refused:
        topologies.Topology(kind, 4, (2, 2)).devices()
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_remedy_is_named():
    with pytest.raises(errors.UserError, match=r"pip install 'clipa_t5x\[tpu\]'"):
        topologies.parse("v5e-4").devices()
