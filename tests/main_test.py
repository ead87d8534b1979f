import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import experiments
import pytest

from clipa_t5x import errors, main, preemption

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
        ([STAGE1, "--poll_seconds=-1"], "poll_seconds"),
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


def test_a_watch_takes_no_single_checkpoint(capsys, monkeypatch):
    monkeypatch.chdir(experiments.REPOSITORY)
    with pytest.raises(SystemExit) as exit_:
        main.run("eval", [STAGE1, "--gin.MODEL_DIR='x'", "--watch", "--checkpoint=x/checkpoint_3"])
    assert exit_.value.code == 2
    assert "--checkpoint is x/checkpoint_3: give one of the two" in capsys.readouterr().err


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
    verbs = (
        "train,eval,schedule,precompile,benchmark,export,import_weights,"
        "build,report,compare,plan,law"
    )
    assert verbs in capsys.readouterr().out


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


def _handles_sigterm(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGTERM - 1) & 1


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_before_training_asks_to_be_started_again(signum, tmp_path):
    process = subprocess.Popen(
        experiments.command("train", STAGE1, f"--gin.MODEL_DIR='{tmp_path}/run'"),
        cwd=experiments.REPOSITORY, env=experiments.environment(1), text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    while process.poll() is None and not _handles_sigterm(process.pid):
        time.sleep(0.01)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == preemption.RESTART_STATUS, err[-4000:]
    assert f"{signal.Signals(signum).name}: ending at once, with nothing to save." in err


@pytest.mark.slow
def test_one_process_s_mistake_ends_the_others_to_be_started_again(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    commands = [
        experiments.command(
            "train", STAGE1, f"--gin.MODEL_DIR={model_dir}",
            f"--coordinator_address={address}", "--process_count=2", f"--process_index={index}",
        )
        for index, model_dir in enumerate((f"'{tmp_path}/run'", "unquoted"))
    ]  # fmt: skip
    processes = [
        subprocess.Popen(
            command, cwd=experiments.REPOSITORY, env=experiments.environment(1), text=True,
            stderr=subprocess.PIPE,
        )
        for command in commands
    ]  # fmt: skip
    errs = [process.communicate(timeout=90)[1] for process in processes]
    statuses = [process.returncode for process in processes]
    assert statuses == [preemption.RESTART_STATUS, 2], errs
    assert "error: process 1 was given something wrong" in errs[0]


def test_a_death_of_peers_is_no_shorter_than_can_be_told(capsys):
    with pytest.raises(SystemExit) as exit_:
        main.run("train", [STAGE1, "--peer_timeout_seconds=1"])
    assert exit_.value.code == 2
    assert "peer_timeout_seconds" in capsys.readouterr().err
