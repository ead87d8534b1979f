import hashlib
import json
import pathlib
import sys

import numpy as np
import pytest

from clipa_t5x.data import vocabularies, word_classes
from clipa_t5x.errors import UserError

BERT = pathlib.Path(__file__).parents[3] / "shared/data/bert_uncased_vocab.txt"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "dog", "red", "run", "of"]
CLASSES = [4, 4, 4, 1, 2, 3, 4]


@pytest.fixture
def path(tmp_path):
    """A vocabulary with its table."""
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n")
    word_classes.write(str(path), CLASSES, "by hand", "2")
    return path


@pytest.mark.parametrize("tags, kind", [
    (["NN"], "noun"), (["NNS"], "noun"), (["NNP"], "noun"), (["NNP-PERS"], "noun"),
    (["JJ"], "adjective"), (["JJR"], "adjective"), (["VB"], "verb"), (["VBZ"], "verb"),
    (["IN"], "other"), (["CD"], "other"), (["PRP"], "other"), (["."], "other"), ([], "other"),
    (["#", "#", "VBG"], "verb"), (["NN", "IN"], "other"),
])  # fmt: skip
def test_the_last_tokens_tag_makes_the_class(tags, kind):
    assert word_classes.class_of(tags) == word_classes.NAMES[kind]


def test_every_piece_is_tagged_by_itself():
    seen = []

    def tag(text):
        seen.append(text)
        return ["VB"] if text == "run" else []

    classes = word_classes.classify(PIECES, word_classes.Tagger("x", "1", tag))
    assert classes == [4, 4, 4, 4, 4, 3, 4]
    assert seen == PIECES


def test_listed_words():
    listed = {"noun": ("dog", "cat"), "adjective": ("red",), "verb": ("run",)}
    assert word_classes.classify_listed(PIECES, listed) == CLASSES
    assert word_classes.counts(CLASSES) == {"noun": 1, "adjective": 1, "verb": 1, "other": 4}


def test_what_is_written_is_read(path):
    found = vocabularies.BertVocabulary(str(path)).word_classes
    np.testing.assert_array_equal(found, CLASSES)
    assert found.dtype == np.int64
    table = json.loads((path.parent / "vocab.tags.json").read_text())
    assert (table["tagger"], table["tagger_version"], table["vocabulary_size"]) == (
        "by hand",
        "2",
        7,
    )
    assert table["vocabulary_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_table_lies_beside_the_vocabulary():
    assert word_classes.table_path("gs://b/vocab.txt") == "gs://b/vocab.tags.json"
    assert word_classes.table_path("data/vocab") == "data/vocab.tags.json"


def refused(path, *parts):
    with pytest.raises(UserError) as caught:
        _ = vocabularies.BertVocabulary(str(path)).word_classes
    message = str(caught.value)
    assert "\n" not in message
    command = f"python -m clipa_t5x.data.build tags --vocabulary_path={path}"
    for part in (str(path.with_suffix(".tags.json")), command, *parts):
        assert part in message


def test_a_missing_table(path):
    path.with_suffix(".tags.json").unlink()
    refused(path, "does not exist", "TEXT_REDUCTION is 'syntax'")


def test_the_table_of_another_vocabulary(path):
    path.write_text("\n".join([*PIECES, "cat"]) + "\n")
    refused(path, "is of 7 pieces", "has 8")
    path.write_text("\n".join([*PIECES[:-1], "to"]) + "\n")
    refused(path, "SHA-256", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("change", [
    {"classes": [1, 2, 3, 4, 5, 1, 1]},
    {"classes": ["noun"] * 7},
    {"classes": None},
    {"classes": [[1]] * 7},
])  # fmt: skip
def test_a_table_of_something_else(path, change):
    table = path.with_suffix(".tags.json")
    table.write_text(json.dumps({**json.loads(table.read_text()), **change}))
    refused(path, "is no table of word classes")


@pytest.mark.parametrize("text", ["", "[1, 2]", "{}", "{", '{"classes": [1]}', "7"])
def test_a_file_that_is_no_table(path, text):
    path.with_suffix(".tags.json").write_text(text)
    refused(path, "is no table of word classes")


def test_a_table_cut_short(path):
    table = path.with_suffix(".tags.json")
    table.write_text(table.read_text()[:-20])
    refused(path, "is no table of word classes")


@pytest.mark.parametrize("tagger, module, remedy", [
    ("textblob", "textblob", "pip install 'clipa_t5x[tags]'"),
    ("nltk", "nltk", "pip install nltk"),
])  # fmt: skip
def test_a_tagger_that_is_not_installed(monkeypatch, tagger, module, remedy):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        word_classes.TAGGERS[tagger]()
    assert f"--tagger={tagger}" in str(caught.value)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nltk_without_its_data(monkeypatch):
    class Nltk:
        @staticmethod
        def word_tokenize(text):
            raise LookupError(f"no punkt_tab for {text}")

        pos_tag = None

    monkeypatch.setitem(sys.modules, "nltk", Nltk)
    with pytest.raises(UserError, match="needs NLTK's data.*punkt_tab.*--tagger=textblob"):
        word_classes.nltk_tagger()


def test_nltk_tags_tokens(monkeypatch):
    class Nltk:
        word_tokenize = staticmethod(str.split)
        pos_tag = staticmethod(lambda tokens: [(token, token.upper()) for token in tokens])

    monkeypatch.setitem(sys.modules, "nltk", Nltk)
    monkeypatch.setattr(word_classes.metadata, "version", lambda name: f"{name}'s")
    tagger = word_classes.nltk_tagger()
    assert (tagger.name, tagger.version, tagger.tag("a bc")) == ("nltk", "nltk's", ["A", "BC"])


def test_textblob():
    pytest.importorskip("textblob")
    tagger = word_classes.textblob_tagger()
    assert tagger.name == "textblob"
    words = ["dog", "red", "is", "##ing", "of", "!", "[CLS]", "7"]
    assert word_classes.classify(words, tagger) == [1, 2, 3, 3, 4, 4, 1, 4]


def test_class_sizes_of_the_papers_vocabulary():
    """As textblob 0.20.1 counts; CLIPA's own, of NLTK: 23,612, 1,590, 3,384 and 1,937."""
    pytest.importorskip("textblob")
    if not BERT.exists():
        pytest.skip("needs bert-base-uncased's vocabulary at ../shared/data/bert_uncased_vocab.txt")
    pieces = vocabularies.BertVocabulary(str(BERT)).pieces
    sizes = word_classes.counts(word_classes.classify(pieces, word_classes.textblob_tagger()))
    assert sizes == {"noun": 21_486, "adjective": 2_532, "verb": 4_643, "other": 1_861}


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"[" * 100_000, b'{"classes":' * 5000])
def test_binary_files_and_nests_are_no_table(path, content):
    path.with_suffix(".tags.json").write_bytes(content)
    refused(path, "is no table of word classes")


@pytest.mark.parametrize("change", [{"vocabulary_size": []}, {"vocabulary_sha256": None}])
def test_facts_of_other_types_are_no_table(path, change):
    table = path.with_suffix(".tags.json")
    table.write_text(json.dumps({**json.loads(table.read_text()), **change}))
    refused(path, "is no table of word classes")
