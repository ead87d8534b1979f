import itertools
import random

import numpy as np
import pytest
import tensorflow as tf

from clipa_t5x.data import preprocessors, text_reduction, vocabularies, word_classes
from clipa_t5x.errors import UserError

CLASSES = {
    "noun": ("dog", "cat", "beach"),
    "adjective": ("big", "red", "small"),
    "verb": ("ran", "sat"),
    "other": ("the", "a", "to", "on", "##s", "##er"),
}
PIECES = ["[PAD]", "[UNK]", "[CLS]", *itertools.chain(*CLASSES.values())]
RANDOM = ("random", "block")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n")
    classes = word_classes.classify_listed(PIECES, CLASSES)
    word_classes.write(str(path), classes, "by hand", "1")
    return vocabularies.BertVocabulary(str(path))


def numbered(*lengths):
    """Captions of one-piece words whose ids are their places, from 1."""
    return tf.ragged.constant([[[i + 1] for i in range(n)] for n in lengths], tf.int32, 2)


def seeds(count, first=0):
    return tf.constant([(first, i) for i in range(count)], tf.int64)


def shorten(vocabulary, texts, num_kept, strategy, first_seed=0):
    words = vocabulary.words_tf(tf.constant(texts))
    rows = text_reduction.reduce(
        words, num_kept, strategy, vocabulary=vocabulary, seeds=seeds(len(texts), first_seed)
    )
    return [" ".join(PIECES[i] for i in row) for row in rows.to_list()]


# ------------------------------------------------------------------------ by hand

SENTENCE = "the big red dog ran to the small cat"


@pytest.mark.parametrize("num_kept, kept", [
    (0, ""),
    (1, "dog"),
    (2, "dog cat"),
    (3, "big dog cat"),
    (4, "big red dog cat"),
    (5, "big red dog small cat"),
    (6, "big red dog ran small cat"),
    (7, "the big red dog ran small cat"),
    (8, "the big red dog ran to small cat"),
    (9, SENTENCE),
    (20, SENTENCE),
])  # fmt: skip
def test_syntax_keeps_nouns_adjectives_verbs_then_others(vocabulary, num_kept, kept):
    assert shorten(vocabulary, [SENTENCE], num_kept, "syntax") == [kept]


@pytest.mark.parametrize("text, num_kept, kept", [
    # Five words for three places: two nouns and the adjective stay, of five pieces.
    ("a dogs on cats red", 3, "dog ##s cat"),
    ("a dogs on cats red", 4, "a dog ##s cat"),
    # A word counts by its first piece.
    ("the smaller cats ran", 2, "small ##er"),
    ("the smaller cats ran", 3, "small ##er cat"),
    # Three words fit into three places, so that no word is left out: their pieces are cut.
    ("on dogs cats", 3, "on dog ##s"),
    ("on dogs cats", 5, "on dog ##s cat ##s"),
    ("dogs", 1, "dog"),
    # What is no word of the vocabulary is [UNK], of class 4 here.
    ("zebra a dog xylophone", 3, "[UNK] a dog"),
])  # fmt: skip
def test_syntax_with_words_of_several_pieces(vocabulary, text, num_kept, kept):
    assert shorten(vocabulary, [text], num_kept, "syntax") == [kept]


@pytest.mark.parametrize("strategy", text_reduction.STRATEGIES)
def test_short_captions_are_kept_whole(vocabulary, strategy):
    texts = ["", "dog", "the small dogs ran", "a big red cat on the beach"]
    pieces = ["", "dog", "the small dog ##s ran", "a big red cat on the beach"]
    for num_kept in (7, 30):
        assert shorten(vocabulary, texts * 5, num_kept, strategy) == pieces * 5


def test_truncation_keeps_the_first_pieces(vocabulary):
    assert shorten(vocabulary, ["the small dogs ran"], 3, "truncate") == ["the small dog"]
    assert shorten(vocabulary, ["dogs ran"], 2, "truncate") == ["dog ##s"]


def test_a_block_has_one_of_the_starts():
    rows = text_reduction.block(numbered(*[6] * 200).merge_dims(1, 2), 4, seeds(200)).to_list()
    assert {tuple(row) for row in rows} == {(1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)}


# ------------------------------------------------------------------------ in general


@pytest.mark.parametrize("strategy", text_reduction.STRATEGIES)
@pytest.mark.parametrize("num_kept", [0, 1, 7, 31])
def test_counts_and_order(vocabulary, strategy, num_kept):
    lengths = [0, 1, 6, 7, 8, 9, 30, 31, 32, 100]
    words = tf.ragged.constant(
        [[[3 + i % 11] for i in range(n)] for n in lengths], tf.int32, ragged_rank=2
    )
    rows = text_reduction.reduce(
        words, num_kept, strategy, vocabulary=vocabulary, seeds=seeds(len(lengths))
    )
    assert (rows.dtype, rows.shape.rank) == (tf.int32, 2)
    assert rows.row_lengths().numpy().tolist() == [min(n, num_kept) for n in lengths]
    for row, caption in zip(rows.to_list(), words.merge_dims(1, 2).to_list(), strict=True):
        rest = iter(caption)
        assert all(piece in rest for piece in row), "a subsequence of the caption"


def test_syntax_equals_a_sort_in_python():
    """Of any length: neither 16 words nor more may come out of order."""
    rng = random.Random(0)
    classes = np.array([rng.randint(1, 4) for _ in range(50)])
    for size in (0, 5, 17, 33, 200):
        texts = [
            [
                [rng.randrange(50) for _ in range(rng.randint(1, 3))]
                for _ in range(rng.randint(0, size))
            ]
            for _ in range(20)
        ]
        for num_kept in (1, 7, 16, 31):
            words = tf.ragged.constant(texts, tf.int32, ragged_rank=2)
            found = text_reduction.syntax(words, num_kept, classes).to_list()
            for text, row in zip(texts, found, strict=True):
                ranked = sorted(range(len(text)), key=lambda i, text=text: classes[text[i][0]])
                kept = [text[i] for i in sorted(ranked[:num_kept])]
                assert row == [piece for word in kept for piece in word]


