"""What trains otherwise is refused with its difference, and nothing else is."""

import pathlib

import experiments
import pytest

from clipa_t5x import gin_utils, main, recipe_changes
from clipa_t5x.errors import UserError

STAGE1 = f"--gin_file={experiments.GIN}/digits_stage1.gin"


@pytest.fixture(autouse=True)
def in_workspace(tmp_path_factory, monkeypatch):
    parent = tmp_path_factory.getbasetemp() / "recipe_changes"
    parent.mkdir(exist_ok=True)
    monkeypatch.chdir(experiments.digits_dir(str(parent)))


def resolved(*bindings, recipe="digits_stage1"):
    """A configuration as a start leaves it when all is built."""
    experiments.parse(recipe, "MODEL_DIR = 'here'", *bindings)
    gin_utils.build_arguments(experiments.TRAIN)
    return gin_utils.operative_config()


@pytest.mark.parametrize(
    "bindings, lines",
    [
        (["LEARNING_RATE = 0.5"], ["- LEARNING_RATE = 0.0015", "+ LEARNING_RATE = 0.5"]),
        (["adamw.b1 = 0.8"], ["- optimizers.adamw.b1 = 0.9", "+ optimizers.adamw.b1 = 0.8"]),
        (["RANDOM_SEED = 7"], ["- RANDOM_SEED = 0", "+ RANDOM_SEED = 7"]),
        (
            ["TASK_FEATURE_LENGTHS = {'images': 24, 'text': 8}"],
            ["- TASK_FEATURE_LENGTHS = {'images': 16, 'text': 8}",
             "+ TASK_FEATURE_LENGTHS = {'images': 24, 'text': 8}"],
        ),
        (["LOSS = @losses.sigmoid_contrastive"],
         ["- LOSS = @losses.softmax_contrastive", "+ LOSS = @losses.sigmoid_contrastive"]),
        (["train/DatasetConfig.max_examples = 5"],
         ["- train/input_pipeline.DatasetConfig.max_examples = None",
          "+ train/input_pipeline.DatasetConfig.max_examples = 5"]),
        (
            ["schedules.warmup_cosine.peak = 1.0", "WEIGHT_DECAY = 0.0"],
            ["- WEIGHT_DECAY = 0.2", "+ WEIGHT_DECAY = 0.0",
             "- schedules.warmup_cosine.peak = 0.0015", "+ schedules.warmup_cosine.peak = 1.0"],
        ),
    ],
)  # fmt: skip
def test_what_trains_otherwise_is_told(bindings, lines):
    assert recipe_changes.differences(resolved(), resolved(*bindings)) == lines
    back = [f"{'+-'[line[0] == '+']}{line[1:]}" for line in lines]
    assert sorted(recipe_changes.differences(resolved(*bindings), resolved())) == sorted(back)


@pytest.mark.parametrize(
    "bindings",
    [
        [],
        ["MODEL_DIR = 'there'", "INITIAL_CHECKPOINT_PATH = 'runs/earlier'"],
        ["LOG_PERIOD = 1", "EVAL_PERIOD = 2", "CHECKPOINT_PERIOD = 3", "KEEP_CHECKPOINTS = 4"],
        ["NUM_MICROBATCHES = 2", "LOSS_CHUNKS = 4", "IMAGE_REMAT_POLICY = 'full'"],
        ["NUM_MODEL_PARTITIONS = 2", "MESH = {'replica': 1, 'data': 4, 'model': 2}"],
        ["standard_logical_axis_rules.parameter_partitioning_dims = 2"],
        ["EVALUATORS = {}"],
        ["TRAIN_EVAL_DATASET = None"],
        ["DATA_DIR = 'elsewhere'", "INDEX_DIR = 'index'", "MAX_BAD_FRACTION = 0.5"],
        ["warmup_cosine.peak = 0.0015", "WARMUP_STEPS = 20"],
    ],
)
def test_places_periods_evaluations_and_meshes_may_change(bindings):
    before, after = resolved(), resolved(*bindings)
    assert recipe_changes.differences(before, after) == []
    assert recipe_changes.differences(after, before) == []


def test_a_default_that_is_said_is_no_difference():
    """Also one that is new since the run began."""
    text = resolved()
    line = "    b2 = 0.95\n"
    assert line in text
    assert recipe_changes.differences(text, text.replace(line, "")) == []
    assert recipe_changes.differences(text.replace(line, ""), text) == []
    assert recipe_changes.differences(text.replace(line, ""), text.replace("0.95", "0.5")) == [
        "- optimizers.adamw.b2 = 0.95",
        "+ optimizers.adamw.b2 = 0.5",
    ]


