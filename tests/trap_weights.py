"""Random parameters with which no wrong convention goes unnoticed.

Those of a fresh model do not tell an exact GELU from an approximate one, nor epsilons of norms.
"""

import flax.linen as nn
import jax
import numpy as np
import safetensors.numpy

from clipa_t5x import checkpoints, models


def shapes(model, image_size, text_length):
    """The parameters' shapes by name."""
    batch = {
        "images": np.zeros((1, image_size, image_size, 3), np.uint8),
        "text": np.zeros((1, text_length), np.int32),
    }
    init = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0), batch))
    return {name: leaf.shape for name, leaf in checkpoints.flatten(nn.unbox(init)).items()}


def make(model, image_size, text_length, seed=0):
    """float32 arrays by name."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in sorted(shapes(model, image_size, text_length).items()):
        values = rng.normal(size=shape)
        if name == "logit_scale":
            values = np.asarray(3.0)
        elif name.endswith("scale"):
            values = 1 + 0.4 * values
        elif "token_embedding" in name:
            values = 0.004 * values  # So small that a norm's epsilon counts.
        elif name.endswith("bias") or "position" in name or "class_token" in name:
            values = 0.3 * values
        elif "image_tower/patch" in name:
            values = values * np.prod(shape[-4:-1]) ** -0.5
        else:
            values = 1.5 * values * model.image_tower.width**-0.5
        made[name] = values.astype(np.float32)
    return made


def save(path, model, image_size, text_length, seed=0):
    """Writes them to a `.safetensors` file under the names that they have here; returns them."""
    made = make(model, image_size, text_length, seed)
    safetensors.numpy.save_file(made, path)
    return made
