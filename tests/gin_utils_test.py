import os
import pathlib
import shutil
import subprocess
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


def _run(*bindings, **kwargs):
    _parse("MODEL_DIR='runs/toy'", *bindings, **kwargs)
    return gin_utils.get_root(ROOT)()


IMPORTS = """\
from __gin__ import dynamic_registration
from toyclip import data
from toyclip import towers
from toyclip import schedules
"""


# What is built.


def test_builds_what_the_files_say():
    built = _run()
    clip = built["model"]
    assert (clip.image.width, clip.image.depth, clip.image.pooling.kind) == (8, 3, "last")
    assert (clip.text.width, clip.text.depth, clip.text.pooling.kind) == (8, 2, "mean")
    assert built["data"].batch_size == 40 and built["data"].seed == 1
    assert built["eval_data"].seed == 0
    assert built["total_steps"] == 25
    assert built["rate_fn"](1) == 0.25 / 4
    assert list(built["extras"]) == ["zebra", "apple", "toy:1.0"]
    assert built["model_dir"] == "runs/toy"


def test_gin_itself_builds_the_same_from_the_same_files():
    ours = _run()
    gin.clear_config()
    gin.add_config_file_search_path("gin")
    try:
        gin.parse_config_files_and_bindings(["toy_stage2.gin"], ["MODEL_DIR='runs/toy'"])
        theirs = gin.get_configurable(sys.modules["toyclip.train"].train)()
    finally:
        gin.config._LOCATION_PREFIXES.remove("gin")
    assert theirs["rate_fn"](3) == ours["rate_fn"](3)
    for built in (ours, theirs):
        del built["rate_fn"], built["extras"]["apple"]
    assert theirs == ours


def test_later_bindings_win_and_the_command_line_is_last():
    assert _run("BATCH_SIZE=7", "BATCH_SIZE=8")["data"].batch_size == 8


def test_an_override_may_make_a_helper_of_the_files_idle():
    assert _run("TRAIN_STEPS=100")["total_steps"] == 100


@pytest.mark.parametrize(
    "name",
    [
        "train",
        "train.train",
        "train_script.train",
        "toyclip.train.train",
    ],
)
def test_the_command_line_names_a_configurable_by_alias_or_suffix(name):
    assert _run(f"{name}.total_steps=3")["total_steps"] == 3


def test_the_command_line_may_bring_in_what_no_file_mentions():
    built = _run("train.extras=@towers.Pooling()", "towers.Pooling.kind='cls'", "TASK='x'")
    assert built["extras"].kind == "cls"
    assert built["model"].text.pooling.kind == "mean"


def test_values_may_be_scoped_on_the_command_line():
    assert _run("image/Tower.width=5")["model"].image.width == 5


def test_the_root_is_reached_without_reference_under_any_name():
    _write(
        {
            "gin/a.gin": "from __gin__ import dynamic_registration\nimport toyclip.train as t\n"
            "t.train:\n  model_dir = 'a'\n  model = 1\n  data = 2\n  total_steps = 3\n"
        }
    )
    assert _run_file("gin/a.gin")["total_steps"] == 3


def _run_file(path):
    _parse(files=(path,))
    return gin_utils.get_root(ROOT)()


def test_the_current_directory_comes_before_the_search_paths(workspace):
    _write({"models/tiny.gin": "MODEL = 'of the current directory'"})
    assert _run()["model"] == "of the current directory"


def test_search_paths_are_tried_in_order_and_forgotten():
    _write({"other/models/tiny.gin": "MODEL = 'other'"})
    assert _run(search_paths=("other", "gin"))["model"] == "other"
    assert _run(search_paths=("gin", "other"))["model"] != "other"
    with pytest.raises(errors.UserError, match="does not exist in the current directory"):
        _run(search_paths=())


def test_missing_files_are_probed_without_log_lines(caplog):
    _run()
    assert not caplog.records


# What is asked of a configuration in force.


def test_query_follows_macros_and_references():
    _parse("MODEL_DIR='b'", "TASK=%MODEL_DIR")
    assert gin_utils.query("TASK") == "b"
    assert gin_utils.query("TRAIN_STEPS") == 25
    with pytest.raises(errors.UserError, match="TRAIN_STEP is not set. Did you mean TRAIN_STEPS"):
        gin_utils.query("TRAIN_STEP")


def test_gin_is_locked_after_parse():
    _parse("MODEL_DIR='b'")
    with pytest.raises(RuntimeError, match="locked"):
        gin.bind_parameter("TASK/gin.macro.value", 3)


def test_user_errors_of_the_root_stay_one_line():
    with pytest.raises(errors.UserError) as caught:
        _run("TRAIN_STEPS=-1")
    assert str(caught.value) == "total_steps is negative"


