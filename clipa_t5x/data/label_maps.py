"""Label maps for parts of ImageNet's classes, by WordNet ids: see `prompts.read_label_map`.

ImageNet-A and -R have images of 200 of the 1,000 classes, in a folder a class, named by WordNet id.
"""

import importlib.util
import os
import pathlib
from collections.abc import Collection, Sequence

from clipa_t5x.data import image_folders, prompts
from clipa_t5x.errors import UserError

# Of an installed timm, which open_clip needs: the ids of all classes in order, and of the parts.
_ALL = "imagenet_synsets.txt"
_PARTS = {
    "imagenet_a_map.txt": "imagenet_a_synsets.txt",
    "imagenet_r_map.txt": "imagenet_r_synsets.txt",
}


def of_folders(folder: str, classes: Sequence[str]) -> list[str]:
    """The map of data in folders named by class, whose labels are the folders' places.

    Args:
      folder: that holds the classes' folders.
      classes: what all classes are called, in the order of the class list.

    Returns:
      A line for each folder: its place in `classes`, or `prompts.NO_CLASS`.

    Raises:
      UserError: there is no such folder, or none in it is called as a class.
    """
    names = image_folders.class_names(folder) if os.path.isdir(folder) else []
    places = {name: str(place) for place, name in enumerate(classes)}
    lines = [places.get(name, prompts.NO_CLASS) for name in names]
    if set(lines) <= {prompts.NO_CLASS}:
        raise UserError(
            f"--folder={folder} holds {', '.join(names[:3]) or 'no folder'}, and the classes are "
            f"{', '.join(classes[:3])}, ...: give the folder whose folders are called as classes, "
            "and their list by --classes."
        )
    return lines


def of_part(part: Collection[str], classes: Sequence[str]) -> list[str]:
    """The map of data with the labels of all `classes` and images of a part of them.

    Returns:
      A line for each class: its own place, or `prompts.NO_CLASS` where it is not in `part`.
    """
    return [str(i) if name in part else prompts.NO_CLASS for i, name in enumerate(classes)]


def installed() -> dict[str, list[str]]:
    """Maps of ImageNet-A and -R, as TFDS labels them, by file name; empty without timm's lists."""
    folder = _lists_of_timm()
    if folder is None or not all((folder / name).exists() for name in (_ALL, *_PARTS.values())):
        return {}
    classes = (folder / _ALL).read_text().split()
    return {
        name: of_part(set((folder / listed).read_text().split()), classes)
        for name, listed in _PARTS.items()
    }


def wordnet_ids(path: str | None) -> list[str]:
    """ImageNet's 1,000 classes in order: of a file, one a line, else as TFDS lists them.

    Raises:
      UserError: there is no such file.
    """
    if path is not None:
        return prompts.read_lines(path, "class", numbered=True)
    package = importlib.util.find_spec("tensorflow_datasets")
    folders = package.submodule_search_locations if package is not None else None
    for folder in folders or ():
        listed = pathlib.Path(folder, "datasets", "imagenet2012", "labels.txt")
        if listed.exists():
            return listed.read_text().split()
    raise UserError(
        "the installed tensorflow_datasets lists no classes of ImageNet: give --classes, a text "
        "file with the 1,000 WordNet ids in order."
    )


def _lists_of_timm() -> pathlib.Path | None:
    package = importlib.util.find_spec("timm")
    folders = package.submodule_search_locations if package is not None else None
    found = (pathlib.Path(folder, "data", "_info") for folder in folders or ())
    return next((path for path in found if path.is_dir()), None)
