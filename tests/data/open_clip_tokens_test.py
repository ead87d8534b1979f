import importlib
import pathlib
import time

import pytest
import tensorflow as tf

from clipa_t5x.data import open_clip_tokens, preprocessors, prompts, text_reduction, vocabularies
from clipa_t5x.errors import UserError

BERT = pathlib.Path(__file__).parents[3] / "shared/data/bert_uncased_vocab.txt"
PIECES = (*open_clip_tokens.SPECIAL_TOKENS, "a", "b", "##b", "##bb", ",", "&", "cafe", "猫", ";")


@pytest.fixture
def without_ftfy(monkeypatch):
    """What mends nothing stands in for ftfy, which need not be installed."""
    monkeypatch.setattr(open_clip_tokens, "load_ftfy", lambda: lambda text: text)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("".join(f"{piece}\n" for piece in PIECES))
    return vocabularies.BertVocabulary(str(path), "open_clip")


@pytest.mark.parametrize("text, words", [
    ("A photo, of:Cats", ["a", "photo", ",", "of", ":", "cats"]),
    ("  \t\n ", []),
    ("Café crème naïve Zürich Ångström", ["cafe", "creme", "naive", "zurich", "angstrom"]),
    ("ΣΑΣ İstanbul Straße ſ", ["σασ", "istanbul", "straße", "ſ"]),
    ("½ ﬁ № …", ["½", "ﬁ", "№", "…"]),  # which CLIPA's takes apart
    ("$5^2+x_y", ["$", "5", "^", "2", "+", "x", "_", "y"]),
    ("東京a", ["東", "京", "a"]),
    ("한국", ["한국"]),
    ("a\0b\u200bc\ufeffd\x85e\ue000f\ufffdg", ["abcdefg"]),
    ("a\u3000b\u00a0c\u2028d", ["a", "b", "c", "d"]),
    ("🙂🎂 👩‍🚀", ["🙂🎂", "👩🚀"]),
    ("\U0001fae8", ["\U0001fae8"]),  # newer than this Python's tables
    ("a\u2e4fb", ["a\u2e4fb"]),  # punctuation, but not Unicode 8's
    ("a\u1ac0b \u1734", ["a\u1ac0b"]),  # a mark that Unicode 8 has not, and one that it has
])  # fmt: skip
def test_words(text, words):
    # Hangul comes apart into letters, as all that is composed.
    expected = [w if w != "한국" else "\u1112\u1161\u11ab\u1100\u116e\u11a8" for w in words]
    assert open_clip_tokens.split(text) == expected


@pytest.mark.parametrize("text, pieces", [
    ("", []),
    ("a bb abb abbb", [["a"], ["b", "##b"], ["a", "##bb"], ["a", "##bb", "##b"]]),
    ("ac", [["[UNK]"]]),
    ("Café猫", [["cafe"], ["猫"]]),
    ("a[MASK]b [PAD][CLS] [UNK]", [["a"], ["[MASK]"], ["b"], ["[PAD]"], ["[CLS]"], ["[UNK]"]]),
    ("a [SEP] b", [["a"], ["[PAD]"], ["b"]]),
    ("[sep]", [["[UNK]"]] * 3),
    ("b" * 100, [["b", *["##bb"] * 49, "##b"]]),
    ("b" * 101, [["[UNK]"]]),
    ("a" + "\u0301" * 200 + "b", [["a", "##b"]]),
])  # fmt: skip
def test_pieces(text, pieces):
    tokenizer = open_clip_tokens.Tokenizer({piece: i for i, piece in enumerate(PIECES)})
    found = [[PIECES[i] for i in word] for word in tokenizer.words(text)]
    assert found == pieces


def test_long_texts_take_no_longer_a_character():
    tokenizer = open_clip_tokens.Tokenizer({piece: i for i, piece in enumerate(PIECES)})

    def seconds(text):
        start = time.perf_counter()
        tokenizer.words(text)
        return time.perf_counter() - start

    assert seconds("b" * 100 + " b" * 50_000) < 5
    assert len(tokenizer.words("ab, " * 25_000)) == 50_000
    assert tokenizer.words("x" * 100_000) == [[PIECES.index("[UNK]")]]


@pytest.mark.parametrize("text, cleaned", [
    ("  a \n b\t", "a b"),
    ("Tom &amp; Jerry&#39;s", "Tom & Jerry's"),
    ("a &amp;lt; b", "a < b"),
    ("a &amp;amp;lt; b", "a &lt; b"),
    ("&nbsp; ", ""),
])  # fmt: skip
def test_cleaning(text, cleaned):
    assert open_clip_tokens.clean(text, lambda text: text) == cleaned


def test_encodings_are_mended():
    pytest.importorskip("ftfy", reason="ftfy is not installed: extra open_clip")
    fix_text = open_clip_tokens.load_ftfy()
    assert open_clip_tokens.clean("CafÃ© â€œx\u201d", fix_text) == 'Café "x"'


