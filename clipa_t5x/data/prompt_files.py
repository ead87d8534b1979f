"""Class names, prompt templates and label maps of ImageNet, of an installed open_clip and its timm.

They are not of this package; open_clip keeps them in a module of their own, which is read without
importing the rest (and PyTorch with it).
"""

import importlib.util
import os
import pathlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from clipa_t5x.data import label_maps
from clipa_t5x.errors import UserError

_MODULE = "zero_shot_metadata"
# File -> the name of its lines in open_clip.
FILES = {
    "imagenet_classes.txt": "IMAGENET_CLASSNAMES",
    "imagenet_templates.txt": "OPENAI_IMAGENET_TEMPLATES",
    "imagenet_templates_simple.txt": "SIMPLE_IMAGENET_TEMPLATES",
}


def write(output_dir: str | os.PathLike[str]) -> dict[str, int]:
    """Writes the files of `FILES` and `label_maps.installed`, in the place of any that are there.

    Args:
      output_dir: a local folder, made if it is missing.

    Returns:
      How many lines each path has.

    Raises:
      UserError: open_clip is not installed or is another version's, or the folder cannot be
        written to.
    """
    metadata = _read_metadata()
    texts: dict[str, Sequence[str]] = {
        name: _lines(getattr(metadata, key, None), key) for name, key in FILES.items()
    }
    texts |= label_maps.installed()
    folder = pathlib.Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in texts.items():
            (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--output_dir={output_dir} cannot be written to ({error.strerror}): give a folder "
            "that can."
        ) from error
    return {os.fspath(folder / name): len(lines) for name, lines in texts.items()}


def _read_metadata() -> ModuleType:
    package = importlib.util.find_spec("open_clip")
    folders = package.submodule_search_locations if package is not None else None
    path = next(
        (p for f in folders or () if (p := pathlib.Path(f, f"{_MODULE}.py")).exists()), None
    )
    spec = path and importlib.util.spec_from_file_location(f"open_clip.{_MODULE}", path)
    if not spec or spec.loader is None:
        raise UserError(
            "class names and templates come from open_clip, which is not installed here: "
            "pip install 'clipa_t5x[interop]', or write the files by hand, one item a line."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _lines(items: Any, key: str) -> Sequence[str]:
    """Class names as they are, templates (functions of the name) with {} in its place."""
    lines: list[Any] = [item("{}") if callable(item) else item for item in items or ()]
    what = "a name" if key.endswith("CLASSNAMES") else "a template"
    if not lines or not all(
        isinstance(line, str) and line.strip() and line.splitlines() == [line] for line in lines
    ):
        raise UserError(
            f"the installed open_clip's {_MODULE}.{key} is not {what} each: install a version of "
            "open_clip_torch from 2.20 on."
        )
    return lines
