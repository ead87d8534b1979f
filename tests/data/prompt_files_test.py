import importlib.util
import sys

import pytest

from clipa_t5x.data import build, label_maps, prompt_files, prompts

METADATA = """
IMAGENET_CLASSNAMES = ("tench", "Chihuahua", "guinea pig")
OPENAI_IMAGENET_TEMPLATES = (lambda c: f"a bad photo of a {c}.", lambda c: f"{c}, a {c}")
SIMPLE_IMAGENET_TEMPLATES = (lambda c: f"itap of a {c}.",)
"""


@pytest.fixture
def open_clip(tmp_path, monkeypatch):
    """A package that must not be imported as a whole, in the place of an installed one."""
    root = tmp_path / "packages" / "open_clip"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('operator does not exist')\n")
    monkeypatch.syspath_prepend(str(root.parent))
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    return root / "zero_shot_metadata.py"


def test_files_are_open_clips(open_clip, tmp_path, capsys, monkeypatch):
    open_clip.write_text(METADATA)
    monkeypatch.setattr(label_maps, "installed", lambda: {"imagenet_a_map.txt": ["0", "-", "2"]})
    assert build.main(["prompts", f"--output_dir={tmp_path}/new/data"]) == 0
    files = {path.name: path.read_text() for path in (tmp_path / "new/data").iterdir()}
    assert files == {
        "imagenet_classes.txt": "tench\nChihuahua\nguinea pig\n",
        "imagenet_templates.txt": "a bad photo of a {}.\n{}, a {}\n",
        "imagenet_templates_simple.txt": "itap of a {}.\n",
        "imagenet_a_map.txt": "0\n-\n2\n",
    }
    assert "imagenet_classes.txt is ready: 3 lines" in capsys.readouterr().out
    names, templates = (str(tmp_path / "new/data" / name) for name in list(prompt_files.FILES)[:2])
    assert prompts.prompts(*prompts.read(names, templates))[1] == "tench, a tench"


def refused(capsys, output_dir, *parts):
    assert build.main(["prompts", f"--output_dir={output_dir}"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in parts:
        assert part in message


def test_a_missing_open_clip_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(capsys, tmp_path, "not installed", "pip install 'clipa_t5x[interop]'")


def test_other_versions_are_refused(open_clip, tmp_path, capsys):
    refused(capsys, tmp_path, "not installed")
    open_clip.write_text("OTHER = 1\n")
    refused(capsys, tmp_path, "IMAGENET_CLASSNAMES", "install a version")
    open_clip.write_text(METADATA.replace('"tench"', r'"ten\nch"'))
    refused(capsys, tmp_path, "IMAGENET_CLASSNAMES")


def test_a_folder_that_cannot_be_is_refused(open_clip, tmp_path, capsys):
    open_clip.write_text(METADATA)
    (tmp_path / "file").write_text("")
    refused(capsys, tmp_path / "file", "cannot be written to")


def test_the_installed_open_clip_will_do(tmp_path):
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed: extra interop")
    counts = list(prompt_files.write(tmp_path).values())
    assert counts[:2] == [1000, 80] and counts[2] > 0 and counts[3:] == [1000, 1000]
    for name in ("imagenet_a_map.txt", "imagenet_r_map.txt"):
        label_map = prompts.read_label_map(str(tmp_path / name), 1000)
        assert [classes for classes in label_map if classes] == [
            [i] for i, classes in enumerate(label_map) if classes
        ]
        assert sum(map(len, label_map)) == 200
    names, templates = (str(tmp_path / name) for name in list(prompt_files.FILES)[:2])
    texts = prompts.prompts(*prompts.read(names, templates))
    assert len(texts) == 80_000 and texts[0] == "a bad photo of a tench."