def test_parameters_have_their_macros_replaced():
    found = recipe_changes.parameters(resolved("LEARNING_RATE = 0.5", "RANDOM_SEED = 7"))
    assert found["schedules.warmup_cosine.peak"] == 0.5
    assert found["train/input_pipeline.DatasetConfig.seed"] == 7
    lengths = found["train/input_pipeline.DatasetConfig.task_feature_lengths"]
    assert lengths == {"images": 16, "text": 8}
    assert found["vision_transformer.VisionTransformer.width"] == 128
    assert found["models.ClipModel.text_tower"] == "@text_transformer.TextTransformer()"
    # What evaluates trains nothing.
    assert not [name for name in found if "ZeroShot" in name]
    assert recipe_changes.parameters("") == {}


def test_values_over_several_lines_are_one_value():
    def recipe(*patterns):
        return resolved(f"DECAYED_PARAMETERS = {list(patterns)}")

    long = ["image_tower/" + "x" * 60, "text_tower/" + "y" * 60]
    before, after = recipe(*long, ".*/kernel"), recipe(*long, ".*/bias")
    assert "DECAYED_PARAMETERS = [\n" in before
    assert recipe_changes.differences(before, before) == []
    assert recipe_changes.differences(before, after) == [
        f"- DECAYED_PARAMETERS = {[*long, '.*/kernel']}",
        f"+ DECAYED_PARAMETERS = {[*long, '.*/bias']}",
    ]


def test_every_recipe_equals_itself_and_no_other_stage():
    earlier = "INITIAL_CHECKPOINT_PATH = 'earlier'"
    stages = [resolved(earlier, recipe=f"digits_stage{n}") for n in (1, 2, 3)]
    for i, before in enumerate(stages):
        for j, after in enumerate(stages):
            assert bool(recipe_changes.differences(before, after)) == (i != j)


def test_a_folder_without_checkpoints_refuses_nothing(tmp_path):
    recipe_changes.refuse(str(tmp_path / "none"), resolved())
    (tmp_path / "config.gin").write_text(resolved())
    recipe_changes.refuse(str(tmp_path), resolved("LEARNING_RATE = 0.5"))
    (tmp_path / "checkpoint_5").mkdir()
    with pytest.raises(UserError, match="has changed since it trained there"):
        recipe_changes.refuse(str(tmp_path), resolved("LEARNING_RATE = 0.5"))
    recipe_changes.refuse(str(tmp_path), resolved())


def test_a_long_difference_is_cut(tmp_path):
    (tmp_path / "checkpoint_5").mkdir()
    (tmp_path / "config.gin").write_text(resolved().replace(" = ", " = 1"))
    with pytest.raises(UserError) as caught:
        recipe_changes.refuse(str(tmp_path), resolved())
    lines = str(caught.value).splitlines()
    assert len(lines) == 32 and lines[-1].endswith("more")


def run(verb, *arguments):
    with pytest.raises(SystemExit) as caught:
        paths = f"--gin_search_paths={experiments.GIN},{experiments.REPOSITORY}"
        main.run(verb, [*arguments, paths, "--compilation_cache_dir="])
    return caught.value.code


def test_train_goes_on_from_schedule_from_itself_and_from_its_configuration(tmp_path, capsys):
    small = [f"--gin_bindings={b}" for b in (*experiments.UNEVALUATED, "TRAIN_STEPS = 2")]
    schedule = [f"--gin_file={experiments.GIN}/digits.gin", *small]
    one_stage = "--gin_bindings=STAGES = ['gin/digits_stage1.gin']"
    assert run("schedule", *schedule, one_stage, f"--gin.MODEL_DIR='{tmp_path}/all'") == 0
    model_dir = f"--gin.MODEL_DIR='{tmp_path}/all/stage1'"
    assert run("train", STAGE1, *small, model_dir, "--gin.LOG_PERIOD=1") == 0
    assert run("train", f"--gin_file={tmp_path}/all/stage1/config.gin") == 0
    written = pathlib.Path(tmp_path / "all/stage1/config.gin").read_text()
    capsys.readouterr()
    more = [STAGE1, *small, model_dir, "--gin.TRAIN_STEPS=3"]
    assert run("train", *more) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-2:] == ["  - TRAIN_STEPS = 2", "  + TRAIN_STEPS = 3"], error
    assert (tmp_path / "all/stage1/config.gin").read_text() == written
    assert run("train", *more, "--accept_recipe_changes") == 0
    assert run("train", *more) == 0
    assert run("schedule", *schedule, one_stage, f"--gin.MODEL_DIR='{tmp_path}/all'") == 2
