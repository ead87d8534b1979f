import pytest
from saved_runs import one_line_error

from clipa_t5x import folders


def test_a_model_dir_is_a_folder_or_nothing_yet(tmp_path):
    folders.check_model_dir(str(tmp_path), "x")
    folders.check_model_dir(str(tmp_path / "new"), "x")
    one_line_error(lambda: folders.check_model_dir("", "name one"), "MODEL_DIR is empty: name one.")
    (tmp_path / "file").touch()
    one_line_error(lambda: folders.check_model_dir(str(tmp_path / "file"), "x"), "is a file")


@pytest.mark.parametrize("inner", ["new", "new/below", "."])
def test_folders_are_made_with_those_above(tmp_path, inner):
    folders.make(str(tmp_path / inner), "MODEL_DIR", "x")
    assert (tmp_path / inner).is_dir()


def test_what_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    path = str(tmp_path / "file" / "below")
    one_line_error(lambda: folders.make(path, "--output_dir", "name another"),
                   f"--output_dir {path} cannot be made", "name another.")  # fmt: skip
