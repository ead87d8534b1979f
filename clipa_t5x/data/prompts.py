"""Class names and prompt templates: text files, one a line, given by path."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from clipa_t5x.data import preprocessors, text_files, vocabularies
from clipa_t5x.errors import UserError


def read_lines(path: str, what: str) -> list[str]:
    """The lines of a data file, without empty ones; `what` names them in errors.

    Raises:
      UserError: the file is missing or empty, is no text, or is absurdly large.
    """
    if not tf.io.gfile.exists(path):
        raise UserError(f"{what} file {path} does not exist: give a text file, one {what} a line.")
    try:
        text = text_files.read(path, what).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} file {path} is no UTF-8 text ({error.reason} at byte {error.start}): give a "
            f"text file, one {what} a line."
        ) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{what} file {path} is empty: write one {what} a line.")
    return lines


def prompts(class_names_path: str, templates_path: str) -> tuple[list[str], int]:
    """(all prompts, a class's side by side; number of prompts per class).

    Raises:
      UserError: a file is missing or empty, or a template has no {}.
    """
    classes = read_lines(class_names_path, "class name")
    templates = read_lines(templates_path, "prompt template")
    for template in templates:
        if "{}" not in template:
            raise UserError(
                f"template {template!r} in {templates_path} has no {{}}: put it where the class "
                "name goes."
            )
    return [t.replace("{}", name) for name in classes for t in templates], len(templates)


def tokenize(
    texts: Sequence[str],
    vocabulary: vocabularies.BertVocabulary,
    length: int,
    reduction: str = "truncate",
) -> np.ndarray:
    """Token ids, int32 [texts, length], exactly as training's; `reduction` is the task's, too.

    Random reductions draw from a text's place in the list, so that they are the same every time.

    Raises:
      UserError: as `preprocessors.tokenize`.
    """
    return preprocessors.tokenize(tf.constant(list(texts)), vocabulary, length, reduction).numpy()
