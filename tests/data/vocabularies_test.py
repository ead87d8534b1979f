import os
import pathlib
import random
import string
import unicodedata

import numpy as np
import pytest
import seqio
import tensorflow as tf

from clipa_t5x.data import preprocessors, vocabularies
from clipa_t5x.errors import UserError

BERT = pathlib.Path(__file__).parents[3] / "shared/data/bert_uncased_vocab.txt"
LATIN = """photo Photograph VINTAGE t-shirt naïve Café crème-brûlée Zürich façade coöperate
    jalapeño São_Paulo Łódź Ångström unbelievably photosynthesis antidisestablishmentarianism
    1970s $19.99 50% C++ #sunset @user http://example.com/a?b=c&d=e 3x4 IMG_2034.JPG don't it's
    “quoted” ‘so’ em—dash … ½ № ™ xyzzyqwv zzzzqqqqxx supercalifragilisticexpialidocious a an of"""
OTHER = "漢字 東京タワー 北京市 москва Ελλάδα עברית العربية हिन्दी 한국어 🙂 👩‍🚀"
SPECIAL = "[PAD]\n[UNK]\n[CLS]\n"


@pytest.fixture(scope="module")
def bert():
    if not BERT.exists():
        pytest.skip("needs bert-base-uncased's vocabulary at ../shared/data/bert_uncased_vocab.txt")
    return vocabularies.BertVocabulary(str(BERT))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text(SPECIAL + "a\nb\n##b\n,\ncafe\n")
    return vocabularies.BertVocabulary(str(path))


def pieces_of(text: str) -> list[str]:
    """BERT's basic tokenisation, from its description; TensorFlow's also folds ½, № and …."""
    words, word = [], ""
    for c in unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text).casefold()):
        if unicodedata.category(c) == "Mn":
            continue
        cjk = 0x4E00 <= ord(c) <= 0x9FFF or 0x3400 <= ord(c) <= 0x4DBF
        if c in string.punctuation or unicodedata.category(c)[0] == "P" or cjk:
            words, word = [*words, word, c], ""
        elif c.isspace():
            words, word = [*words, word], ""
        else:
            word += c
    return [w for w in [*words, word] if w]


def wordpiece(text: str, ids: dict[str, int]) -> list[int]:
    """Greedy longest match, word by word."""
    result = []
    for word in pieces_of(text):
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in ids:
                    break
            else:
                found = [ids["[UNK]"]]
                break
            found.append(ids[piece])
            start = end
        result += found
    return result


def captions(count: int) -> list[str]:
    """Captions such as the web has: cases, accents, scripts, numbers, marks, odd spaces."""
    rng = random.Random(0)
    words = f"{LATIN} {OTHER}".split()
    marks = ("", "", "", ",", "!", ".")
    spaces = (" ", "  ", "\t", "\n", "\u00a0", "\u3000")
    texts = []
    for _ in range(count):
        chosen = rng.choices(words, k=rng.randint(1, 9))
        texts.append("".join(w + rng.choice(marks) + rng.choice(spaces) for w in chosen))
    return texts


def test_ids_of_the_papers_vocabulary(bert):
    assert (bert.pad_id, bert.unk_id, bert.cls_id, bert.bos_id) == (0, 100, 101, 101)
    assert bert.eos_id is None
    assert bert.vocab_size == 30_522
    assert [bert.pieces[i] for i in (0, 100, 101, 102, 103)] == [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    ]  # fmt: skip


@pytest.mark.parametrize("text, ids", [
    ("a photo of a cat", [1037, 6302, 1997, 1037, 4937]),
    ("A PHOTO of a Cat", [1037, 6302, 1997, 1037, 4937]),
    ("Café", [7668]),
    ("cafe", [7668]),
    ("hello, world!", [7592, 1010, 2088, 999]),
    ("don't", [2123, 1005, 1056]),
    ("embedding", [7861, 8270, 4667]),
    ("東京", [1879, 1755]),
    ("🙂", [100]),
    ("a 🙂 b", [1037, 100, 1038]),
    ("x" * 300, [100]),
    ("", []),
    (" \t\n ", []),
])  # fmt: skip
def test_known_ids(bert, text, ids):
    assert bert.encode(text) == ids


def test_equals_an_independent_wordpiece(bert):
    ids = {piece: i for i, piece in enumerate(BERT.read_text("utf-8").split("\n")[:-1])}
    texts = captions(400)
    encoded = bert.encode_tf(tf.constant(texts)).to_list()
    for text, found in zip(texts, encoded, strict=True):
        assert found == wordpiece(text, ids), text
    assert any(bert.unk_id in row for row in encoded)
    assert any(bert.pieces[i].startswith("##") for row in encoded for i in row)


def test_a_text_of_five_words_in_eight_positions(bert):
    """CLIPA's layout: [CLS], pieces, zeros; neither [SEP] nor an end token."""
    ids = preprocessors.tokenize(tf.constant("two dogs on the beach"), bert, 8).numpy()
    assert ids.tolist() == [101, 2048, 6077, 2006, 1996, 3509, 0, 0]


