"""What training changes: parameters, optimizer state, the step, the random key, the guard."""

import dataclasses
from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class Guard:
    """What the check for bad numbers remembers, replicated scalars; see `bad_numbers`.

    Attributes:
      mean: float32, running mean of the logarithm of the gradient's norm.
      variance: float32, its running variance.
      count: int32, norms that entered both.
      in_a_row: int32, bad steps since the latest update that was applied.
      skipped: int32, all steps of the run whose update was not applied.
      frozen: bool, whether no update is applied any more; never so in a checkpoint.
    """

    mean: jax.Array
    variance: jax.Array
    count: jax.Array
    in_a_row: jax.Array
    skipped: jax.Array
    frozen: jax.Array


@flax.struct.dataclass
class TrainState:
    """The whole of training at one point.

    Attributes:
      step: int32 scalar, updates completed; those that were skipped count.
      params: nested dictionary of float32 arrays.
      opt_state: optax's state; moments have their parameters' shapes and shardings.
      rng: uint32 [2], key data from which each step's key is folded.
      guard: None where bad numbers are not looked for within the step.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array
    guard: Guard | None = None

    def step_rng(self) -> jax.Array:
        """The key of the coming step: the same whether or not the run was interrupted."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.rng), self.step)

    def as_tree(self) -> dict[str, Any]:
        """The fields by name, as a checkpoint holds them; without a guard where there is none.

        Of a field that is None orbax would write, and on restoring demand, that it is None.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}
