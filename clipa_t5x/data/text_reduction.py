"""Fewer text tokens: which pieces of a caption a short sequence keeps.

The four strategies of CLIPA (Li et al., 2023, section 3). 'truncate' keeps the first pieces,
'random' any, 'block' neighbours, 'syntax' those of the words that say most. Kept pieces stay in
the caption's order, and a caption that is short enough is kept whole by all of them. Random ones
draw from the caption's own seed.
"""

import itertools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from clipa_t5x.data import splitmix, vocabularies, word_classes
from clipa_t5x.errors import UserError

STRATEGIES = ("truncate", "random", "block", "syntax")


def check(strategy: str, vocabulary: vocabularies.BertVocabulary | None = None) -> None:
    """Looks whether a strategy can be applied.

    Args:
      strategy: how captions are to be shortened.
      vocabulary: where given, its files are read as far as the strategy needs them.

    Raises:
      UserError: there is no such strategy, or its table of word classes is missing, damaged or
        another vocabulary's.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"TEXT_REDUCTION is {strategy!r}; it must be one of {list(STRATEGIES)}.")
    if strategy == "syntax" and vocabulary is not None:
        _ = vocabulary.word_classes


def reduce(
    words: tf.RaggedTensor,
    num_kept: int,
    strategy: str,
    *,
    vocabulary: vocabularies.BertVocabulary,
    seeds: tf.Tensor,
) -> tf.RaggedTensor:
    """Shortens captions.

    Args:
      words: int32 [n, (words), (pieces)], the ids of every word's pieces; no word is empty.
      num_kept: most pieces of a caption that are kept.
      strategy: one of `STRATEGIES`.
      vocabulary: whose classes of words 'syntax' goes by.
      seeds: int64 [n, 2], what 'random' and 'block' draw from.

    Returns:
      int32 [n, (at most num_kept)].

    Raises:
      UserError: as `check`.
    """
    check(strategy, vocabulary)
    return _shorten(words, num_kept, strategy, lambda: vocabulary.word_classes, seeds)


def _shorten(
    words: tf.RaggedTensor,
    num_kept: int,
    strategy: str,
    classes: Callable[[], np.ndarray | tf.Tensor],
    seeds: tf.Tensor,
) -> tf.RaggedTensor:
    """As `reduce`; only 'syntax' asks for the classes of whatever stands for pieces in `words`."""
    pieces = words.merge_dims(1, 2)
    choices: dict[str, Callable[[], tf.RaggedTensor]] = {
        "truncate": lambda: pieces,
        "random": lambda: random(pieces, num_kept, seeds),
        "block": lambda: block(pieces, num_kept, seeds),
        "syntax": lambda: syntax(words, num_kept, classes()),
    }
    return choices[strategy]()[:, :num_kept]


def reduce_others(
    words: tf.RaggedTensor,
    kept: tf.RaggedTensor,
    num_kept: int,
    strategy: str,
    *,
    vocabulary: vocabularies.BertVocabulary,
    seeds: tf.Tensor,
) -> list[list[int]]:
    """Shortens texts of which some words are to stay: the others lose pieces before they do.

    Pieces of the words to keep come first; the room that they leave goes to the other words' pieces
    by the strategy. What stays is in the text's order. With 'truncate', a text whose first
    `num_kept` pieces include the words to keep is shortened as by `reduce`. Not for a graph.

    Args:
      words: as of `reduce`.
      kept: bool [n, (words)], the words that are to stay; of too many pieces the first do.
      num_kept: most pieces of a text that are kept.
      strategy: one of `STRATEGIES`, for the other words.
      vocabulary: as of `reduce`.
      seeds: as of `reduce`.

    Returns:
      Ids of each text's pieces.

    Raises:
      UserError: as `check`.
    """
    check(strategy, vocabulary)
    ids = words.flat_values.numpy()
    # Places instead of ids, so that what was kept can be put back in order.
    places = words.with_flat_values(tf.range(len(ids), dtype=tf.int32))
    first = tf.ragged.boolean_mask(places, kept).merge_dims(1, 2)[:, :num_kept]
    others = tf.ragged.boolean_mask(places, tf.logical_not(kept))
    room = num_kept - first.row_lengths().numpy()
    found = _rows(first)
    for size in np.unique(room):
        rows = np.flatnonzero(room == size)
        chosen = _shorten(
            tf.gather(others, rows), int(size), strategy,
            lambda: tf.gather(vocabulary.word_classes, ids), tf.gather(seeds, rows),
        )  # fmt: skip
        for row, more in zip(rows, _rows(chosen), strict=True):
            found[row] = sorted(found[row] + more)
    return [ids[row].tolist() for row in found]


def _rows(items: tf.RaggedTensor) -> list[list[int]]:
    """As `to_list`, which runs several TensorFlow operations for each row."""
    values, splits = items.values.numpy().tolist(), items.row_splits.numpy().tolist()
    return [values[a:b] for a, b in itertools.pairwise(splits)]


def random(pieces: tf.RaggedTensor, num_kept: int, seeds: tf.Tensor) -> tf.RaggedTensor:
    """Keeps pieces drawn without replacement, every set of them equally likely.

    Each piece of a caption of more than `num_kept` draws a number, and those with the lowest
    numbers stay, in the caption's order. Pieces are drawn, not words: a word may lose some of its
    own.

    Args:
      pieces: int32 [n, (pieces)].
      num_kept: pieces kept of each caption; a shorter one is kept whole.
      seeds: int64 [n, 2].

    Returns:
      int32 [n, (at most num_kept)].
    """
    draws = splitmix.uniform(seeds, pieces.bounding_shape(1))
    return _keep_lowest(pieces, draws, num_kept)


def block(pieces: tf.RaggedTensor, num_kept: int, seeds: tf.Tensor) -> tf.RaggedTensor:
    """Keeps `num_kept` neighbouring pieces; every start is equally likely, the last one included.

    Args:
      pieces: int32 [n, (pieces)].
      num_kept: pieces kept of each caption; a shorter one is kept whole.
      seeds: int64 [n, 2].

    Returns:
      int32 [n, (at most num_kept)].
    """
    num_starts = tf.maximum(pieces.row_lengths() - num_kept, 0) + 1
    draws = splitmix.uniform(seeds, 1)
    starts = tf.cast(tf.floor(draws * tf.cast(num_starts, tf.float64)[:, None]), tf.int64)
    places = tf.range(pieces.bounding_shape(1))[None, :]
    return _keep(pieces, (places >= starts) & (places < starts + num_kept))


def syntax(
    words: tf.RaggedTensor, num_kept: int, classes: np.ndarray | tf.Tensor
) -> tf.RaggedTensor:
    """Keeps the words that say most: nouns, then adjectives, verbs and all others.

    A word is of its first piece's class; of a class, the earlier words come first. A caption of
    more than `num_kept` words keeps the first so many of this ranking, in the caption's order, with
    all their pieces: so there may be more pieces than words, of which the caller takes the first.

    Args:
      words: int32 [n, (words), (pieces)]; no word is empty.
      num_kept: words kept of each caption.
      classes: int [vocabulary], see `word_classes`.

    Returns:
      int32 [n, (pieces)].
    """
    first_pieces = tf.gather(words.flat_values, words.values.row_starts())
    ranks = words.with_values(tf.gather(tf.cast(classes, tf.int64), first_pieces))
    dense = ranks.to_tensor(default_value=word_classes.OTHER + 1)
    # No two scores are equal, so that the order owes nothing to the sort's stability.
    width = tf.shape(dense, tf.int64)[1]
    scores = dense * width + tf.range(width)
    return _keep_lowest(words, scores, num_kept).merge_dims(1, 2)


def _keep_lowest(items: tf.RaggedTensor, scores: tf.Tensor, num_kept: int) -> tf.RaggedTensor:
    """Each row's `num_kept` items of the lowest scores (of [n, width], items first), in order."""
    present = tf.sequence_mask(items.row_lengths(), tf.shape(scores)[1])
    scores = tf.where(present, scores, scores.dtype.max)
    ranks = tf.argsort(tf.argsort(scores, axis=1), axis=1)
    return _keep(items, ranks < num_kept)


def _keep(items: tf.RaggedTensor, mask: tf.Tensor) -> tf.RaggedTensor:
    """The items that a mask, bool [n, width], marks; what it says beyond a row's end is ignored."""
    present = tf.sequence_mask(items.row_lengths(), tf.shape(mask)[1])
    return tf.ragged.boolean_mask(items, items.with_values(tf.boolean_mask(mask, present)))
