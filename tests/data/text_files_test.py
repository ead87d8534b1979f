import os

import pytest

from clipa_t5x.data import text_files
from clipa_t5x.errors import UserError


def test_reads_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\0a\n")
    assert text_files.read(str(tmp_path / "a.txt"), "class name") == b"\xff\0a\n"


def test_absurdly_large_files_are_refused_unread(tmp_path):
    path = tmp_path / "a.txt"
    path.touch()
    os.truncate(path, 2**40)  # A hole of a terabyte: reading it would never end.
    with pytest.raises(UserError, match=f"vocabulary file .*a.txt has {2**40} bytes") as caught:
        text_files.read(str(path), "vocabulary")
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read") as caught:
        text_files.read(str(tmp_path), "vocabulary")
    assert "\n" not in str(caught.value)
