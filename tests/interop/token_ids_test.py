"""Token ids against Hugging Face's BERT tokenizer and OpenCLIP's own."""

import importlib
import json
import pathlib
import random
import shutil
import unicodedata

import numpy as np
import pytest
import tensorflow as tf

from clipa_t5x.data import open_clip_tokens, preprocessors, vocabularies

BERT = pathlib.Path(__file__).parents[3] / "shared/data/bert_uncased_vocab.txt"
pytestmark = pytest.mark.skipif(
    not BERT.exists(), reason="needs BERT's vocabulary at ../shared/data/bert_uncased_vocab.txt"
)
NOUNS = """cat Dog ELEPHANT bicycle skyscraper photosynthesis xyzzyqwv t-shirt sunset"""
PLACES = """beach kitchen Times_Square mountain-top 2nd.floor http://example.com/a?b=c&d=e"""
ACCENTED = """Café crème-brûlée Zürich São_Paulo Łódź Ångström ΑΣ ΣΟΦΟΣ İstanbul Straße ſ Phở"""
SCRIPTS = """日本の富士山 東京タワー 漢字かな 北京市 москва Ελλάδα עברית العربية हिन्दी
    한국어 ไทย 𠀀 ﬁ ½ №"""
EMOJI = """😀 🎂🎉 👩‍🚀 ❤️ 🏳️‍🌈 🇯🇵 👍🏽 \U0001fae8 ™ … — “so” ‘it’"""
MARKUP = """&amp; &lt;b&gt; &#39; &quot;hi&quot; &nbsp; &amp;amp;
    CafÃ© donâ€™t [SEP] [CLS] [MASK] [unk]"""
TEMPLATES = (
    "a photo of a {} on the {}.",
    "{}, {}",
    "Two {}s & one {}, running!!!  $19.99 (50% off) #tag @user",
    "{}\t{}\n",
    "IMG_2041.JPG|{}|{}|1920x1080",
    "very " * 20 + "{} {}",
)


def ascii_captions() -> list[str]:
    return [
        t.format(noun, place)
        for t in TEMPLATES
        for noun in NOUNS.split()
        for place in PLACES.split()
    ]


def captions() -> list[str]:
    """2,652, the same every time: templates, scripts, markup, and all of Unicode."""
    rng = random.Random(0)
    words = " ".join([NOUNS, PLACES, ACCENTED, SCRIPTS, EMOJI, MARKUP]).split()
    spaces = (" ", "  ", "\n", "\u00a0", "\u3000", "\u200b", "")
    mixed = [
        "".join(rng.choice(words) + rng.choice(spaces) for _ in range(rng.randint(1, 40)))
        for _ in range(1500)
    ]
    blocks = [
        "".join(f"{c}a{c}" for c in map(chr, range(start, start + 64)) if c.isprintable())
        for start in range(0x20, 0x1000, 64)
    ]
    anything = [
        "".join(map(chr, rng.choices([*range(1, 0xD800), *range(0xE000, 0x20000)], k=20)))
        for _ in range(750)
    ]
    odd = [
        "",
        " ",
        "\t\n \n",
        "\0a\0",
        "a\u0301" * 99,
        "x" * 100,
        "x" * 101,
        "é" * 60,
        "[SEP" * 9,
        "<b>&amp;lt;",
    ]
    long = ["red square, " * 8400, "x" * 100_000, "日本" * 17_000, "&amp;" * 20_000]
    return [*ascii_captions(), *mixed, *blocks, *anything, *odd, *long]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as an export writes it."""
    path = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(BERT, path / "vocab.txt")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def bert(folder):
    """Hugging Face's tokenizer."""
    for name in ("ftfy", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed: extra interop")
    return importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder)


def ids_of(texts, length, tokenization):
    vocabulary = vocabularies.BertVocabulary(str(BERT), tokenization)
    return preprocessors.tokenize(tf.constant(texts), vocabulary, length).numpy()


def assert_same(found, expected, texts):
    for row, other, text in zip(found.tolist(), np.asarray(expected).tolist(), texts, strict=True):
        assert row == other, ascii(text[:200])


@pytest.mark.parametrize("length", [8, 16, 32, 77])
def test_ids_are_open_clips(open_clip, bert, folder, length):
    theirs = open_clip.tokenizer.HFTokenizer(
        str(folder), context_length=length, clean="whitespace", strip_sep_token=True
    )
    texts = captions()
    assert len(texts) > 2_500
    found = ids_of(texts, length, "open_clip")
    assert_same(found, theirs(texts), texts)
    assert (found[:, -1] == 0).all()


def test_pieces_are_hugging_faces_of_texts_as_they_are(bert):
    """Without OpenCLIP's cleaning: [SEP], where a text spells it out, apart."""
    texts = captions()
    sep = bert.sep_token_id
    tokenizer = open_clip_tokens.Tokenizer(bert.get_vocab())
    expected = bert(texts, add_special_tokens=False).input_ids
    for text, ids in zip(texts, expected, strict=True):
        found = [piece for word in tokenizer.words(text) for piece in word]
        assert found == [0 if i == sep else i for i in ids], ascii(text[:200])


def test_every_character_is_hugging_faces(bert):
    """Of all that Unicode assigns, but for U+11938, which newer tables than theirs take apart."""
    characters = [
        c for c in map(chr, range(0x110000))
        if unicodedata.category(c) not in ("Cn", "Cs", "Co") and c != "\U00011938"
    ]  # fmt: skip
    normalize = bert.backend_tokenizer.normalizer.normalize_str
    split = bert.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    differ = [
        c for c in characters
        if open_clip_tokens.split(f"a{c}b") != [word for word, _ in split(normalize(f"a{c}b"))]
    ]  # fmt: skip
    assert not differ


def test_clipas_ids_are_berts_but_for_sep(bert):
    """Of ASCII texts that leave room for [SEP]: CLIPA's has none, and a piece more in its place."""
    texts = ascii_captions()
    pieces = bert(texts, add_special_tokens=False).input_ids
    short = [text for text, ids in zip(texts, pieces, strict=True) if len(ids) <= 30]
    assert len(short) > 200
    expected = bert(short, max_length=32, padding="max_length").input_ids
    expected = np.where(np.array(expected) == bert.sep_token_id, 0, expected)
    assert_same(ids_of(short, 32, "clipa"), expected, short)
    long = [text for text, ids in zip(texts, pieces, strict=True) if len(ids) > 30]
    assert len(long) > 20
    clipa, theirs = ids_of(long, 32, "clipa"), ids_of(long, 32, "open_clip")
    assert_same(clipa[:, :-1], theirs[:, :-1], long)
    assert (clipa[:, -1] > 0).all()
