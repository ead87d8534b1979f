"""The two-tower CLIP model: images and text to embeddings, loss and metrics."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import spmd

from clipa_t5x import losses
from clipa_t5x.errors import UserError, check_number
from clipa_t5x.towers import batch_part

Params = Any
Batch = Mapping[str, jax.Array]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

# Random streams that a training step hands to the model.
RNG_STREAMS = ("patch_mask", "drop_path")


def l2_normalize(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """Scales the last dimension to unit length, in float32.

    The epsilon stands inside the root: the gradient of an all-zero row is finite.
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + epsilon)


class ClipModel(nn.Module):
    """CLIP (Radford et al., 2021): an image tower, a text tower and a learned temperature.

    Attributes:
      image_tower: module from normalised float images to [batch, joint].
      text_tower: module from token ids to [batch, joint].
      loss: function of (image embeddings, text embeddings, logit scale, weights) that returns a
        float32 scalar and a dictionary of scalar metrics; see `clipa_t5x.losses`.
      init_logit_scale: first value of the logits' factor. The parameter is its logarithm.
      init_logit_bias: first value of the logits' learned offset, passed to the loss as
        `logit_bias`; None for losses that take none.
      image_mean, image_std: per channel, on the scale 0-255, applied to uint8 images on device.
    """

    image_tower: Any
    text_tower: Any
    loss: Callable[..., Any] = losses.softmax_contrastive
    init_logit_scale: float = 1 / 0.07
    init_logit_bias: float | None = None
    image_mean: Sequence[float] = IMAGENET_MEAN
    image_std: Sequence[float] = IMAGENET_STD

    def setup(self):
        """Declares the temperature; the towers are declared by being attributes.

        Raises:
          UserError: the loss is no function, or the logits' first factor is not above 0.
        """
        if not callable(self.loss):
            raise UserError(
                f"LOSS is {self.loss!r}; it must be a function, as in @losses.softmax_contrastive."
            )
        check_number("INIT_LOGIT_SCALE", self.init_logit_scale, minimum=1e-6)
        self.logit_scale = self.param(
            "logit_scale", nn.initializers.constant(np.log(self.init_logit_scale)), ()
        )
        if self.init_logit_bias is not None:
            self.logit_bias = self.param(
                "logit_bias", nn.initializers.constant(self.init_logit_bias), ()
            )

    def embed_images(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        part: batch_part.BatchPart = batch_part.WHOLE,
    ) -> jax.Array:
        """uint8 (or normalised float) [batch, height, width, 3] to unit float32 [batch, joint]."""
        if images.dtype == jnp.uint8:
            mean = jnp.asarray(self.image_mean, jnp.float32)
            std = jnp.asarray(self.image_std, jnp.float32)
            images = (images.astype(jnp.float32) - mean) / std
        images = spmd.with_logical_constraint(images, ("batch", None, None, None))
        embeddings = l2_normalize(self.image_tower(images, train=train, part=part))
        return spmd.with_logical_constraint(embeddings, ("batch", None))

    def embed_text(
        self,
        text: jax.Array,
        *,
        train: bool = False,
        part: batch_part.BatchPart = batch_part.WHOLE,
    ) -> jax.Array:
        """int32 [batch, length] to unit float32 [batch, joint]."""
        text = spmd.with_logical_constraint(text, ("batch", None))
        embeddings = l2_normalize(self.text_tower(text, train=train, part=part))
        return spmd.with_logical_constraint(embeddings, ("batch", None))

    def __call__(self, batch: Batch, *, train: bool = False) -> tuple[jax.Array, dict[str, Any]]:
        """Loss and metrics of one global batch.

        Args:
          batch: 'images' uint8 [batch, height, width, 3], 'text' int32 [batch, length], and
            'weights' float32 [batch] where some rows are padding.
          train: whether tokens are masked and paths dropped.

        Returns:
          (loss, metrics): float32 scalars; metrics hold loss, accuracy and logit_scale.
        """
        images, text = self.embed(batch, train=train)
        return self.contrast(images, text, batch.get("weights"))

    def embed(
        self, batch: Batch, *, train: bool = False, part: batch_part.BatchPart = batch_part.WHOLE
    ) -> tuple[jax.Array, jax.Array]:
        """Unit embeddings of images and texts, float32 [batch, joint] each.

        Args:
          batch: as for the call; weights are not looked at.
          train: whether tokens are masked and paths dropped.
          part: which part of the step's batch this is: it draws its own masks and paths.
        """
        return (
            self.embed_images(batch["images"], train=train, part=part),
            self.embed_text(batch["text"], train=train, part=part),
        )

    def contrast(
        self,
        image_embeddings: jax.Array,
        text_embeddings: jax.Array,
        weights: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Loss and metrics, as the call's, of a global batch's embeddings [batch, joint]."""
        scale = jnp.exp(self.logit_scale)
        loss, metrics = self.loss(
            image_embeddings,
            text_embeddings,
            scale,
            weights,
            **({} if self.init_logit_bias is None else {"logit_bias": self.logit_bias}),
        )
        return loss, {"loss": loss, "logit_scale": scale, **metrics}


def init_params(model: ClipModel, rng: jax.Array, batch: Batch) -> Params:
    """Fresh parameters, boxed with their logical axis names, for batches shaped like `batch`."""
    # The loss has no parameters of its own, and may want a batch of another size.
    return model.init({"params": rng}, batch, train=False, method="embed")["params"]


def step_rngs(rng: jax.Array) -> dict[str, jax.Array]:
    """The key of every random stream, from a training step's key."""
    return dict(zip(RNG_STREAMS, jax.random.split(rng, len(RNG_STREAMS)), strict=True))


def training_loss(
    model: ClipModel, params: Params, batch: Batch, rng: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    """Loss and metrics of a training step; `rng` is that step's key."""
    return model.apply({"params": params}, batch, train=True, rngs=step_rngs(rng))  # pyright: ignore[reportReturnType]