def test_a_failed_parse_leaves_no_configuration_in_force():
    _parse("MODEL_DIR='b'")
    with pytest.raises(errors.UserError):
        _parse("NOTHING=1")
    with pytest.raises(RuntimeError, match="parse first"):
        gin_utils.operative_config()


# What is saved.


def _replay(text):
    """What the text alone builds: no search paths, another directory."""
    _write({"alone/config.gin": text})
    return _run_file("alone/config.gin")


def _without_functions(built):
    rate = [built["rate_fn"](step) for step in range(6)]
    inner = built["extras"].pop("apple")
    return {**built, "rate_fn": rate, "inner": [inner[0](2), inner[1]]}


def test_the_operative_configuration_alone_repeats_the_run():
    built = _run("train_eval/data.DatasetConfig.batch_size=2")
    text = gin_utils.operative_config()
    os.rename("gin", "hidden")
    again = _replay(text)
    assert gin_utils.operative_config() == text
    assert list(again["extras"]) == list(built["extras"])
    assert _without_functions(again) == _without_functions(built)


def test_gin_itself_can_read_the_operative_configuration():
    built = _run()
    text = gin_utils.operative_config()
    gin.clear_config()
    gin.parse_config(text)
    again = gin.get_configurable(sys.modules["toyclip.train"].train)()
    assert _without_functions(again) == _without_functions(built)


def test_the_operative_configuration_reads_well():
    _run()
    text = gin_utils.operative_config()
    assert text.startswith(
        "from __gin__ import dynamic_registration\n"
        "from toyclip import data\n"
        "from toyclip import schedules\n"
        "from toyclip import towers\n"
        "from toyclip import train as train_script\n"
        "\n"
        "BATCH_SIZE = 40\n"
    )
    assert "\ntrain_script.train:\n    data = @train/data.DatasetConfig()\n" in text
    # A scope stands only where it tells calls apart: MODEL/towers.Clip, by gin's own record.
    assert "\ntowers.Clip:\n" in text and "\nimage/towers.Tower:\n" in text
    assert text.index("train_script.train:") < text.index("data.DatasetConfig:")
    # Defaults are recorded, those that gin cannot write are not.
    assert "    rates = (0.1,)\n" in text
    assert "act" not in text.split() and "dtype" not in text.split()


def test_functions_not_yet_called_keep_their_bindings():
    _run()
    text = gin_utils.operative_config()
    assert "schedules.warmup:\n    peak = %PEAK\n    warmup_steps = 4\n" in text
    assert "LEARNING_RATE = 0.5" in text


def test_macros_that_only_an_overridden_argument_read_are_dropped():
    _write(
        {
            "toyclip/outer.py": "def outer(inner):\n  return inner(task='mine')\n",
            "gin/tail.gin": "from __gin__ import dynamic_registration\n"
            "from toyclip import data\n"
            "from toyclip import outer\n"
            "TASK = @outer.outer()\nouter.outer.inner = @data.name_of\n"
            "data.name_of.task = %HIDDEN\nHIDDEN = 'hidden'\n",
        }
    )
    built = _run(files=("gin/toy_stage2.gin", "gin/tail.gin"))
    assert built["data"].task == "mine"
    text = gin_utils.operative_config()
    assert _replay(text)["data"].task == "mine"
    assert gin_utils.operative_config() == text


def test_a_function_passed_as_an_object_sees_the_scope_of_its_caller():
    _write(
        {
            "toyclip/outer.py": "def outer(inner):\n  return inner()\n",
            "gin/tail.gin": """
                from __gin__ import dynamic_registration
                from toyclip import data
                from toyclip import outer
                TASK = @mine/outer.outer()
                outer.outer.inner = %NAMER
                NAMER = @data.name_of
                data.name_of.task = 'anybody'
                mine/data.name_of.task = 'mine'
            """,
        }
    )
    assert _run(files=("gin/toy_stage2.gin", "gin/tail.gin"))["data"].task == "mine"
    text = gin_utils.operative_config()
    assert _replay(text)["data"].task == "mine"
    assert gin_utils.operative_config() == text


def test_imports_for_their_side_effects_are_kept():
    _write({"toyclip/tasks.py": "", "gin/tail.gin": "import toyclip.tasks\n"})
    _run(files=("gin/toy_stage1.gin", "gin/tail.gin"))
    assert "from toyclip import tasks\n" in gin_utils.operative_config()


