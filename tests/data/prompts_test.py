import os

import numpy as np
import pytest
import tiny_records

from clipa_t5x.data import preprocessors, prompts
from clipa_t5x.errors import UserError


def test_a_class_has_its_prompts_side_by_side(tmp_path):
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("cat\n  guinea pig \n\nCafé {x}\n", encoding="utf-8")
    templates.write_text("a photo of a {}.\r\n{}, a {}\n")
    texts, count = prompts.prompts(str(names), str(templates))
    assert count == 2
    assert texts == [
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


def refused(path, templates, *parts):
    with pytest.raises(UserError) as caught:
        prompts.prompts(str(path), str(templates))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_what_is_not_there_is_named(tmp_path):
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    refused(names, templates, names, "class name file", "does not exist", "one class name a line")
    names.write_text("cat\n")
    refused(names, templates, templates, "prompt template file", "does not exist")
    templates.write_text("\n \n")
    refused(names, templates, templates, "is empty")
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
