"""Model FLOPs utilisation (Chowdhery et al., 2022, appendix B): the share of the devices' peak.

Counted are the model's own FLOPs of the tokens that are kept, see `flops`; what remat computes
again is not. The peak is a chip's dense bfloat16 one as its maker states it, or what one large
matrix product is measured to get.
"""

import time

import jax
import jax.numpy as jnp
from absl import logging

from clipa_t5x import topologies
from clipa_t5x.errors import UserError, check_number

MEASURED = "measured"

# Sides of the square matrices of the product that is measured: one that fills the device.
_SIDES = {"cpu": 1024}
_SIDE = 8192
_PRODUCTS = 10


def peak_flops(setting: float | str | None, dtype: str) -> float | None:
    """FLOP/s of all devices of a run together.

    Args:
      setting: of one device, in FLOP/s; 'measured' takes `measured_flops` of this process's first;
        None what its maker states.
      dtype: of the product that is measured.

    Returns:
      None where nobody states one, as for CPUs.

    Raises:
      UserError: the setting is none of these.
    """
    if setting is None:
        stated = topologies.device_peak_flops(jax.devices()[0].device_kind)
        return None if stated is None else stated * jax.device_count()
    if setting == MEASURED:
        measured = measured_flops(dtype)
        logging.info("Measured %.3g FLOP/s of a product in %s, for the MFU.", measured, dtype)
        return measured * jax.device_count()
    if isinstance(setting, str):
        raise UserError(f"PEAK_FLOPS is {setting!r}; it is a number, {MEASURED!r} or None.")
    check_number("PEAK_FLOPS", setting, minimum=1.0)
    return setting * jax.device_count()


def measured_flops(dtype: str) -> float:
    """FLOP/s that the best of some large products gets on this process's first device.

    Devices of a CPU share its cores: each gets its part of what one gets alone.
    """
    device = jax.local_devices()[0]
    side = _SIDES.get(device.platform, _SIDE)
    matrix = jax.device_put(jnp.ones((side, side), dtype), device)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    best = min(_seconds(product, matrix) for _ in range(_PRODUCTS))
    sharers = jax.local_device_count() if device.platform == "cpu" else 1
    return 2 * side**3 / best / sharers


def _seconds(product: jax.stages.Wrapped, matrix: jax.Array) -> float:
    begun = time.perf_counter()
    product(matrix, matrix).block_until_ready()
    return time.perf_counter() - begun