def test_a_very_long_text(bert):
    text = "red square , " * 8000  # 104 kB
    assert bert.encode(text) == bert.encode("red square ,") * 8000
    ids = preprocessors.tokenize(tf.constant(text), bert, 32).numpy()
    assert ids.shape == (32,)
    assert ids[1:].tolist() == (bert.encode("red square ,") * 11)[:31]


def test_python_and_tensorflow_encode_alike(bert):
    for text in captions(30):
        assert bert.encode(text) == bert.encode_tf(tf.constant(text)).numpy().tolist()
        assert bert.encode_tf(tf.constant(text)).dtype == tf.int32


def test_encode_works_in_a_graph(small):
    ds = tf.data.Dataset.from_tensor_slices(["a b", "", "abb, Café zz"])
    rows = list(ds.map(small.encode_tf).as_numpy_iterator())
    assert [row.tolist() for row in rows] == [[3, 4], [], [3, 5, 5, 6, 7, 1]]


def test_decoding_keeps_the_pieces(bert):
    for text in captions(30):
        ids = [i for i in bert.encode(text) if i != bert.unk_id]
        assert bert.encode(bert.decode(ids)) == ids
    assert bert.decode(bert.encode("Embedding a café!")) == "embedding a cafe !"


def test_decode_leaves_out_what_is_no_text(small):
    assert small.decode([2, 3, 5, 6, 0, 0]) == "ab ,"
    assert small.decode([3, 10**6]) == "a [UNK]"
    assert small.decode([]) == ""


@pytest.mark.parametrize("ids, text", [
    ([2, 3, 5, 0], b"ab"),
    ([[2, 3, 5, 0], [2, 4, 3, 999]], [b"ab", b"b a [UNK]"]),
    ([[[3], [4]]], [[b"a", b"b"]]),
])  # fmt: skip
def test_decode_tf_of_any_rank(small, ids, text):
    assert np.array(small.decode_tf(tf.constant(ids))).tolist() == text


def test_decode_tf_of_nothing(small):
    assert small.decode_tf(tf.zeros([0], tf.int32)).numpy() == b""
    assert small.decode_tf(tf.zeros([2, 0], tf.int32)).numpy().tolist() == [b"", b""]


def test_equality_is_by_file(small, tmp_path):
    same = vocabularies.BertVocabulary(small.path)
    assert same == small
    assert hash(same) == hash(small)
    assert small != vocabularies.BertVocabulary(str(tmp_path))
    assert small != seqio.PassThroughVocabulary(8)
    assert small.extra_ids == 0


def test_no_file_is_read_before_it_is_needed():
    vocabularies.BertVocabulary("/nowhere/vocab.txt")


def refused(path, *parts):
    vocabulary = vocabularies.BertVocabulary(str(path))
    for use in (lambda: vocabulary.vocab_size, lambda: vocabulary.encode("a")):
        with pytest.raises(UserError) as caught:
            use()
        message = str(caught.value)
        assert "\n" not in message
        for part in (str(path), "VOCABULARY_PATH", *parts):
            assert part in message


def test_a_missing_file(tmp_path):
    refused(tmp_path / "vocab.txt", "does not exist")
    refused(tmp_path, "does not exist")


@pytest.mark.parametrize("content, part", [
    (b"", "missing: ['[PAD]', '[UNK]', '[CLS]']"),
    (b"\xff\xd8\xff\xe0\x00\x10JFIF" * 100, "missing"),
    (b"[PAD]\n[UNK]\na\n", "missing: ['[CLS]']"),
    (b"a\n[PAD]\n[UNK]\n[CLS]\n", "first line must be [PAD]"),
    (b"[PAD]\n[UNK]\n[CLS]\na\nb\na\n", "line 4 is 'a', which occurs again"),
    (b"[PAD]\n[UNK]\n[CLS]\na\n\nb\n", "line 5 is empty"),
    (b"[PAD]\n[UNK]\n[CLS]\na\n\n", "line 5 is empty"),
])  # fmt: skip
def test_other_files_are_no_vocabulary(tmp_path, content, part):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    refused(path, "is not a WordPiece vocabulary", part)


@pytest.mark.parametrize("content, size", [
    (SPECIAL + "a\nb", 5),
    ((SPECIAL + "a\nb\n").replace("\n", "\r\n"), 5),
    (SPECIAL + "a\nb\nx\u2028y\n\u0085\nc\n", 8),
])  # fmt: skip
def test_lines_are_tensorflows(tmp_path, content, size):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content.encode())
    vocabulary = vocabularies.BertVocabulary(str(path))
    assert vocabulary.vocab_size == size
    words = [piece for piece in vocabulary.pieces if piece in "abc"]
    assert vocabulary.encode(" ".join(words)) == [vocabulary.pieces.index(w) for w in words]


def test_absurd_files_are_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"[PAD]\n[UNK]\n[CLS]\n" + b"x" * 10**6 + b"\n" + b"x" * 10**6 + b"\n")
    refused(path, "occurs again")
    path.write_bytes(np.random.default_rng(0).bytes(10**6))
    refused(path, "is not a WordPiece vocabulary")
    os.truncate(path, 2**40)
    with pytest.raises(UserError, match=f"has {2**40} bytes"):
        vocabularies.BertVocabulary(str(path)).pieces  # noqa: B018
