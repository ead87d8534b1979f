import json
import pathlib

import experiments
import pytest

from clipa_t5x import schedule
from clipa_t5x.errors import UserError

MINIATURE = experiments.UNEVALUATED
SCHEDULE = f"{experiments.GIN}/digits.gin"


@pytest.fixture(autouse=True)
def in_workspace(tmp_path_factory, monkeypatch):
    parent = tmp_path_factory.getbasetemp() / "schedule"
    parent.mkdir(exist_ok=True)
    monkeypatch.chdir(experiments.digits_dir(str(parent)))


def run(model_dir, *bindings):
    own = [f"MODEL_DIR = {str(model_dir)!r}", *MINIATURE, "TRAIN_STEPS = 3"]
    schedule.run([SCHEDULE], [*own, *bindings], [str(experiments.GIN), str(experiments.REPOSITORY)])


def test_stages_follow_each_other_and_a_second_start_goes_on(tmp_path, capsys):
    # A killed schedule: the second stage has not begun.
    one_stage = "STAGES = ['gin/digits_stage1.gin']"
    run(tmp_path / "run", one_stage)
    written = (tmp_path / "run" / "stage1" / "metrics.jsonl").read_text()
    run(tmp_path / "run")
    stages = json.loads((tmp_path / "run" / "schedule.json").read_text())["stages"]
    assert stages == ["stage1", "stage2", "stage3"]
    assert (tmp_path / "run" / "stage1" / "metrics.jsonl").read_text() == written
    for stage, positions in zip(stages, (8, 16, 32), strict=True):
        info = json.loads((tmp_path / "run" / stage / "stage.json").read_text())
        assert info["completed"] and info["text_length"] == positions
        arrays = experiments.saved_state(tmp_path / "run" / stage, 3)
        assert arrays["params/text_tower/position_embedding"].shape == (positions, 32)
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in table[-3:]] == [
        ["stage1", "16"], ["stage2", "24"], ["stage3", "32"]
    ]  # fmt: skip


def test_a_changed_recipe_is_refused_with_its_difference(tmp_path):
    """Also of a stage that is completed; when to report and where to lie is no recipe."""
    one_stage = "STAGES = ['gin/digits_stage1.gin']"
    run(tmp_path / "run", one_stage)
    with pytest.raises(UserError, match="stage1 has changed") as caught:
        run(tmp_path / "run", one_stage, "LEARNING_RATE = 0.5", "LOG_PERIOD = 1")
    assert str(caught.value).splitlines()[1:] == [
        "  - LEARNING_RATE = 0.0015",
        "  + LEARNING_RATE = 0.5",
    ]
    run(tmp_path / "run", one_stage, "EVAL_PERIOD = 2", "KEEP_CHECKPOINTS = 1")
    (tmp_path / "run").rename(tmp_path / "moved")
    run(tmp_path / "moved", one_stage)
    arguments = [[SCHEDULE], [f"MODEL_DIR = '{tmp_path}/moved'", one_stage, *MINIATURE,
                              "TRAIN_STEPS = 3", "LEARNING_RATE = 0.5"]]  # fmt: skip
    paths = [str(experiments.GIN), str(experiments.REPOSITORY)]
    schedule.run(*arguments, paths, accept_recipe_changes=True)


def test_every_stage_is_checked_before_the_first_begins(tmp_path):
    with pytest.raises(UserError, match="IMAGE_MASK_RATO"):
        run(tmp_path / "run", "IMAGE_MASK_RATO = 0.1")
    with pytest.raises(UserError, match="no_such_stage.gin"):
        run(tmp_path / "run", "STAGES = ['gin/digits_stage1.gin', 'gin/no_such_stage.gin']")
    with pytest.raises(UserError, match="STAGES of .* is empty"):
        run(tmp_path / "run", "STAGES = []")
    assert not pathlib.Path(tmp_path / "run" / "stage1").exists()
