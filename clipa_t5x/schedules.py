"""Step counts and learning rates as functions of what a recipe states."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from clipa_t5x.errors import UserError, check_number

Schedule = Callable[[ArrayLike], jax.Array]


def steps_from_samples(samples: int, batch_size: int) -> int:
    """Training steps that see `samples` examples: floor(samples / batch_size).

    CLIPA's recipes state samples: 12,811,632,640 at batch 65,536 are 195,490 steps.

    Raises:
      UserError: one of them is no whole number of at least 1, or there is not one whole batch.
    """
    for name, value in (("TRAIN_SAMPLES", samples), ("BATCH_SIZE", batch_size)):
        # 1.28e8 is a whole number too, and how large counts are written.
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        check_number(name, whole, minimum=1, whole=True)
    steps = int(samples) // int(batch_size)
    if steps < 1:
        raise UserError(
            f"{samples} samples are less than one batch of {batch_size}: set TRAIN_SAMPLES to at "
            "least BATCH_SIZE, or lower BATCH_SIZE."
        )
    return steps


def scaled_learning_rate(base: float, batch_size: int) -> float:
    """CLIPA's linear scaling: base x (batch_size // 256); never less than one unit of base."""
    return base * max(batch_size // 256, 1)


def warmup_cosine(peak: float, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Linear warm-up to `peak`, then half a cosine to zero.

    The rate at step t (updates completed so far, so 0 for the first update) is
    peak x min(1, t / warmup) x (1 + cos(pi p)) / 2 with p = clip((t - warmup) / (total - warmup)).

    Raises:
      UserError: the warm-up is not shorter than the run.
    """
    check_number("LEARNING_RATE", peak, minimum=0)
    check_number("WARMUP_STEPS", warmup_steps, minimum=0, whole=True)
    if not 0 <= warmup_steps < total_steps:
        raise UserError(
            f"WARMUP_STEPS is {warmup_steps} and TRAIN_STEPS is {total_steps}: the warm-up must be "
            "shorter than the run. Lower WARMUP_STEPS or train longer."
        )

    def learning_rate(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        warmup = jnp.minimum(1.0, step / warmup_steps) if warmup_steps else 1.0
        return peak * warmup * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    return learning_rate
