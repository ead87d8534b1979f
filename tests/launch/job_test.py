"""A job is the same from flags and from YAML, and what no launcher could start is refused."""

import argparse
import shlex

import pytest
from saved_runs import one_line_error

from launch import job


def parse(*argv):
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    return job.parse_arguments(parser, argv)[0]


MINIMUM = ("--gin_file=a.gin", "--model_dir=/runs/a")


def test_the_trainers_command():
    spec = parse(
        *MINIMUM, "--gin.LEARNING_RATE=1e-3", "--verb=schedule", "--arguments=--multiprocess"
    )
    assert spec.command("python") == [
        "python",
        "-m",
        "clipa_t5x.schedule",
        "--gin_file=a.gin",
        "--gin_search_paths=gin",
        "--gin_bindings=LEARNING_RATE = 1e-3",
        "--gin_bindings=MODEL_DIR = '/runs/a'",
        "--multiprocess",
    ]


@pytest.mark.parametrize("value", ['it\'s "x" $(reboot) `id` ; rm -rf /', "a\nb", "-x", "é日🙂"])
def test_whatever_is_quoted_arrives_as_it_was(value):
    command = job.JobSpec(("a.gin",), value, gin_bindings=(f"A = {value!r}",)).command()
    assert shlex.split(job.quoted(command)) == command


def test_yaml_and_flags_make_the_same_job(tmp_path):
    flags = (
        *MINIMUM, "--gin_file=b.gin", "--gin.A='x'", "--name=my-run", "--topology=v5e-256",
        "--num_slices=2", "--environment=A=b=c", "--environment=N=1", "--max_restarts=3",
        "--gin_search_paths=mine,gin",
    )  # fmt: skip
    spec = parse(*flags)
    path = tmp_path / "job.yaml"
    path.write_text(spec.as_yaml())
    assert parse(f"--job={path}") == spec
    assert spec.environment == {"A": "b=c", "N": "1"} and spec.restarts.max_restarts == 3
    # Flags win over the file.
    other = parse(f"--job={path}", "--name=other", "--max_restarts=4", "--image=x/y:z")
    assert (other.name, other.image, other.package) == ("other", "x/y:z", None)
    assert other.restarts.max_restarts == 4 and other.gin_file == spec.gin_file


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("gin_files: a", ["'gin_files'", "did you mean gin_file?"]),
        ("num_slices: two", ["num_slices", "'two'", "whole number"]),
        ("num_slices: true", ["num_slices", "True"]),
        ("environment: {A: 1}", ["environment", "{'A': 1}", "in quotes"]),
        ("gin_bindings: [1]", ["gin_bindings", "[1]", "list of texts"]),
        ("restarts: 3", ["restarts", "3"]),
        ("restarts: {max: 3}", ["'max'", "max_restarts"]),
        ("restarts: {max_delay: -1}", ["max_delay", "-1", "from 0 to 1e+09"]),
        ("restarts: {max_delay: .inf}", ["max_delay", "inf", "from 0 to 1e+09"]),
        ("environment:", ["environment", "None", "texts by name"]),
        ("gin_search_paths: null", ["gin_search_paths", "None", "list of texts"]),
        ("date: 2026-13-45", ["cannot be read", "month"]),
        ("[" * 5000, ["cannot be read", "recursion"]),
        ("- a", ["no mapping"]),
        ("a: [", ["cannot be read"]),
        ("!!python/object/apply:os.system [id]", ["cannot be read"]),
        ("", ["no mapping"]),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, parts):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    one_line_error(lambda: parse(f"--job={path}", *MINIMUM), str(path), *parts)


def test_a_file_s_restarts_are_read_before_a_flag_adds_to_them(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("restarts: soon")
    one_line_error(lambda: parse(f"--job={path}", *MINIMUM, "--max_restarts=1"), "'soon'")


@pytest.mark.parametrize("field", ["gin_file", "model_dir", "gin_bindings", "arguments", "image"])
def test_what_no_command_can_take_is_refused(field):
    fields = {"gin_file": "a", "model_dir": "b", "package": None, "image": "c", field: "x\0y"}
    one_line_error(lambda: job.make(fields, "here").check(), field, "code 0")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["--gin_file"]),
        (["--gin_file=a.gin"], ["--model_dir"]),
        ([*MINIMUM, "--name=A b"], ["'A b'"]),
        ([*MINIMUM, "--topology=v5e-255"], ["v5e-255"]),
        ([*MINIMUM, "--num_slices=0"], ["num_slices is 0"]),
        ([*MINIMUM, "--image=x", "--package=."], ["give one of the two"]),
        ([*MINIMUM, "--environment=A"], ["NAME=VALUE"]),
        ([*MINIMUM, "--environment=A B=c"], ["'A B'", "letters"][1:]),
        ([*MINIMUM, "--gin.A"], ["--gin.A"]),
        ([*MINIMUM, "--job=none.yaml"], ["none.yaml", "No such file"]),
    ],
)
def test_mistakes_in_flags_are_named(flags, parts):
    one_line_error(lambda: parse(*flags), *parts)
