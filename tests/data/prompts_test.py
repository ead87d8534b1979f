import os

import numpy as np
import pytest
import tensorflow as tf
import tiny_records

from clipa_t5x.data import preprocessors, prompts
from clipa_t5x.errors import UserError


def test_a_class_has_its_prompts_side_by_side(tmp_path):
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("cat\n  guinea pig \nCafé {x}\n\n \n", encoding="utf-8")
    templates.write_text("a photo of a {c}.\r\n\r\n{}, a {c}\n")
    found = prompts.read(str(names), str(templates))
    assert found == (["cat", "guinea pig", "Café {x}"], ["a photo of a {}.", "{}, a {}"])
    assert prompts.prompts(*found) == [
        "a photo of a cat.", "cat, a cat",
        "a photo of a guinea pig.", "guinea pig, a guinea pig",
        "a photo of a Café {x}.", "Café {x}, a Café {x}",
    ]  # fmt: skip


def test_prompts_are_tokenized_as_captions(tmp_path):
    vocabulary = tiny_records.vocabulary(tmp_path)
    texts = [tiny_records.caption(i) for i in range(4)]
    ids = prompts.tokenize(texts, vocabulary, 6)
    assert (ids.shape, ids.dtype) == ((4, 6), np.int32)
    np.testing.assert_array_equal(ids, preprocessors.tokenize(texts, vocabulary, 6))


@pytest.fixture
def vocabulary(tmp_path):
    return tiny_records.vocabulary(tmp_path)


# Eight tokens: [CLS] and seven pieces.
@pytest.mark.parametrize("template, name, kept", [
    ("a photo of a {}", "cat", "a photo of a cat"),
    ("a photo of a big {}, a photo", "cat", "a photo of a big cat ,"),
    ("a small photo of a photo of a {}", "cat", "a small photo of a photo cat"),
    ("a small photo of a photo of a {}, a {}", "red cat", "a small photo of a red cat"),
    ("a small photo of a photo of a {}, a", "red cats", "a small photo of red cat ##s"),
    ("a small photo of a photo of a big {}s", "blue dog", "a small photo of blue dog ##s"),
    ("a photo of {}", "red green blue red green blue cat dog", "red green blue red green blue cat"),
    ("a, a, a {}, a, a", "a", "a , a , a a ,"),
    ("{}", "a photo of a photo of a photo of a cat", "a photo of a photo of a"),
])  # fmt: skip
def test_class_names_outlast_templates(vocabulary, template, name, kept):
    (ids,) = prompts.tokenize_around_names([name], [template], vocabulary, 8)
    pieces = [vocabulary.pieces[i] for i in ids]
    wanted = kept.split()
    assert pieces == ["[CLS]", *wanted, *["[PAD]"] * (7 - len(wanted))]


def test_prompts_that_keep_their_names_by_themselves_are_the_same(vocabulary):
    names, templates = (
        ["cat", "red dog", "blue"],
        ["a photo of a {}, a small photo", "{}", "big {}s"],
    )
    texts = prompts.prompts(names, templates)
    tiny_records.write_word_classes(vocabulary)
    for length, strategy in ((8, "truncate"), (16, "random"), (16, "block"), (16, "syntax")):
        found = prompts.tokenize_around_names(names, templates, vocabulary, length, strategy)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, prompts.tokenize(texts, vocabulary, length, strategy))


def test_many_prompts_are_not_taken_apart_by_tensorflow(vocabulary, monkeypatch):
    """Whose lists of a ragged tensor's rows took minutes of ImageNet's 80,000 prompts."""
    monkeypatch.delattr(tf.RaggedTensor, "to_list")
    ids = prompts.tokenize_around_names(["cat", "red dog"], ["a photo of a big {}"], vocabulary, 6)
    assert [vocabulary.pieces[i] for i in ids[1]] == ["[CLS]", "a", "photo", "of", "red", "dog"]


@pytest.mark.parametrize("strategy", ["random", "block", "syntax"])
def test_other_reductions_choose_of_the_template(vocabulary, strategy):
    tiny_records.write_word_classes(vocabulary)
    template = "a photo of a big red dog, a photo of a {}, a small photo"
    (ids,) = prompts.tokenize_around_names(["of, of"], [template], vocabulary, 8, strategy)
    pieces = " ".join(vocabulary.pieces[i] for i in ids)
    assert "of , of" in pieces and "[PAD]" not in pieces
    if strategy == "syntax":  # the name is no noun, but stays; then what says most
        assert pieces == "[CLS] big red dog of , of small"


def test_label_maps_name_classes(tmp_path):
    path = tmp_path / "map.txt"
    path.write_text("2\n-\n0 4\n")
    assert prompts.read_label_map(str(path), 5) == [[2], [], [0, 4]]
    for text, part in (("2\n5\n", "line 2 of label map file .* is '5'"), ("1,2\n", "'1,2'"),
                       ("cat\n", "'cat'"), ("-1\n", "'-1'"), ("-\n-\n", "names no class"),
                       ("1\n\n2\n", "line 2 of label map file .* is empty"),
                       ("", "is empty")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=part):
            prompts.read_label_map(str(path), 5)


def refused(path, templates, *parts):
    with pytest.raises(UserError) as caught:
        prompts.read(str(path), str(templates))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_what_is_not_there_is_named(tmp_path):
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    refused(names, templates, names, "class name file", "does not exist", "one class name a line",
            "clipa_t5x.data.build prompts writes ImageNet's")  # fmt: skip
    names.write_text("cat\n")
    refused(names, templates, templates, "prompt template file", "does not exist")
    templates.write_text("\n \n")
    refused(names, templates, templates, "is empty")
    names.write_text("cat\n\ndog\n")
    refused(names, templates, "line 2 of class name file", names, "is empty, and the lines below")
    names.write_text("cat\n")
    templates.write_text("a {}\na photo of a cat\n")
    refused(names, templates, templates, "'a photo of a cat'", "has no {}")
    names.write_text("")
    refused(names, templates, names, "is empty")


def test_files_that_are_no_text_are_refused(tmp_path):
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    templates.write_text("a {}\n")
    names.write_bytes(b"cat\n\xff\xd8\xff\xe0\0\0" * 100)
    refused(names, templates, names, "is no UTF-8 text", "at byte 4")
    os.truncate(names, 2**40)
    refused(names, templates, names, f"has {2**40} bytes")
    names.unlink()
    names.mkdir()
    refused(names, templates, names, "cannot be read")