def test_ftfy_is_asked_for_where_it_is_missing(small, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    again = vocabularies.BertVocabulary(small.path, "open_clip")
    with pytest.raises(UserError, match=r"pip install 'clipa_t5x\[open_clip\]'"):
        again.encode("a")


def test_a_vocabulary_without_special_tokens_is_refused(tmp_path, without_ftfy):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\na\n")
    assert vocabularies.BertVocabulary(str(path)).encode("a") == [3]
    with pytest.raises(UserError, match=r"has no \[SEP\], \[MASK\].*VOCABULARY_PATH"):
        vocabularies.BertVocabulary(str(path), "open_clip").encode("a")


def test_an_unknown_tokenization_is_refused():
    with pytest.raises(UserError, match=r"TOKENIZATION is 'openclip'.*\['clipa', 'open_clip'\]"):
        vocabularies.BertVocabulary("vocab.txt", "openclip")


def test_tokenizations_are_different_vocabularies(small):
    clipa = vocabularies.BertVocabulary(small.path)
    assert clipa != small
    assert hash(clipa) != hash(small)
    assert small == vocabularies.BertVocabulary(small.path, tokenization="open_clip")


def test_the_last_position_is_padding(small, without_ftfy):
    """OpenCLIP's layout: BERT's [SEP] is there no more, nor is anything else in its place."""
    texts = tf.constant(["a a a a a a", "a a", "a [SEP] a", ""])
    ids = preprocessors.tokenize(texts, small, 6).numpy()
    a, cls = PIECES.index("a"), PIECES.index("[CLS]")
    assert ids.tolist() == [
        [cls, a, a, a, a, 0],
        [cls, a, a, 0, 0, 0],
        [cls, a, 0, a, 0, 0],
        [cls, 0, 0, 0, 0, 0],
    ]
    clipa = vocabularies.BertVocabulary(small.path)
    assert preprocessors.tokenize(texts, clipa, 6).numpy()[0].tolist() == [cls, *[a] * 5]
    assert preprocessors.tokenize(texts, small, 1).numpy().tolist() == [[cls]] * 4


def test_it_works_in_a_graph(small, without_ftfy):
    ds = tf.data.Dataset.from_tensor_slices(["a b &amp; b", "", "Café"]).batch(2)
    rows = ds.map(lambda texts: preprocessors.tokenize(texts, small, 6))
    found = [row.tolist() for batch in rows.as_numpy_iterator() for row in batch]
    a, b, amp, cls = (PIECES.index(p) for p in ("a", "b", "&", "[CLS]"))
    assert found == [
        [cls, a, b, amp, b, 0],
        [cls, *[0] * 5],
        [cls, PIECES.index("cafe"), *[0] * 4],
    ]


@pytest.mark.parametrize("strategy", ["truncate", "random", "block"])
def test_reductions_leave_the_last_position_alone(small, without_ftfy, strategy):
    assert strategy in text_reduction.STRATEGIES
    texts = tf.constant(["a b , & cafe 猫 ; a b", "a b"])
    ids = preprocessors.tokenize(texts, small, 6, strategy).numpy()
    assert ids[:, -1].tolist() == [0, 0]
    assert (ids[0, :-1] > 0).all()
    around = prompts.tokenize_around_names(["cafe"], ["a b , & {} ; a b"], small, 6, strategy)
    assert around.shape == (1, 6)
    assert around[0, -1] == 0
    assert PIECES.index("cafe") in around[0]


# As OpenCLIP's tokenizer gives them at a length of 32, without the zeros that follow.
KNOWN = [
    ("a photo of a cat", "101 1037 6302 1997 1037 4937"),
    ("Two dogs, one BROWN & one white, running on the beach!",
     "101 2048 6077 1010 2028 2829 1004 2028 2317 1010 2770 2006 1996 3509 999"),
    ("", "101"),
    ("Café crème à la façade — naïve résumé",
     "101 7668 13675 21382 1037 2474 8508 1517 15743 13746"),
    ("😀 happy birthday 🎂🎉 to you", "101 100 3407 5798 100 2000 2017"),
    ("日本の富士山 at sunrise", "101 1864 1876 1671 100 1807 1831 2012 13932"),
    ("a very long caption " * 12 + "ending with an elephant",
     "101 " + "1037 2200 2146 14408 3258 " * 6),
    ("Tom &amp; Jerry&#39;s &quot;best&quot; moments | IMG_2041.JPG (1920x1080) "
     "http://example.com/a_b?c=1",
     "101 3419 1004 6128 1005 1055 1000 2190 1000 5312 1064 10047 2290 1035 19627 2487 1012 16545 "
     "2290 1006 4444 2595 10790 17914 1007 8299 1024 1013 1013 2742 1012"),
]  # fmt: skip


@pytest.mark.skipif(
    not BERT.exists(), reason="needs BERT's vocabulary at ../shared/data/bert_uncased_vocab.txt"
)
def test_known_ids(without_ftfy):
    bert = vocabularies.BertVocabulary(str(BERT), "open_clip")
    ids = preprocessors.tokenize(tf.constant([text for text, _ in KNOWN]), bert, 32).numpy()
    for row, (text, expected) in zip(ids.tolist(), KNOWN, strict=True):
        known = [*map(int, expected.split())]
        assert row == known + [0] * (32 - len(known)), text
