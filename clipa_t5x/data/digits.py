"""scikit-learn's handwritten digits as captioned images: the smallest real data set there is.

The 1,797 scans of 8 x 8 pixels ship inside scikit-learn, so nothing is downloaded. They are
enlarged smoothly, turned to RGB and captioned with the digit as a word or as a numeral.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np
from PIL import Image

from clipa_t5x.data import record_writer
from clipa_t5x.errors import UserError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = {"train": 1437, "validation": 360}
TEMPLATES = (
    "a photo of the handwritten digit {}",
    "the number {} written by hand",
    "a scan of a handwritten {}",
    "the digit {} in white on black",
)
_CAPTIONS = (
    *TEMPLATES,
    "a small gray picture of the digit {}",
    "a handwritten number {} in low resolution",
    "somebody wrote the number {} by hand",
    "the handwritten digit {} on a black background",
)
_MAX_INK = 16  # The scans count inked pixels in blocks of 4 x 4.


def class_lists() -> dict[str, tuple[str, ...]]:
    """Returns the class names, by label, of each label feature."""
    return {"digit": DIGITS}


def template_lists() -> dict[str, tuple[str, ...]]:
    """Returns the zero-shot prompt templates, `{}` standing for the class name, of each list."""
    return {"digit": TEMPLATES}


def phrases() -> list[str]:
    """Returns texts that together hold every word of every caption, class name and template."""
    return [*(text.replace("{}", "") for text in _CAPTIONS), *DIGITS, *"0123456789"]


def word_classes() -> dict[str, tuple[str, ...]]:
    """Returns the captions' nouns, adjectives and verbs; their other words are none of these.

    A digit's name is what the caption tells of, so it is a noun here.
    """
    things = "photo digit number hand scan picture resolution background somebody"
    return {
        "noun": (*DIGITS, *"0123456789", *things.split()),
        "adjective": ("handwritten", "white", "black", "small", "gray", "low"),
        "verb": ("written", "wrote"),
    }


def caption(label: int, rng: np.random.Generator) -> str:
    """Describes a digit.

    Args:
      label: the digit, 0 to 9.
      rng: chooses the phrasing.

    Returns:
      A caption of 5 to 12 words.
    """
    name = str(label) if rng.random() < 0.3 else DIGITS[label]
    return _CAPTIONS[int(rng.integers(len(_CAPTIONS)))].format(name)


def enlarge(scan: np.ndarray, image_size: int) -> np.ndarray:
    """Enlarges a scan smoothly.

    Args:
      scan: float [8, 8], ink from 0 to 16.
      image_size: the side of the result, in pixels.

    Returns:
      uint8 [image_size, image_size, 3]: gray, white ink on black.
    """
    # The scans are cropped to the ink; strokes that end at the border look cut.
    scan = np.pad(scan, 1)
    gray = Image.fromarray((scan * (255 / _MAX_INK)).astype(np.float32))
    gray = gray.resize((image_size, image_size), Image.Resampling.BICUBIC)
    # Bicubic interpolation overshoots at edges.
    pixels = np.clip(np.rint(np.asarray(gray)), 0, 255).astype(np.uint8)
    return np.repeat(pixels[:, :, None], 3, axis=2)


def split_indices(split: str) -> list[int]:
    """Returns the scans of a split: always the same, whatever the seed of the captions.

    Args:
      split: "train" or "validation".

    Returns:
      Indices into scikit-learn's order, in the order of the records.
    """
    # Hashes rather than a generator's permutation: no release of NumPy can change the split.
    order = sorted(
        range(sum(SPLITS.values())),
        key=lambda index: hashlib.sha256(f"digits {index}".encode()).digest(),
    )
    num_train = SPLITS["train"]
    return order[:num_train] if split == "train" else order[num_train:]


def examples(
    split: str, *, image_size: int = 32, seed: int = 0
) -> Iterator[dict[str, bytes | int | str]]:
    """Yields the records of a split.

    Args:
      split: "train" (1,437 records) or "validation" (360).
      image_size: the side of the images, in pixels.
      seed: chooses the captions' phrasings; the images and the split do not depend on it.

    Yields:
      Features for `record_writer.serialize`: img2dataset's, and `label`, the digit. The key is
      the scan's index in scikit-learn's order.

    Raises:
      UserError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UserError(
            "the digits data set is scikit-learn's, which is not installed: "
            "pip install 'clipa_t5x[digits]'"
        ) from error
    digits = cast(Mapping[str, np.ndarray], datasets.load_digits())
    split_id = list(SPLITS).index(split)
    for index in split_indices(split):
        label = int(digits["target"][index])
        yield record_writer.image_features(
            key=f"{index:08d}",
            image=enlarge(digits["images"][index], image_size),
            caption=caption(label, np.random.default_rng([seed, split_id, index])),
            labels={"label": label},
        )
