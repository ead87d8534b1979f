"""Arrays by name from whatever holds weights: a file, a part of one, a folder of another trainer.

A checkpoint of this package is none of these: see `checkpoints`.
"""

import contextlib
import os
import re
from collections.abc import Iterator

from etils import epath

from clipa_t5x.errors import UserError
from clipa_t5x.weights import array_files, open_clip_options, t5x_checkpoints, t5x_orbax
from clipa_t5x.weights.stored_arrays import StoredArrays

# What a folder of Hugging Face's has, in the order of preference; the last may be a pickle, and is
# refused as one.
_FOLDER_FILES = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin")


def is_source(path: str) -> bool:
    """Whether this module opens a path, or says why not; otherwise it may be a checkpoint here.

    Raises:
      UserError: it is a URL that nothing here reads.
    """
    if hub := re.match(r"hf-hub:|hf://|hf:|https://huggingface\.co/", path):
        repository = path[hub.end() :].strip("/")
        folder = repository.rpartition("/")[2] or "weights"
        raise UserError(
            f"{path} is at Hugging Face, and nothing is downloaded here: run `hf download "
            f"{repository} --local-dir {folder}` first, and give that folder."
        )
    return (
        array_files.is_file(path)
        or _subtree(path) is not None
        or weights_file(path) is not None
        or (epath.Path(path) / open_clip_options.CONFIG_FILE).exists()
        or t5x_checkpoints.is_checkpoint(path)
        or t5x_orbax.find(path) is not None
    )


def weights_file(folder: str) -> str | None:
    """The file of weights in a folder as Hugging Face lays one out; None where there is none."""
    if not epath.Path(folder).is_dir():
        return None
    paths = (epath.Path(folder) / name for name in _FOLDER_FILES)
    return next((os.fspath(path) for path in paths if path.is_file()), None)


def _subtree(path: str) -> tuple[str, str] | None:
    """(file, names' beginning) of 'file.npz:sub/tree'."""
    file, colon, tree = path.rpartition(":")
    if not colon or not tree or not file or not array_files.is_file(file):
        return None
    return file, tree.strip("/") + "/"


@contextlib.contextmanager
def open_source(path: str) -> Iterator[StoredArrays]:
    """Opens a source; reads no array yet.

    Args:
      path: a `.npz` or `.safetensors` file, whatever its name; 'file:sub/tree' for what is under
        'sub/tree/' in it; a folder with `open_clip_config.json` and `open_clip_model.safetensors`;
        a T5X checkpoint's folder, old or new, or a new one's MODEL_DIR. Local, or a URL.

    Yields:
      Arrays by name.

    Raises:
      UserError: it is damaged, a pickle, or not there.
    """
    with contextlib.ExitStack() as stack:
        if array_files.is_file(path):
            yield stack.enter_context(array_files.open_arrays(path))
        elif part := _subtree(path):
            file, tree = part
            arrays = stack.enter_context(array_files.open_arrays(file))
            yield _under(arrays, file, tree)
        elif file := weights_file(path):
            yield stack.enter_context(array_files.open_arrays(file))
        elif t5x_checkpoints.is_checkpoint(path):
            yield stack.enter_context(t5x_checkpoints.open_checkpoint(path))
        elif t5x_orbax.find(path):
            yield stack.enter_context(t5x_orbax.open_checkpoint(path))
        else:
            raise UserError(
                f"there are no weights at {path}: give a .npz or .safetensors file, a folder with "
                f"one of {', '.join(_FOLDER_FILES)}, or a T5X checkpoint's folder."
            )


def _under(arrays: StoredArrays, file: str, tree: str) -> StoredArrays:
    found = {k.removeprefix(tree): v for k, v in arrays.items() if k.startswith(tree)}
    if not found:
        tops = sorted({name.partition("/")[0] for name in arrays})
        raise UserError(
            f"{file} has nothing under {tree[:-1]!r}: at its top are {', '.join(tops[:20])}. Name "
            "one of these, or a part of it, or nothing for all."
        )
    return found
