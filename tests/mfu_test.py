import jax
import pytest

from clipa_t5x import mfu, topologies
from clipa_t5x.errors import UserError


class Device:
    def __init__(self, device_kind):
        self.device_kind = device_kind


def test_the_makers_peak_is_of_all_devices(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Device("TPU v5 lite")] * 8)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert mfu.peak_flops(None, "bfloat16") == 8 * 197e12
    assert mfu.peak_flops(1e12, "bfloat16") == 8e12


def test_nobody_states_a_cpus():
    assert mfu.peak_flops(None, "float32") is None


def test_a_measured_peak_is_that_of_the_cores(monkeypatch):
    """As many devices as there are share them: together they have what one has alone."""
    ticks = iter(range(1000))
    monkeypatch.setattr(mfu.time, "perf_counter", lambda: float(next(ticks)))
    assert jax.device_count() == 8
    assert mfu.peak_flops("measured", "float32") == pytest.approx(2 * 1024**3)


def test_a_real_measurement_is_of_this_machine():
    assert 1e8 < mfu.measured_flops("float32") < 1e14


@pytest.mark.parametrize(
    "setting, message",
    [("mesured", "PEAK_FLOPS is 'mesured'; it is a number, 'measured'"), (0, "PEAK_FLOPS is 0")],
)
def test_what_is_no_peak_is_refused(setting, message):
    with pytest.raises(UserError, match=message):
        mfu.peak_flops(setting, "float32")


@pytest.mark.parametrize(
    "device_kind, peak",
    [
        ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12),
        ("TPU7x", 2307e12 / 2), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", None), ("TPU v3", None),
        ("cpu", None),
    ],
)  # fmt: skip
def test_peaks_by_what_jax_calls_devices(device_kind, peak):
    assert topologies.device_peak_flops(device_kind) == peak
