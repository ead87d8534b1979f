"""Metrics of classification, from predictions and labels of all examples: NumPy alone.

An example may have several labels: rows of `targets` end with -1. A prediction is right where it is
one of them.
"""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

_MOST_CLASSES, _MOST_CONFUSIONS = 10, 5


def hits(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Which predictions are right: bool [n, k] of int [n, k] and [n, labels]."""
    same = predictions[:, :, None] == targets[:, None, :]
    return (same & (targets >= 0)[:, None, :]).any(axis=2)


def by_class(right: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(labels that occur, sorted; [2, labels] numbers of examples and of right ones among them).

    Args:
      right: bool [n].
      labels: int [n, labels]; an example counts for each of its own.
    """
    rows, own = _pairs(labels)
    found, places = np.unique(own, return_inverse=True)
    counts = [np.bincount(places, w, len(found)) for w in (None, right[rows])]
    return found, np.asarray(counts, np.int64)


def _pairs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, labels) of all labels, each once a row."""
    rows, columns = np.nonzero(labels >= 0)
    pairs = np.unique(np.stack([rows, labels[rows, columns]], axis=1), axis=0)
    return pairs[:, 0], pairs[:, 1]


def mean_per_class_recall(right: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the labels that occur of the share of right ones; arguments as `by_class`."""
    _, (examples, correct) = by_class(right, labels)
    return float(np.mean(correct / examples))


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean over classes of the average precision of ranking all examples by a class's scores.

    Precision is taken at every score that occurs, so that equal scores count together; it is
    weighted by the share of the class's examples that have this score. Classes without examples
    are left out.

    Args:
      scores: float [n, classes].
      targets: int [n, labels].
    """
    rows, classes = _pairs(targets)
    truth = np.zeros(scores.shape, bool)
    truth[rows, classes] = True
    precisions = [_average_precision(scores[:, c], truth[:, c]) for c in np.unique(classes)]
    return float(np.mean(precisions))


def _average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    last_of_equals = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    found = np.cumsum(truth[order])[last_of_equals]
    precision = found / (last_of_equals + 1)
    return float(np.sum(np.diff(found, prepend=0) * precision) / found[-1])


def worst_classes(
    predictions: np.ndarray,
    right: np.ndarray,
    labels: np.ndarray,
    label_names: Sequence[str],
    class_names: Sequence[str],
) -> list[dict[str, Any]]:
    """The classes of lowest accuracy, worst first, and what they were taken for.

    Args:
      predictions: int [n], of the classes.
      right: bool [n].
      labels: int [n, labels].
      label_names: by label.
      class_names: by prediction.

    Returns:
      At most 10 of {'class', 'examples', 'correct', 'confused_with'}, the last at most 5 of
      {'class', 'examples'}, most frequent first.
    """
    found, (examples, correct) = by_class(right, labels)
    rows, own = _pairs(labels)
    worst = []
    for place in np.argsort(correct / examples, kind="stable")[:_MOST_CLASSES].tolist():
        taken = predictions[rows[(own == found[place]) & ~right[rows]]]
        confusions = collections.Counter(taken.tolist()).most_common(_MOST_CONFUSIONS)
        worst.append(
            {
                "class": label_names[int(found[place])],
                "examples": int(examples[place]),
                "correct": int(correct[place]),
                "confused_with": [
                    {"class": class_names[c], "examples": count} for c, count in confusions
                ],
            }
        )
    return worst
