"""An exported folder as the real OpenCLIP sees it, where it is installed (extra `interop`)."""

import contextlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from clipa_t5x.errors import UserError
from clipa_t5x.weights import array_sources, open_clip_options, parity


def version() -> str | None:
    """'open_clip 3.3.0', or None where it is not there or does not start."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:  # The latter is a mere folder of that name, as exports.
        return None
    try:
        import open_clip  # pyright: ignore[reportMissingImports]
    except Exception as error:  # It starts torch, torchvision, timm and more, each in its own way.
        logging.warning(
            "open_clip is installed and cannot be imported (%s: %s).", type(error).__name__, error
        )
        return None
    return f"open_clip {open_clip.__version__}"


def is_folder(path: str) -> bool:
    """Whether it is a local folder that OpenCLIP loads."""
    return os.path.isfile(os.path.join(path, open_clip_options.CONFIG_FILE))


def embed(
    folder: str, batch: parity.Probe, config: Mapping[str, Any] | None = None
) -> parity.Embeddings:
    """Loads a local folder as any user of OpenCLIP does, and embeds a probe in float32.

    Images are scaled as the folder's own preprocessing says, not resized.

    Args:
      folder: local.
      batch: what to embed.
      config: in the place of the folder's own `open_clip_config.json`; then its weights are known
        to be `.safetensors`, whatever their name.

    Raises:
      UserError: OpenCLIP does not load it, or does not embed the probe.
    """
    with contextlib.ExitStack() as stack:
        load = folder
        if config is not None:
            load = stack.enter_context(tempfile.TemporaryDirectory(prefix="open_clip-"))
            weights = os.path.abspath(array_sources.weights_file(folder) or folder)
            os.symlink(weights, os.path.join(load, "open_clip_model.safetensors"))
            with open(os.path.join(load, open_clip_options.CONFIG_FILE), "w") as file:
                json.dump(config, file)
        try:
            return _embed(load, batch)
        except Exception as error:  # Each of its layers has errors of its own.
            reason = " ".join(f"{type(error).__name__}: {error}".split()).replace(load, folder)
            raise UserError(
                f"{version()} makes no embeddings of {folder}: {reason[:400]}. Its "
                f"{open_clip_options.CONFIG_FILE} and its weights have to be of one model."
            ) from error


def _embed(folder: str, batch: parity.Probe) -> parity.Embeddings:
    import open_clip  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    scale: Any = preprocess.transforms[-1]  # pyright: ignore[reportAttributeAccessIssue]
    model.eval()
    with torch.no_grad():
        images = torch.from_numpy(np.moveaxis(batch.images, -1, 1).copy()).float() / 255
        ids = torch.from_numpy(batch.ids.astype(np.int64))
        embeddings = (
            model.encode_image(scale(images), normalize=True),
            model.encode_text(ids, normalize=True),
        )
    return parity.Embeddings(*(each.numpy() for each in embeddings))
