import re
import subprocess
import sys

import experiments
import pytest

from clipa_t5x import errors, main

STAGE1 = f"--gin_file={experiments.GIN}/digits_stage1.gin"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "needs --gin_file=FILE"),
        (["gin/digits_stage1.gin"], "is not a flag"),
        ([STAGE1, "--modeldir=x"], "modeldir"),
        (["--gin_file=gin/digit_stage1.gin"], "gin/digit_stage1.gin"),
        ([STAGE1], "MODEL_DIR must be set"),
        ([STAGE1, "--gin.MODEL_DIR=runs/x"], "quotes"),
        ([STAGE1, "--gin.MODEL_DIR='x'", "--gin.LEARNIG_RATE=1"], "LEARNIG_RATE.*LEARNING_RATE"),
        ([STAGE1, "--gin.MODEL_DIR='x'", "--gin.adamw.weight_decy=1"], "weight_decy"),
        ([STAGE1, "--gin.MODEL_DIR='x'", "--dry_run", "--mesh=256"], "--mesh is '256'"),
        ([STAGE1, "--gin.MODEL_DIR='x'", "--dry_run", "--mesh=data=7"], "BATCH_SIZE is"),
        (
            [STAGE1, "--dry_run", "--mesh=data=8", "--gin.NUM_MICROBATCHES=3"],
            "NUM_MICROBATCHES is 3",
        ),
        ([STAGE1, "--process_count=2"], "go together"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(experiments.REPOSITORY)
    with pytest.raises(SystemExit) as exit_:
        main.run("train", [*arguments, "--compilation_cache_dir="])
    assert exit_.value.code == 2
    stderr = capsys.readouterr().err
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert "In call to configurable" not in stderr


def test_what_is_not_the_users_mistake_keeps_its_traceback():
    def bug():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        main.one_line_errors(bug)

    def mistake():
        raise errors.UserError("the fact")

    assert main.one_line_errors(mistake) == 2
    assert main.one_line_errors(lambda: None) == 0


def test_the_console_command_lists_its_verbs(capsys):
    with pytest.raises(SystemExit) as exit_:
        main.main(["tarin"])
    assert exit_.value.code == 2
    assert "train,eval,schedule,precompile,benchmark,build,report,plan" in capsys.readouterr().out


def test_importing_the_doors_starts_nothing():
    """No flags, backends or files at import time."""
    code = "import clipa_t5x.main, jax; from jax._src import xla_bridge as b; print(b._backends)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=experiments.REPOSITORY, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == "{}"


def test_dry_run_prints_the_table_and_needs_no_model_dir(capsys, monkeypatch):
    monkeypatch.chdir(experiments.REPOSITORY)
    with pytest.raises(SystemExit) as exit_:
        main.run(
            "train", [STAGE1, "--dry_run", "--mesh=data=4,model=2", "--compilation_cache_dir="]
        )
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "mesh: replica=1, data=4, model=2 (8 devices)" in out
    assert "image_tower/encoder/layers_0/mlp/fc1/kernel" in out
