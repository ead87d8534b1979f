"""Loss and gradients of a step, by microbatches where the whole batch's activations do not fit.

A contrastive loss compares every pair of the batch, so that gradients of smaller batches do not add
up to its own. Those through cached embeddings do (Gao et al., 2021, "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup", section 3): embed all microbatches and keep nothing
else, take the loss of all embeddings at once, then run every microbatch again and send its
embeddings' gradient back through it. That costs one more forward pass, and
room for one more gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import spmd

from clipa_t5x import models
from clipa_t5x.errors import UserError
from clipa_t5x.towers import batch_part


def check_num_microbatches(num_microbatches: int, batch_size: int, num_parts: int) -> None:
    """Refuses a number of microbatches that would not leave every device its share of each.

    Args:
      num_microbatches: as for `value_and_grad`.
      batch_size: of the global batch.
      num_parts: how many parts the mesh splits it into; they are equal.

    Raises:
      UserError: it does not divide a part's rows; names both and what does.
    """
    rows = batch_size // num_parts
    is_count = isinstance(num_microbatches, int) and not isinstance(num_microbatches, bool)
    if not is_count or num_microbatches < 1 or rows % num_microbatches:
        sizes = ", ".join(str(size) for size in range(1, rows + 1) if rows % size == 0)
        raise UserError(
            f"NUM_MICROBATCHES is {num_microbatches!r}; it must divide the {rows} rows that a "
            f"device holds of BATCH_SIZE {batch_size}: choose one of {sizes}."
        )


def value_and_grad(
    model: models.ClipModel,
    params: models.Params,
    batch: models.Batch,
    rng: jax.Array,
    num_microbatches: int = 1,
) -> tuple[tuple[jax.Array, dict[str, Any]], models.Params]:
    """`models.training_loss` of the whole batch, and its gradient with respect to `params`.

    Both are the same for every number of microbatches, but for rounding: every sample draws the
    same mask and the same paths.

    Args:
      model: the model.
      params: its parameters.
      batch: global, see `models.ClipModel.__call__`.
      rng: this step's key.
      num_microbatches: how many parts of the batch to run one after the other; activations take
        this many times less memory. It divides the batch, and what each device holds of it.

    Returns:
      ((loss, metrics), gradients): the gradients have their parameters' dtypes, in which they are
      also summed.
    """
    if num_microbatches == 1:
        grad_fn = jax.value_and_grad(models.training_loss, argnums=1, has_aux=True)
        return grad_fn(model, params, batch, rng)

    towers_batch = {name: batch[name] for name in ("images", "text")}
    rngs = models.step_rngs(rng)

    def embed(params: models.Params, index: jax.Array) -> Any:
        """The embeddings of microbatch `index`, (images, text)."""
        part = batch_part.BatchPart(index, num_microbatches)
        rows = jax.tree.map(part.of, towers_batch)
        return model.apply(
            {"params": params}, rows, train=True, part=part, rngs=rngs, method="embed"
        )

    def contrast(params: models.Params, embeddings: Any) -> Any:
        """Loss and metrics of all embeddings, each [microbatch, row, joint]."""
        images, text = jax.tree.map(_join, embeddings)
        weights = batch.get("weights")
        return model.apply({"params": params}, images, text, weights, method="contrast")

    indices = jnp.arange(num_microbatches)
    embeddings = jax.lax.map(lambda index: embed(params, index), indices)
    contrast_and_grads = jax.value_and_grad(contrast, argnums=(0, 1), has_aux=True)
    # The temperature's gradient is whole already; the towers' are zeros still.
    loss_and_metrics, (grads, embedding_grads) = contrast_and_grads(params, embeddings)

    def add(grads: models.Params, microbatch: Any) -> tuple[models.Params, None]:
        index, embedding_grads = microbatch
        _, pull_back = jax.vjp(lambda params: embed(params, index), params)
        return jax.tree.map(jnp.add, grads, pull_back(embedding_grads)[0]), None

    grads, _ = jax.lax.scan(add, grads, (indices, embedding_grads))
    return loss_and_metrics, grads


def _join(parts: jax.Array) -> jax.Array:
    """Puts the rows of `BatchPart`s back in order: [parts, rows, joint] to [batch, joint]."""
    whole = parts.swapaxes(0, 1).reshape(-1, parts.shape[-1])
    return spmd.with_logical_constraint(whole, ("batch", None))
