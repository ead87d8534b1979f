"""The door, the official client, and the lines that workers get; ssh alone is another program."""

import ast
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import grpc
import pytest
import yaml

from launch import job
from launch.controller import Patience

pytest.importorskip("google.cloud.tpu_v2", reason="google-cloud-tpu is not installed")

from fake_tpu import FakeTpu, Fate  # noqa: E402

from launch import cloud_tpu, gce  # noqa: E402
from launch.clock import Clock  # noqa: E402

GIN = pathlib.Path(__file__).parents[2] / "gin"
PLACE = ("--project=p", "--zone=us-east5-b", "--name=my-run")
FULL = (grpc.StatusCode.RESOURCE_EXHAUSTED, "Quota limit 'TPUV5sPreemptible' has been exceeded.")

# Takes the options that ssh does, and has bash run the line in a home of the worker's own.
SSH = """#!/bin/bash
echo "$@" >>"$HOMES/calls"
while [ "$1" != -- ]; do shift; done
mkdir -p "$HOMES/$2" && cd "$HOMES/$2" && HOME=$PWD exec bash -c "$3"
"""

# Stands for the trainer: ends with the restart status, then well.
TRAINER = """#!/bin/bash
exec python3 -c 'import os, sys, time
print(ascii(sys.argv[1:]), ascii(os.environ.get("A")), flush=True)
time.sleep(float(os.environ.get("SECONDS_EACH", 0)))
sys.exit(0 if os.path.exists("was") else open("was", "w") and 75)' "$@"
"""


