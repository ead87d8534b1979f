import string

from clipa_t5x.data import wordpiece


def test_basic_tokenize_follows_bert():
    assert wordpiece.basic_tokenize("Hello, World!") == ["hello", ",", "world", "!"]
    assert wordpiece.basic_tokenize("  Crème\tbrûlée\n") == ["creme", "brulee"]
    assert wordpiece.basic_tokenize("it's $5^2") == ["it", "'", "s", "$", "5", "^", "2"]
    assert wordpiece.basic_tokenize("“so”—yes") == ["“", "so", "”", "—", "yes"]
    assert wordpiece.basic_tokenize("漢字a\u200bb\x00c") == ["漢", "字", "abc"]
    assert wordpiece.basic_tokenize("") == []


def test_vocabulary_layout():
    tokens = wordpiece.build_vocabulary(["a Zebra: 7 apples", "apples, zebra"])
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokens[5:41] == list(string.ascii_lowercase + string.digits)
    assert tokens[41:77] == [f"##{c}" for c in string.ascii_lowercase + string.digits]
    assert tokens[77:-2] == list(string.punctuation)
    assert tokens[-2:] == ["apples", "zebra"]
    assert len(set(tokens)) == len(tokens)


def test_vocabulary_ignores_the_order_of_texts():
    texts = ["two red circles", "one blue star", "a red star"]
    assert wordpiece.build_vocabulary(texts) == wordpiece.build_vocabulary(texts[::-1])


def test_written_vocabulary_has_ids_by_line(tmp_path):
    tokens = wordpiece.build_vocabulary(["straße dix"])
    wordpiece.write_vocabulary(tmp_path / "vocab.txt", tokens)
    raw = (tmp_path / "vocab.txt").read_bytes()
    assert raw.decode("utf-8").split("\n") == [*tokens, ""]


def test_vocabulary_tokenizes_as_tensorflow_text_does(tmp_path):
    import tensorflow_text as tf_text

    path = tmp_path / "vocab.txt"
    texts = ["A photo of something red: a star", "naïve, l'été"]
    tokens = wordpiece.build_vocabulary(texts)
    wordpiece.write_vocabulary(path, tokens)
    ids = tf_text.BertTokenizer(str(path), lower_case=True).tokenize(texts)
    for text, row in zip(texts, ids.merge_dims(1, 2).to_list(), strict=True):
        assert [tokens[i] for i in row] == wordpiece.basic_tokenize(text)
