import json

import pytest
import tiny_records

from clipa_t5x.data import preprocessors
from clipa_t5x.errors import UserError
from clipa_t5x.weights import open_clip_options, text_vocabularies

PIECES = 3 + len(tiny_records.WORDS)


@pytest.fixture
def cfg(tmp_path):
    return tiny_records.config(tiny_records.task("spoken", tmp_path, preprocessors.squash))


def folder(path, tokenizer="bert-base-uncased", pieces=None):
    """What there is beside weights."""
    path.mkdir()
    text = {"hf_tokenizer_name": tokenizer} if tokenizer else {}
    config = {"model_cfg": {"text_cfg": text}}
    (path / open_clip_options.CONFIG_FILE).write_text(json.dumps(config))
    if pieces:
        (path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    return str(path)


def test_the_vocabulary_of_the_weights(tmp_path, cfg):
    own = text_vocabularies.configured(cfg).pieces
    for source in ("w.npz", folder(tmp_path / "a"), folder(tmp_path / "b", pieces=own)):
        assert text_vocabularies.check_import(source, 64, cfg) == []
    other = [*own[:4], own[5], own[4], *own[6:]]
    with pytest.raises(UserError, match=r"differ from line 5 on.*set --gin.VOCABULARY_PATH="):
        text_vocabularies.check_import(folder(tmp_path / "c", pieces=other), 64, cfg)
    with pytest.raises(UserError, match=f"differ from line {PIECES + 1} on"):
        text_vocabularies.check_import(folder(tmp_path / "d", pieces=[*own, "more"]), 64, cfg)


def test_byte_pair_encoding_is_warned_of(tmp_path, cfg):
    for source, rows in ((folder(tmp_path / "a", None), 300), ("w.npz", 49_408)):
        (warning,) = text_vocabularies.check_import(source, rows, cfg)
        assert "byte-pair encoding" in warning and "WordPiece only" in warning
    assert text_vocabularies.check_import(folder(tmp_path / "b"), 49_408, cfg) == []


def test_a_vocabulary_that_is_not_there_or_too_large_is_warned_of(tmp_path, cfg):
    (warning,) = text_vocabularies.check_import("w.npz", PIECES - 1, cfg)
    assert f"{PIECES} pieces and the token table {PIECES - 1} rows" in warning
    vocabulary = tiny_records.vocabularies.BertVocabulary("gone.txt")
    gone = tiny_records.config(
        tiny_records.task("unspoken", tmp_path, preprocessors.squash, vocabulary=vocabulary)
    )
    (warning,) = text_vocabularies.check_import("w.npz", 64, gone)
    assert "gone.txt does not exist: set VOCABULARY_PATH" in warning


def test_what_is_exported_with_a_table(cfg):
    for rows in (PIECES, 32_000):
        assert len(text_vocabularies.for_export(cfg, rows).pieces) == PIECES
    for rows, words in ((PIECES - 1, "pieces and"), (49_408, "byte-pair encoding.*clipa or stab")):
        with pytest.raises(UserError, match=words):
            text_vocabularies.for_export(cfg, rows)