@pytest.fixture
def tpu(server, tmp_path, monkeypatch):
    tpu = server.serve(FakeTpu(Clock()))
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "ssh").write_text(SSH)
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("HOMES", str(tmp_path / "homes"))
    (tmp_path / "homes").mkdir()
    monkeypatch.setattr(cloud_tpu, "connect", lambda: server.client)
    monkeypatch.setattr(cloud_tpu, "_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(gce, "PATIENCE", Patience(poll=0.1, check=0.1, peers=5, stop=10))
    yield tpu
    assert not tpu.mistakes


@pytest.fixture
def login(tmp_path):
    (tmp_path / "key.pub").write_text("ssh-ed25519 AAAA me\n")
    return ("--ssh_user=me", f"--ssh_key={tmp_path / 'key'}")


@pytest.fixture
def run(tmp_path, login):
    source = tmp_path / "source"
    source.mkdir()
    (source / "trainer").write_text(TRAINER)
    (source / "trainer").chmod(0o755)
    for command in (["init", "-q"], ["add", "trainer"]):
        subprocess.run(["git", "-C", str(source), *command], check=True)
    (tmp_path / "job.yaml").write_text("restarts: {first_delay: 0.1, max_restarts: 3}\n")

    def run(*argv, model_dir="gs://b/run", where=(f"--package={source}",)):
        return gce.main(
            ["run", f"--job={tmp_path / 'job.yaml'}", "--gin_file=shapes_stage1.gin",
             f"--gin_search_paths={GIN}", f"--model_dir={model_dir}", "--topology=v5e-16",
             *where, "--setup=mkdir -p .venv/bin && mv trainer .venv/bin/python",
             *PLACE, *login, *argv]
        )  # fmt: skip

    return run


def test_a_job_restarts_is_looked_at_and_given_back(tpu, run, login, capsys, tmp_path):
    hostile = "it's $(touch pwned);`touch pwned` \"&*"
    assert run("--keep", "--spot", f"--environment=A={hostile}", model_dir=f"/runs/{hostile}") == 0
    out = capsys.readouterr().out
    told = [line[4:] for line in out.splitlines() if line.startswith("[0] ")]
    arguments, _, variable = told[0].rpartition("] ")
    assert ast.literal_eval(variable) == hostile
    arguments = ast.literal_eval(arguments + "]")
    assert f"--gin_bindings=MODEL_DIR = {f'/runs/{hostile}'!r}" in arguments
    assert arguments[-1] == "--multiprocess" and not list(tmp_path.rglob("pwned"))
    assert "restart 1, in 0 s" in out and "Done, after 1 restarts, 0.0 chip-hours." in out
    (queued,) = tpu.queued.values()
    assert "spot" in queued.message
    assert dict(queued.message.tpu.node_spec[0].node.metadata)["ssh-keys"].startswith("me:ssh-")
    calls = (tmp_path / "homes/calls").read_text()
    assert "StrictHostKeyChecking=yes" in calls and "accept-new" not in calls

    assert gce.main(["status", *PLACE, *login, "--price=2"]) == 0
    out = capsys.readouterr().out
    assert "queuedResources/my-run: ACTIVE" in out and "chip-hours" in out
    assert "worker 0: start 2 ended with status 0" in out and "worker 1: start 2" in out

    assert gce.main(["delete", *PLACE, *login]) == 0 and not tpu.left
    assert gce.main(["status", *PLACE, *login]) == 0
    assert "queuedResources/my-run: there is none." in capsys.readouterr().out


def test_a_signal_has_the_job_end_and_another_command_stops_what_is_left(
    tpu, run, login, monkeypatch
):
    original, sent = gce.say, []

    def say(line):
        original(line)
        if line.startswith("[0] ['-m'") and not sent:
            sent.append(line)
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(gce, "say", say)
    assert run("--environment=SECONDS_EACH=60", "--keep") == 75
    assert signal.getsignal(signal.SIGTERM) is handler and tpu.left
    assert gce.main(["stop", *PLACE, *login]) == 0 and not tpu.left


def test_stop_ends_a_running_job_and_who_watches_it(tpu, run, login, monkeypatch):
    original, seen, stopped = gce.say, [], []

    def say(line):
        original(line)
        if line.startswith("[0] ['-m'") and not seen:
            seen.append(line)
            stopped.append(gce.main(["stop", *PLACE, *login, "--keep"]))

    monkeypatch.setattr(gce, "say", say)
    assert run("--environment=SECONDS_EACH=60") == 75
    assert stopped == [0] and not tpu.left


def test_a_dry_run_prints_the_request_and_asks_for_nothing(tpu, run, login, capsys):
    assert run("--dry_run", "--reserved", "--num_slices=2", "--service_account=a@p.iam") == 0
    out = capsys.readouterr().out
    for part in ('"nodeCount": 2', "reservations/-", '"email": "a@p.iam"', "v5litepod-16",
                 "--multiprocess", "-l me -- ADDRESS"):  # fmt: skip
        assert part in out
    for verb in ("status", "stop", "delete"):
        assert gce.main([verb, *PLACE, *login, "--dry_run"]) == 0
    assert not tpu.calls


def test_the_guides_job_reads_nothing_that_workers_have_not(tpu, login, capsys, monkeypatch):
    monkeypatch.chdir(GIN.parent)
    guide = pathlib.Path("launch/README.md").read_text()
    text = guide.partition("`bigg.yaml`")[2].split("```\n")[1]
    bindings = dict(line.split(" = ", 1) for line in yaml.safe_load(text)["gin_bindings"])
    for path in ("gin/data/datacomp1b.gin", "gin/evals/imagenet.gin"):
        for name in re.findall(r"^(\w+) = 'data/", pathlib.Path(path).read_text(), re.MULTILINE):
            assert bindings.pop(name).startswith("'gs://my-bucket/data/"), name
    assert not bindings
    job_file = pathlib.Path(os.environ["HOMES"], "bigg.yaml")
    job_file.write_text(text)
    flags = (f"--job={job_file}", "--project=p", "--zone=us-east5-b", "--spot", *login)
    assert gce.main(["run", *flags, "--dry_run"]) == 0
    assert "-m clipa_t5x.schedule --gin_file=gin/bigG14.gin" in capsys.readouterr().out
    # Without, workers would be rented to find that they have no data.
    given = [f"--gin.DATA_DIR='{name}'" for name in ("data/here", "gs://b/data")]
    for flag, part in zip(given, ("DATA_DIR is 'data/here'", "VOCABULARY_PATH is"), strict=True):
        assert gce.main(["run", *flags, flag]) == 2
        _check_error(capsys, part, "gs://")
    assert not tpu.left


def test_a_container_is_run_by_its_name_and_its_leftover_removed(tpu, run, capsys):
    assert run("--dry_run", "--environment=A=b c", where=("--image=r/i:1",)) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "docker run" in line)
    assert "clipa_t5x-my-run sudo docker run" in line and "'--env=A=b c' r/i:1 python3 -m" in line


