"""What needs the peer itself is in tests/interop."""

import importlib.machinery
import importlib.util
import sys

from clipa_t5x.weights import open_clip_peer


def test_a_peer_that_is_not_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert open_clip_peer.version() is None


def test_a_peer_that_does_not_start_is_told_of(monkeypatch, tmp_path, caplog):
    (tmp_path / "open_clip.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    with caplog.at_level("WARNING"):
        assert open_clip_peer.version() is None
    assert "cannot be imported (RuntimeError: operator nms does not exist)" in caplog.text


def test_a_folder_of_that_name_is_no_peer(monkeypatch, tmp_path):
    (tmp_path / "open_clip").mkdir()  # as an export may be called
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    assert open_clip_peer.version() is None


def test_a_folder_is_known_by_its_configuration(tmp_path):
    assert not open_clip_peer.is_folder(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert open_clip_peer.is_folder(str(tmp_path))