def test_hundreds_of_words_of_a_class_stay_in_order():
    classes = np.full(1000, word_classes.NOUN)
    kept = text_reduction.syntax(numbered(999), 500, classes).to_list()
    assert kept == [list(range(1, 501))]


def chi_square(counts, expected):
    """How many standard deviations the statistic lies above its mean, of equal expectations."""
    statistic = float(np.sum((np.asarray(counts) - expected) ** 2) / expected)
    freedom = len(counts) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


def test_random_draws_every_set_equally_often():
    draws, each = 21_000, 100
    pieces = tf.tile(tf.range(1, 11, dtype=tf.int32)[None], [draws, 1])
    rows = text_reduction.random(tf.RaggedTensor.from_tensor(pieces), 4, seeds(draws)).to_list()
    sets = list(itertools.combinations(range(1, 11), 4))  # 210, each in order
    counts = dict.fromkeys(sets, 0)
    for row in rows:
        counts[tuple(row)] += 1
    assert abs(chi_square(list(counts.values()), each)) < 4


def test_block_draws_every_start_equally_often():
    draws = 16_000
    pieces = tf.tile(tf.range(11, dtype=tf.int32)[None], [draws, 1])
    rows = (
        text_reduction.block(tf.RaggedTensor.from_tensor(pieces), 4, seeds(draws))
        .to_tensor()
        .numpy()
    )
    np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(4))
    counts = np.bincount(rows[:, 0])
    assert len(counts) == 8  # starts 0 to 7, so that the last piece is as good as any
    assert abs(chi_square(counts, draws / 8)) < 4


# ------------------------------------------------------------------------ in pipelines

TEXTS = [
    "", "a red cat", SENTENCE, "the dogs ran to the beach " * 4, "zebra , xylophone", "big cats",
]  # fmt: skip


@pytest.mark.parametrize("strategy", text_reduction.STRATEGIES)
def test_batched_one_by_one_and_in_a_dataset_alike(vocabulary, strategy):
    keys = tf.constant([(5, 7 * i) for i in range(len(TEXTS))], tf.int64)
    batch = preprocessors.tokenize(tf.constant(TEXTS), vocabulary, 6, strategy, keys).numpy()
    again = preprocessors.tokenize(tf.constant(TEXTS), vocabulary, 6, strategy, keys).numpy()
    np.testing.assert_array_equal(again, batch)
    assert (batch.shape, batch.dtype) == ((len(TEXTS), 6), np.int32)
    assert set(batch[:, 0]) == {vocabulary.cls_id}

    def tokenize(text, key):
        return preprocessors.tokenize(text, vocabulary, 6, strategy, key)

    ds = tf.data.Dataset.from_tensor_slices((tf.constant(TEXTS), keys))
    ds = ds.map(preprocessors.as_written(tokenize), num_parallel_calls=2)
    for i, row in enumerate(ds.as_numpy_iterator()):
        np.testing.assert_array_equal(row, batch[i])
    np.testing.assert_array_equal(tokenize(tf.constant(TEXTS[3]), keys[3]), batch[3])
    square = preprocessors.tokenize(
        tf.reshape(tf.constant(TEXTS), [2, 3]), vocabulary, 6, strategy, tf.reshape(keys, [2, 3, 2])
    )
    np.testing.assert_array_equal(square.numpy().reshape(-1, 6), batch)


@pytest.mark.parametrize("strategy", RANDOM)
def test_other_seeds_keep_other_pieces(vocabulary, strategy):
    kept = [shorten(vocabulary, [SENTENCE] * 20, 4, strategy, first) for first in (0, 1)]
    assert kept[0] != kept[1]
    assert min(len(set(rows)) for rows in kept) >= 5


@pytest.mark.parametrize("strategy", text_reduction.STRATEGIES)
def test_no_captions_at_all(vocabulary, strategy):
    ids = preprocessors.tokenize(tf.constant([], tf.string), vocabulary, 6, strategy)
    assert ids.shape == (0, 6)
    ids = preprocessors.tokenize(tf.constant(["", ""]), vocabulary, 6, strategy).numpy()
    assert ids.tolist() == [[vocabulary.cls_id, 0, 0, 0, 0, 0]] * 2


# ------------------------------------------------------------------------ errors


def test_an_unknown_strategy_lists_the_options(vocabulary):
    for call in (
        lambda: text_reduction.check("sintax"),
        lambda: preprocessors.tokenize(tf.constant("a"), vocabulary, 8, "sintax"),
        lambda: preprocessors.TextFeature(vocabulary, reduction="sintax"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        message = str(caught.value)
        assert "TEXT_REDUCTION is 'sintax'" in message
        assert "\n" not in message
        for strategy in text_reduction.STRATEGIES:
            assert repr(strategy) in message


def test_only_syntax_needs_the_table(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n")
    bare = vocabularies.BertVocabulary(str(path))
    for strategy in ("truncate", *RANDOM):
        text_reduction.check(strategy, bare)
        assert shorten(bare, [SENTENCE], 2, strategy)
    for call in (
        lambda: text_reduction.check("syntax", bare),
        lambda: preprocessors.TextFeature(bare, reduction="syntax").check(),
        lambda: preprocessors.tokenize(tf.constant("a"), bare, 8, "syntax"),
    ):
        with pytest.raises(UserError, match="vocab.tags.json.*does not exist.*data.build tags"):
            call()