DOCKER = """#!/bin/bash
echo "$1 ${*: -1}" >>"$HOMES/docker"
case $1 in
  run) trap 'exit 75' TERM; echo $$ >"$HOMES/pid"; while :; do sleep 0.1; done ;;
  kill) kill -TERM "$(cat "$HOMES/pid")" ;;
esac
"""


def test_a_container_ends_when_asked_to_and_its_status_is_the_starts(tpu, tmp_path):
    for name, text in (("docker", DOCKER), ("sudo", '#!/bin/bash\nexec "$@"\n')):
        (tmp_path / "programs" / name).write_text(text)
        (tmp_path / "programs" / name).chmod(0o755)
    spec = job.JobSpec(("a.gin",), "/runs/a", name="my-run", package=None, image="r/i:1")
    started = subprocess.Popen(gce.plan(spec, "").command)
    end = time.monotonic() + 20
    while not (tmp_path / "homes/pid").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    started.terminate()
    assert started.wait(20) == 75
    called = (tmp_path / "homes/docker").read_text().splitlines()
    assert called == ["rm clipa_t5x-my-run", "run --multiprocess", "kill clipa_t5x-my-run"]


def test_without_the_client_it_says_how_to_get_it():
    code = (
        "import runpy, sys; sys.modules['google.cloud.tpu_v2'] = None; "
        "runpy.run_module('launch.gce', run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "pip install 'clipa_t5x[gce]'" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--zone=mars-1a"], ["NOT_FOUND", "mars-1a", "accelerator-types list"]),
        (["--topology=v5e-7"], ["there is no v5e of 7 chips", "v5e-16"]),
        (["--topology=gpu-h100-8"], ["gpu-h100-8", "v5e, v5p"]),
        (["--project=p;rm"], ["--project is 'p;rm'"]),
        (["--name=My_run"], ["name is 'My_run'"]),
        (["--ssh_user=-oProxyCommand"], ["--ssh_user"]),
        (["--ssh_key=nowhere/key"], ["nowhere/key.pub", "ssh-keygen"]),
        (["--model_dir=runs/x"], ["model_dir is 'runs/x'", "gs://"]),
        (["--gin.LERNING_RATE=1"], ["LERNING_RATE"]),
        (["--max_wait_hours=nan"], ["--max_wait_hours=nan"]),
    ],
)
def test_mistakes_are_told_in_a_line_and_leave_nothing(tpu, run, capsys, argv, parts):
    assert run(*argv) == 2
    _check_error(capsys, *parts)
    assert not tpu.left


@pytest.mark.parametrize("price", ["-1", "nan", "inf"])
def test_a_price_that_is_none_is_refused(tpu, login, capsys, price):
    assert gce.main(["status", *PLACE, *login, f"--price={price}"]) == 2
    _check_error(capsys, f"--price={price}")


def test_no_quota_is_told_in_a_line_and_leaves_nothing(tpu, run, capsys):
    tpu.fates.append(Fate(refusal=FULL))
    assert run() == 2
    _check_error(capsys, "RESOURCE_EXHAUSTED: Quota limit", "1 x v5litepod-16")
    assert not tpu.left


def test_missing_credentials_are_told_in_a_line(login, monkeypatch, capsys):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "no_such_file.json")
    for verb in ("status", "stop", "delete"):
        assert gce.main([verb, *PLACE, *login]) == 2
        _check_error(capsys, "no credentials for Google Cloud", "application-default login")


def _check_error(capsys, *parts):
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    for part in parts:
        assert part in line
