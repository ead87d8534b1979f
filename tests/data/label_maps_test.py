import importlib.util

import pytest

from clipa_t5x.data import build, label_maps, prompts
from clipa_t5x.errors import UserError


def test_the_map_of_folders_that_are_called_as_classes(tmp_path, capsys):
    for name in ("n3", "n1", "other", ".hidden"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / "README.txt").write_text("")
    (tmp_path / "classes.txt").write_text("n0\nn1\nn2\nn3\n")
    arguments = [f"--folder={tmp_path}/data", f"--classes={tmp_path}/classes.txt"]
    output = str(tmp_path / "map.txt")
    assert build.main(["label_map", *arguments, f"--output={output}"]) == 0
    assert "3 labels, of which 1 stand for no class" in capsys.readouterr().out
    assert prompts.read_label_map(output, 4) == [[1], [3], []]
    assert build.main(["label_map", *arguments, f"--output={tmp_path}/gone/map.txt"]) == 2
    assert "gone/map.txt cannot be written" in capsys.readouterr().err
    # Without a list, the ids of ImageNet's classes.
    for folder in ("data", "gone"):
        rest = [f"--folder={tmp_path}/{folder}", f"--output={output}"]
        assert build.main(["label_map", *rest]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "n01440764, n01443537" in message


def test_a_part_of_the_classes_names_itself():
    assert label_maps.of_part({"c", "a"}, ["a", "b", "c"]) == ["0", "-", "2"]


def test_ids_are_those_of_tfds_or_a_file(tmp_path, monkeypatch):
    ids = label_maps.wordnet_ids(None)
    assert len(ids) == 1000 and ids[0] == "n01440764" and ids == sorted(ids)
    (tmp_path / "ids.txt").write_text("b\na\n")
    assert label_maps.wordnet_ids(str(tmp_path / "ids.txt")) == ["b", "a"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="lists no classes of ImageNet: give --classes"):
        label_maps.wordnet_ids(None)


def test_installed_lists_are_timms(tmp_path, monkeypatch):
    folder = tmp_path / "timm" / "data" / "_info"
    folder.mkdir(parents=True)
    (tmp_path / "timm" / "__init__.py").write_text("raise RuntimeError('not to be imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert label_maps.installed() == {}
    for name, text in (("", "a\nb\nc\n"), ("_a", "b\n"), ("_r", "c\na\n")):
        (folder / f"imagenet{name}_synsets.txt").write_text(text)
    assert label_maps.installed() == {
        "imagenet_a_map.txt": ["-", "1", "-"], "imagenet_r_map.txt": ["0", "-", "2"],
    }  # fmt: skip
