import os
import pathlib
import shutil
import sys
import textwrap

import gin
import pytest

from clipa_t5x import errors, gin_utils

WORKSPACE = pathlib.Path(__file__).parent / "testdata" / "toyclip_workspace"
ROOT = "toyclip.train.train"


def _write(files):
    for name, text in files.items():
        os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "w") as file:
            file.write(textwrap.dedent(text).lstrip("\n"))


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    """A package and gin files of the test's own, in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(WORKSPACE, tmp_path, dirs_exist_ok=True)
    yield tmp_path
    gin.clear_config()
    for name in [name for name in sys.modules if name.split(".")[0] == "toyclip"]:
        del sys.modules[name]


def _parse(*bindings, files=("gin/toy_stage2.gin",), search_paths=("gin",), **kwargs):
    arguments = gin_utils.rewrite_gin_args([f"--gin.{binding}" for binding in bindings])
    values = [argument.removeprefix("--gin_bindings=") for argument in arguments]
    gin_utils.parse(files, values, search_paths, root=ROOT, **kwargs)


def _refusal(*bindings, **kwargs):
    with pytest.raises(errors.UserError) as caught:
        _parse(*bindings, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _refusal_of(text, *bindings):
    """The refusal of the second stage with `text` in a file of its own behind it."""
    _write({"gin/tail.gin": text})
    files = ("gin/toy_stage2.gin", "gin/tail.gin")
    return _refusal("MODEL_DIR='runs/toy'", *bindings, files=files)


IMPORTS = """\
from __gin__ import dynamic_registration
from toyclip import data
from toyclip import towers
from toyclip import schedules
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "LEARNIG_RATE = 3",
            "gin/tail.gin:1: macro LEARNIG_RATE is set but nothing reads it. "
            "Did you mean LEARNING_RATE?",
        ),
        (
            IMPORTS + "trian/data.DatasetConfig.batch_size = 3",
            "gin/tail.gin:5: no reference @trian/... opens scope trian. Did you mean train?",
        ),
        (
            IMPORTS + "image/data.DatasetConfig.batch_size = 3",
            "gin/tail.gin:5: nothing calls data.DatasetConfig in scope image",
        ),
        (
            IMPORTS + "data.name_of.task = 'a'",
            "gin/tail.gin:5: data.name_of is configured but nothing refers to it.",
        ),
        (
            IMPORTS + "\ntowers.Tower:\n  # Wide.\n  widht = 3",
            "gin/tail.gin:8: towers.Tower has no parameter widht. Did you mean width?",
        ),
        (
            IMPORTS + "MODEL = @towers.Clp()",
            "gin/tail.gin:5: towers has no attribute Clp. Did you mean Clip?",
        ),
        (
            IMPORTS + "MODEL = @tower.Clip()",
            "gin/tail.gin:5: tower (in tower.Clip) is not imported in this file. "
            "Did you mean towers?",
        ),
        (
            IMPORTS + "from toyclip import trian",
            "gin/tail.gin:5: there is no module trian in toyclip. Did you mean train?",
        ),
        (
            IMPORTS + "import toyclop.train",
            "gin/tail.gin:5: there is no module toyclop. Did you mean toyclip?",
        ),
        (
            IMPORTS + "towers.Tower.depth = %TRAIN_STEP",
            "gin/tail.gin:5: macro TRAIN_STEP is read but nothing sets it. "
            "Did you mean TRAIN_STEPS?",
        ),
        (
            "BATCH_SIZE = 1\nBATCH_SIZE == 3",
            "gin/tail.gin:2: cannot read `BATCH_SIZE == 3` as gin "
            "(Couldn't parse statement, expected ':' or '=')",
        ),
        (
            "BATCH_SIZE = (3,\n",
            "gin/tail.gin:2: cannot read as gin (EOF in multi-line statement)",
        ),
        (
            "MODEL = tiny",
            "gin/tail.gin:1: cannot read `MODEL = tiny` as gin "
            "(Failed to parse token 'tiny': a string needs quotes)",
        ),
        (
            "include 'models/tine.gin'",
            "gin/tail.gin:1: include 'models/tine.gin' does not exist in "
            "the current directory, gin. Did you mean models/tiny.gin?",
        ),
        (
            "include 'tail.gin'",
            "gin/tail.gin:1: include 'tail.gin': gin/tail.gin includes itself, "
            "by way of gin/tail.gin",
        ),
        (
            "MODEL = @towers.Nothing()",
            "gin/tail.gin:1: towers has no attribute Nothing.",
        ),
    ],
)
def test_refuses_by_file_line_and_nearest_name(text, expected):
    assert _refusal_of(text) == expected