def test_modules_of_the_same_name_get_different_names():
    _write(
        {
            "toyclip/deep/__init__.py": "",
            "toyclip/deep/towers.py": "def three():\n  return 3\n",
            "gin/tail.gin": "from __gin__ import dynamic_registration\n"
            "from toyclip.deep import towers\nBATCH_SIZE = @towers.three()\n",
        }
    )
    assert _run(files=("gin/toy_stage1.gin", "gin/tail.gin"))["data"].batch_size == 3
    text = gin_utils.operative_config()
    assert "from toyclip.deep import towers as towers2\n" in text
    assert _replay(text)["data"].batch_size == 3
    assert gin_utils.operative_config() == text


def test_shared_objects_are_replayed():
    _write(
        {
            "gin/tail.gin": IMPORTS + "MODEL = [@one/gin.singleton(), @one/gin.singleton()]\n"
            "one/gin.singleton.constructor = @towers.Pooling\n"
        }
    )
    first, second = _run(files=("gin/engine/train.gin", "gin/tail.gin"))["model"]
    assert first is second
    text = gin_utils.operative_config()
    first, second = _replay(text)["model"]
    assert first is second
    assert gin_utils.operative_config() == text


def test_linen_modules_replay_in_a_new_process(workspace):
    _write(
        {
            "toyclip/linen.py": """
            import jax
            from flax import linen as nn

            class Tower(nn.Module):
                width: int
                act: object = jax.nn.gelu
                block: type = nn.Dense
                dtype: object = jax.numpy.float32

                @nn.compact
                def __call__(self, images):
                    return self.act(self.block(self.width, name="out")(images))
        """,
            "gin/tail.gin": """
            from __gin__ import dynamic_registration
            from flax import linen as nn
            from jax import nn as jnn
            from toyclip import linen
            MODEL = {'image': @image/linen.Tower(), 'text': @text/linen.Tower()}
            linen.Tower.width = 4
            image/linen.Tower.act = @jnn.silu
            linen.Tower.block = @nn.Dense
            nn.Dense.use_bias = False
        """,
        }
    )
    model = _run(files=("gin/engine/train.gin", "gin/tail.gin"))["model"]
    gin_utils.summarize_gin_config("saved")
    program = (
        "from clipa_t5x import gin_utils\n"
        f"gin_utils.parse(['saved/config.gin'], root='{ROOT}')\n"
        f"model = gin_utils.get_root('{ROOT}')()['model']\n"
        "print(repr(model) == open('model.txt').read())\n"
        "print(gin_utils.operative_config() == open('saved/config.gin').read())\n"
    )
    with open("model.txt", "w") as file:
        file.write(repr(model))
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(workspace), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.split() == ["True", "True"], result.stderr


def test_config_gin_is_written_whole_and_summarized():
    class Writer:
        def write_texts(self, step, texts):
            self.written = (step, texts)

    _run()
    writer = Writer()
    gin_utils.summarize_gin_config("deep/er", writer, step=7)
    text = gin_utils.operative_config()
    with open("deep/er/config.gin") as file:
        assert file.read() == text
    assert os.listdir("deep/er") == ["config.gin"]
    step, texts = writer.written
    assert step == 7 and "    MODEL_DIR = 'runs/toy'\n" in texts["gin_config"]


# Again in the same process.


def test_stages_follow_each_other_in_one_process():
    first = _run()
    text = gin_utils.operative_config()
    assert _run("TASK='other'")["data"].task == "other"
    assert _run(files=("gin/toy_stage1.gin",))["data"].task == "toy"
    assert "TASK" not in gin_utils.operative_config()
    again = _run()
    assert gin_utils.operative_config() == text
    assert _without_functions(again) == _without_functions(first)


def test_one_alias_may_mean_another_module_in_the_next_stage():
    start = "from __gin__ import dynamic_registration\n"
    _write(
        {
            "gin/a.gin": start + "from toyclip import towers as t\nMODEL = @t.Pooling()\n",
            "gin/b.gin": start + "from toyclip import data as t\nMODEL = @t.name_of()\n",
        }
    )
    for path, expected in (("gin/a.gin", "Pooling(kind='last')"), ("gin/b.gin", "'none'")):
        assert repr(_run(files=("gin/engine/train.gin", path))["model"]) == expected


# T5X's flags.


def test_rewrites_only_gin_flags():
    argv = ["prog", "--gin.A/b.C='x=y'", "--gin_file=a.gin", "-v", "--", "--gin.X=1"]
    assert gin_utils.rewrite_gin_args(argv) == [
        "prog",
        "--gin_bindings=A/b.C = 'x=y'",
        "--gin_file=a.gin",
        "-v",
        "--",
        "--gin.X=1",
    ]
    with pytest.raises(errors.UserError, match="--gin.X has no value"):
        gin_utils.rewrite_gin_args(["--gin.X", "1"])
