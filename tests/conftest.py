import functools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
import saved_runs

from clipa_t5x import models
from clipa_t5x.towers import text_transformer, vision_transformer


def pytest_addoption(parser):
    """`--update_goldens` rewrites what golden tests compare with; review the diff."""
    parser.addoption("--update_goldens", action="store_true", help="rewrite golden files")


def pytest_configure(config):
    """Before any test touches a device: 8 of them on the CPU, and compiled programs kept."""
    jax.config.update("jax_num_cpu_devices", 8)
    # Threads for every device to wait in several collectives at once: with a thread per device, the
    # default, they can take all threads and wait for each other until XLA gives up and aborts.
    os.environ.setdefault("PJRT_NPROC", "64")
    jax.config.update("jax_disable_most_optimizations", True)
    cache = getattr(config, "cache", None)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if jaxlib.__version__.startswith("0.10."):
        compile_fast()


def compile_fast():
    """Halves compile time, most of the tests' time; for this process only, not those it starts.

    XLA reads its flags once, and aborts on one that it does not know.
    """
    given = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{given or ''} --xla_cpu_use_fusion_emitters=false"
    jax.devices()
    if given is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = given


@pytest.fixture(scope="session")
def random_params():
    """Returns a function that makes parameters without compiling an initialiser.

    Biases, norms, tokens and tables are off their zeros and ones, too.
    """

    def make(module, *inputs, seed=0):
        shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))["params"]
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), shapes)

    return make


@pytest.fixture(scope="session")
def tiny_model():
    """Returns a function that makes a CLIP model of width 32; `image` and `text` override sizes."""

    def make(*, image=None, text=None, **kwargs):
        sizes = {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 4, "out_dim": 16}
        return models.ClipModel(
            image_tower=vision_transformer.VisionTransformer(
                **{**sizes, "patch_size": 8, **(image or {})}
            ),
            text_tower=text_transformer.TextTransformer(
                **{**sizes, "vocab_size": 64, **(text or {})}
            ),
            **kwargs,
        )

    return make


@pytest.fixture(scope="session")
def tiny_batch():
    """Returns a function that makes a batch of random images (16 x 16 pixels) and texts."""

    def make(batch_size=16, *, length=8, seed=0):
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (batch_size, 16, 16, 3), dtype=np.uint8)
        text = rng.integers(1, 64, (batch_size, length), dtype=np.int32)
        return {"images": jnp.asarray(images), "text": jnp.asarray(text)}

    return make


@pytest.fixture(scope="session")
def make_trainer(tiny_model):
    """Returns a function that makes a trainer; see `saved_runs.make_trainer`."""
    return functools.partial(saved_runs.make_trainer, tiny_model)
