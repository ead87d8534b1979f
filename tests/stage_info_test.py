import dataclasses
import json

import pytest

from clipa_t5x import stage_info


@pytest.fixture
def info():
    return stage_info.StageInfo(
        "VisionTransformer", 10, 84, 14, 36, 36, 8, 64, 100, "1 x cpu", None
    )


def test_a_run_is_completed_when_it_says_so(info, tmp_path):
    assert not stage_info.is_completed(str(tmp_path))
    info.write(str(tmp_path), completed=False)
    assert not stage_info.is_completed(str(tmp_path))
    info.write(str(tmp_path), completed=True)
    assert stage_info.is_completed(str(tmp_path))
    record = json.loads((tmp_path / "stage.json").read_text())
    assert record == {**dataclasses.asdict(info), "completed": True}


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"completed": "yes"}'])
def test_what_cannot_be_read_is_not_completed(text, tmp_path):
    (tmp_path / "stage.json").write_text(text)
    assert not stage_info.is_completed(str(tmp_path))


def test_a_stage_is_named_by_its_tokens(info):
    assert info.resolution == "84 px / 8 tokens"
