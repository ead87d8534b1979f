"""Tests against the real peers: the extra `interop`, CPU builds of torch and open_clip_torch."""

import importlib.util
import pathlib
import re

import pytest


def _declare_operators(torch, torchvision):
    """Lets a torchvision for GPUs be imported without its library of operators.

    Returns what has to be kept for as long as they are to be there.
    """
    source = (pathlib.Path(torchvision.origin).parent / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in set(re.findall(r"register_meta\(\"(\w+)|torchvision::(\w+)", source)):
        operator = "".join(name)
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor x) -> Tensor")
    return library


@pytest.fixture(scope="session")
def open_clip():
    """The module; skips where it is not installed."""
    for name in ("torch", "torchvision", "open_clip"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: extra interop")
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    kept = _declare_operators(torch, importlib.util.find_spec("torchvision"))
    yield importlib.import_module("open_clip")
    del kept
