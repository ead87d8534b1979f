"""Class names, prompt templates and label maps: text files, one a line, given by path."""

import itertools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from clipa_t5x.data import preprocessors, text_files, text_reduction, vocabularies
from clipa_t5x.errors import UserError

_CLASS_NAME, _TEMPLATE = "class name", "prompt template"
# Of a label map: a label that stands for no class.
NO_CLASS = "-"


def read_lines(path: str, what: str, *, numbered: bool = False) -> list[str]:
    """The lines of a data file, without empty ones.

    Args:
      path: of the file.
      what: a line is, for errors.
      numbered: whether lines are referred to by number, so that an empty one above others would
        shift them: it is refused.

    Raises:
      UserError: the file is missing or empty, is no text, or is absurdly large; or see `numbered`.
    """
    if not tf.io.gfile.exists(path):
        raise UserError(
            f"{what} file {path} does not exist: give a text file, one {what} a line"
            f"{_written(what)}."
        )
    try:
        text = text_files.read(path, what).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} file {path} is no UTF-8 text ({error.reason} at byte {error.start}): give a "
            f"text file, one {what} a line."
        ) from error
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not lines:
        raise UserError(f"{what} file {path} is empty: write one {what} a line.")
    if numbered and "" in lines:
        raise UserError(
            f"line {lines.index('') + 1} of {what} file {path} is empty, and the lines below are "
            f"counted with it: write one {what} a line, and no line without."
        )
    return [line for line in lines if line]


def _written(what: str) -> str:
    """Where files of a kind come from, for those who lack one."""
    if what in (_CLASS_NAME, _TEMPLATE):
        return "; python -m clipa_t5x.data.build prompts writes ImageNet's"
    return ""


def read(class_names_path: str, templates_path: str) -> tuple[list[str], list[str]]:
    """(class names, templates with {} in the place of the name, for which {c} may stand, too).

    Raises:
      UserError: a file is missing or empty, a class name's line is empty, or a template has
        neither.
    """
    classes = read_lines(class_names_path, _CLASS_NAME, numbered=True)
    templates = read_lines(templates_path, _TEMPLATE)
    for template in templates:
        if "{}" not in template and "{c}" not in template:
            raise UserError(
                f"template {template!r} in {templates_path} has no {{}}: put it where the class "
                "name goes."
            )
    return classes, [template.replace("{c}", "{}") for template in templates]


def prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """All prompts, a class's side by side."""
    return [t.replace("{}", name) for name in class_names for t in templates]


def read_label_map(path: str, num_classes: int) -> list[list[int]]:
    """Which classes of a list each label of a data set stands for.

    Line i is of label i: line numbers from 0 in the class list, between blanks, or '-' for none.

    Args:
      path: of the text file.
      num_classes: lines of the class list.

    Raises:
      UserError: the file is missing or empty, or a line is empty or neither.
    """
    classes = []
    for number, line in enumerate(read_lines(path, "label map", numbered=True)):
        parts = [] if line == NO_CLASS else line.split()
        if not all(part.isdecimal() and int(part) < num_classes for part in parts):
            raise UserError(
                f"line {number + 1} of label map file {path} is {line!r}: write which of the "
                f"{num_classes} classes this label stands for, by line numbers from 0 to "
                f"{num_classes - 1}, or {NO_CLASS} for none."
            )
        classes.append([int(part) for part in parts])
    if not any(classes):
        raise UserError(f"label map file {path} names no class: write one line a label.")
    return classes


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


def tokenize_around_names(
    class_names: Sequence[str],
    templates: Sequence[str],
    vocabulary: vocabularies.BertVocabulary,
    length: int,
    reduction: str = "truncate",
) -> np.ndarray:
    """As `tokenize` of `prompts`, but what is too long loses pieces of the template first.

    All pieces of the class name stay that fit, and of the template what the reduction chooses for
    the room that is left. Where a template names the class again, that is the template's.

    Returns:
      int32 [classes x templates, length].

    Raises:
      UserError: as `preprocessors.tokenize`.
    """
    parts = [t.partition("{}") for t in templates]
    before = _words([part[0] for part in parts], vocabulary) * len(class_names)
    after = _words([p[2].replace("{}", c) for c in class_names for p in parts], vocabulary)
    texts = prompts(class_names, templates)
    words = vocabulary.words_tf(tf.constant(texts))
    named = [
        _is_between(whole, *around)
        for whole, *around in zip(_word_lists(words), before, after, strict=True)
    ]
    seeds = np.stack([np.zeros(len(texts), np.int64), np.arange(len(texts))], axis=1)
    mask = words.with_values(tf.constant(np.array([*itertools.chain(*named)], bool)))
    kept = text_reduction.reduce_others(
        words,
        mask,
        vocabulary.room(length),
        reduction,
        vocabulary=vocabulary,
        seeds=tf.constant(seeds),
    )
    ids = np.full((len(texts), length), vocabulary.pad_id, np.int32)
    for row, pieces in zip(ids, kept, strict=True):
        row[: 1 + len(pieces)] = [vocabulary.cls_id, *pieces]
    return ids


def _words(texts: Sequence[str], vocabulary: vocabularies.BertVocabulary) -> list[list[bytes]]:
    unique = dict.fromkeys(texts)
    found = _word_lists(vocabulary.words_tf(tf.constant([*unique])))
    by_text = dict(zip(unique, found, strict=True))
    return [by_text[text] for text in texts]


def _word_lists(words: tf.RaggedTensor) -> list[list[bytes]]:
    """The words of every text, each as the bytes of its pieces' ids.

    A ragged tensor's own `to_list` runs several TensorFlow operations for each of them.
    """
    ids = words.flat_values.numpy()
    data, size = ids.tobytes(), ids.itemsize
    pieces, rows = words.values.row_splits.numpy().tolist(), words.row_splits.numpy().tolist()
    flat = [data[size * a : size * b] for a, b in itertools.pairwise(pieces)]
    return [flat[a:b] for a, b in itertools.pairwise(rows)]


def _is_between(words: Sequence, before: Sequence, after: Sequence) -> list[bool]:
    """Which words of a text are neither those it begins with nor those it ends with.

    A word that the template and the class name share, as 'cats' of '{}s', is the name's.
    """
    first = _num_equal(words, before)
    last = len(words) - _num_equal(words[first:][::-1], after[::-1])
    return [first <= place < last for place in range(len(words))]


def _num_equal(words: Sequence, others: Sequence) -> int:
    pairs = enumerate(zip(words, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(words), len(others)))
