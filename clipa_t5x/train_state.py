"""What training changes: parameters, optimizer state, the step, the random key."""

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class TrainState:
    """The whole of training at one point.

    Attributes:
      step: int32 scalar, updates completed.
      params: nested dictionary of float32 arrays.
      opt_state: optax's state; moments have their parameters' shapes and shardings.
      rng: uint32 [2], key data from which each step's key is folded.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array

    def step_rng(self) -> jax.Array:
        """The key of the coming step: the same whether or not the run was interrupted."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.rng), self.step)