def test_refuses_on_the_command_line_by_flag():
    assert _refusal("LEARNIG_RATE=3") == (
        "--gin.LEARNIG_RATE: macro LEARNIG_RATE is set but nothing reads it. "
        "Did you mean LEARNING_RATE?"
    )
    assert _refusal("trian/DatasetConfig.seed=3").endswith("Did you mean train?")
    assert _refusal("towers.Tower.widht=3").endswith("Did you mean width?")
    assert _refusal("towers.Twer.width=3").endswith("Did you mean Tower?")
    assert _refusal("MODEL=@towers.Clp()").endswith("Did you mean Clip?")


@pytest.mark.parametrize(
    ("binding", "remedy"),
    [
        ("MODEL_DIR=/tmp/x", "strings need inner quotes: --gin.MODEL_DIR=\"'/tmp/x'\""),
        ("MODEL_DIR=gs://b/x", "strings need inner quotes: --gin.MODEL_DIR=\"'gs://b/x'\""),
        ("MODEL_DIR=runs", "strings need inner quotes: --gin.MODEL_DIR=\"'runs'\""),
        ("MODEL_DIR=2024/x", "strings need inner quotes: --gin.MODEL_DIR=\"'2024/x'\""),
        ("MODEL_DIR=true", "write --gin.MODEL_DIR=True"),
        ("MODEL_DIR=", "a value is missing: --gin.MODEL_DIR=VALUE"),
        ("MODEL_DIR=['a'", "cannot read `MODEL_DIR = ['a'` as gin"),
    ],
)
def test_explains_unreadable_values_on_the_command_line(binding, remedy):
    message = _refusal(binding)
    assert message.startswith("--gin.MODEL_DIR: ") and message.endswith(remedy)


def test_required_macros_name_the_flag_and_the_file():
    assert _refusal(files=("gin/toy_stage1.gin",)) == (
        "MODEL_DIR must be set: add --gin.MODEL_DIR=\"'...'\" (required by gin/engine/train.gin:5)"
    )
    assert _refusal(files=("gin/engine/train.gin",)).endswith(
        "; MODEL must be set: add --gin.MODEL=... (required by gin/engine/train.gin:6)"
    )


def test_a_missing_gin_file_lists_where_it_was_looked_for():
    assert _refusal(files=("gin/toy_stage3.gin",), search_paths=("a", "b")) == (
        "gin file gin/toy_stage3.gin does not exist in the current directory, a, b. "
        "Did you mean gin/toy_stage2.gin?"
    )
    assert _refusal(files=("/nowhere/x.gin",)) == "gin file /nowhere/x.gin does not exist"


def test_the_cause_of_a_chain_of_dead_bindings_is_named():
    text = IMPORTS + "MODLE = @data.name_of()\ndata.name_of.task = %NAME\nNAME = 'x'"
    assert _refusal_of(text).startswith("gin/tail.gin:5: macro MODLE is set but nothing reads it")


def test_dead_bindings_that_refer_to_each_other_are_refused():
    assert "macro A is set" in _refusal_of("A = [%B]\nB = [%A]")


def test_a_command_line_override_must_have_an_effect():
    assert _refusal("TRAIN_SAMPLES=5", "TRAIN_STEPS=10", "MODEL_DIR='x'") == (
        "--gin.TRAIN_SAMPLES: this has no effect: other settings replace all that would read it"
    )


def test_a_command_line_override_that_every_scope_hides_is_refused():
    hidden = _refusal_of(
        IMPORTS + "image/towers.Tower.width = 3\ntext/towers.Tower.width = 4", "Tower.width=5"
    )
    assert hidden.startswith("--gin.Tower.width: this has no effect")


def test_an_ambiguous_suffix_is_refused():
    _write({"toyclip/more.py": "class Tower:\n  def __init__(self, width=1): ...\n"})
    text = "from __gin__ import dynamic_registration\nfrom toyclip import more\n"
    message = _refusal_of(text + "MODEL = [@more.Tower(), @towers.Clip()]", "Tower.width=3")
    assert "towers (in towers.Clip) is not imported" in message
    message = _refusal_of(text + "TASK = @more.Tower()", "Tower.width=3")
    assert message == (
        "--gin.Tower.width: Tower is ambiguous: write toyclip.more.Tower or toyclip.towers.Tower"
    )


def test_an_import_that_fails_inside_says_why():
    _write({"toyclip/broken.py": "import tensorflow_txet"})
    assert _refusal_of("from toyclip import broken") == (
        "gin/tail.gin:1: importing toyclip.broken failed: No module named 'tensorflow_txet'"
    )


def test_the_cause_stays_attached():
    with pytest.raises(errors.UserError) as caught:
        _parse("MODEL_DIR=/tmp/x")
    assert isinstance(caught.value.__cause__, SyntaxError)


def test_macros_that_only_python_reads_can_be_declared():
    assert "NOTE is set" in _refusal("NOTE='a'", "MODEL_DIR='b'")
    _parse("NOTE='a'", "MODEL_DIR='b'", queried_macros=("NOTE",))
    assert gin_utils.query("NOTE") == "a"
    assert "NOTE = 'a'" in gin_utils.operative_config()
