"""Which part of a batch a tower is called with, so that every sample draws what it always draws."""

from collections.abc import Callable

import flax.struct
import jax


@flax.struct.dataclass
class BatchPart:
    """The rows `index`, `index + count`, `index + 2 count` ... of a batch.

    Rows so far apart leave every device its share: where the batch is split over devices, so is
    its part, as long as `count` divides what a device holds.

    Attributes:
      index: which of the parts, from 0; traced within a loop over them.
      count: how many parts there are; 1 for the whole batch.
    """

    index: jax.Array | int = 0
    count: int = flax.struct.field(pytree_node=False, default=1)

    def of(self, whole: jax.Array) -> jax.Array:
        """This part's rows: [batch, ...] to [batch / count, ...]."""
        return whole.reshape(-1, self.count, *whole.shape[1:])[:, self.index]

    def draw(self, sampler: Callable[[int], jax.Array], num_rows: int) -> jax.Array:
        """What falls to this part when random numbers are drawn for the whole batch at once.

        Args:
          sampler: maps a number of rows to random numbers [rows, ...].
          num_rows: of this part.

        Returns:
          [num_rows, ...].
        """
        return self.of(sampler(num_rows * self.count))


WHOLE = BatchPart()
