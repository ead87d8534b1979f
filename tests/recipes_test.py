"""The paper's recipes in gin/: their models, tokens, steps and layouts are the published ones."""

import math

import experiments
import jax
import pytest
from gin_test import GOLDENS, SCHEDULE_FILES, STAGE_FILES, check_golden

from clipa_t5x import gin_utils, model_info, models, stage_info, train

PAPER = [name for name in SCHEDULE_FILES if name not in ("digits", "shapes")]


def arguments(experiment, *bindings):
    """The objects of an experiment, built without its directories."""
    experiments.parse(
        experiment, "MODEL_DIR = 'unused'", "INITIAL_CHECKPOINT_PATH = None", *bindings
    )
    return gin_utils.build_arguments(experiments.TRAIN)


def abstract_params(built):
    """Shapes of an experiment's parameters."""
    batch = built["train_dataset_cfg"].batch_spec()
    return jax.eval_shape(
        lambda: models.init_params(
            built["model"],
            jax.random.key(0),
            {k: jax.numpy.zeros((1, *v.shape[1:]), v.dtype) for k, v in batch.items()},
        )
    )


@pytest.mark.parametrize(
    "experiment, parameters",
    [
        ("S16_stage2", 55_479_169),
        ("B16_stage2", 140_531_969),
        ("L16_i37_t8_stage2", 414_131_713),
        ("L14_stage2", 413_947_393),
        ("H14_stage2", 967_906_049),
        ("H14_stage1", 967_881_473),
        ("g14_stage2", 1_684_961_409),
        ("bigG14_stage2", 2_516_796_289),
    ],
)
def test_models_have_the_published_number_of_parameters(experiment, parameters):
    assert model_info.num_params(abstract_params(arguments(experiment))) == parameters


# Experiment: patches kept, text tokens, steps, batch.
TOKENS_AND_STEPS = {
    "S16_64_stage1": (16, 32, 78_125, 32_768),
    "S16_112_stage1": (49, 32, 78_125, 32_768),
    "S16_stage2": (196, 32, 4_000, 32_768),
    "B16_160_stage1": (100, 32, 78_125, 32_768),
    "B16_i50_t16_stage1": (49, 16, 39_062, 65_536),
    "B16_i50_t16_stage2": (196, 16, 16_000, 8_192),
    "L16_i17_t16_stage1": (16, 16, 78_125, 32_768),
    "L16_i17_t16_stage2": (196, 16, 18_285, 7_168),
    "L16_i37_t8_stage1": (36, 8, 78_125, 32_768),
    "L16_i37_t8_stage2": (196, 32, 18_285, 7_168),
    "L14_stage1": (36, 8, 195_490, 65_536),
    "H14_70_stage1": (25, 8, 195_490, 65_536),
    "H14_stage2": (179, 32, 16_000, 32_768),
    "H14_laion2b_stage3": (345, 32, 8_000, 16_384),
    "g14_stage1": (25, 8, 195_490, 65_536),
    "bigG14_stage1": (36, 8, 195_490, 65_536),
    "bigG14_70_stage1": (25, 8, 195_490, 65_536),
    "bigG14_stage2": (153, 32, 32_000, 16_384),
    "bigG14_stage3": (345, 32, 8_000, 16_384),
}


@pytest.mark.parametrize("experiment", TOKENS_AND_STEPS)
def test_tokens_and_steps_are_the_papers(experiment):
    built = arguments(experiment)
    info = stage_info.StageInfo.collect(
        built["model"],
        {},
        built["train_dataset_cfg"],
        built["checkpoint_cfg"],
        built["total_steps"],
    )
    assert TOKENS_AND_STEPS[experiment] == (
        info.num_image_tokens_kept,
        info.text_length,
        info.total_steps,
        info.batch_size,
    )


def test_all_stages_from_l16_up_jitter_colors():
    def augments(experiment):
        text = (GOLDENS / f"{experiment}.gin").read_text()
        return "\nAUGMENTATION = @augmentation.simclr_jitter_gray\n" in text

    jittering = {name.partition("_")[0] for name in STAGE_FILES if augments(name)}
    others = {name.partition("_")[0] for name in STAGE_FILES if not augments(name)}
    assert jittering == {"L16", "L14", "H14", "g14", "bigG14"}
    assert others == {"S16", "B16", "shapes", "digits"}


@pytest.mark.parametrize("name", PAPER)
def test_the_layout_on_the_intended_mesh_is_the_golden_one(name, request):
    """Every parameter's shape, axes and bytes on the mesh that the recipe names; no devices."""
    built = arguments(f"{name}_stage1")
    devices = math.prod(built["partitioner"].intended_mesh.values())
    text = train.describe(**built)
    assert f"({devices} devices)" in text
    golden = GOLDENS.parent / "layouts" / f"{name}.txt"
    check_golden(golden, text, request.config.getoption("--update_goldens"))


@pytest.mark.parametrize(
    "rules, mesh",
    [
        ("data_parallel", {"replica": 4, "data": 64, "model": 1}),
        ("fsdp_tp2", {"replica": 4, "data": 32, "model": 2}),
    ],
)
def test_rule_sets_are_files(rules, mesh, request):
    """A rule set is exchanged by naming its file after the experiment's."""
    files = [
        str(experiments.GIN / f"{name}.gin") for name in ("H14_stage1", f"partitioning/{rules}")
    ]
    gin_utils.parse(files, ["MODEL_DIR = 'unused'"], [str(experiments.GIN)], root=experiments.TRAIN)
    built = gin_utils.build_arguments(experiments.TRAIN)
    assert built["partitioner"].num_partitions == mesh["model"]
    text = train.describe(**built, mesh_shape=mesh)
    golden = GOLDENS.parent / "layouts" / f"H14_{rules}.txt"
    check_golden(golden, text, request.config.getoption("--update_goldens"))


def test_the_sweep_of_tiny_models_builds(monkeypatch):
    """What it overrides is read, and told apart by the sizes that it makes."""
    monkeypatch.chdir(experiments.REPOSITORY)
    overrides = ["WIDTH = 32", "MLP_DIM = 64", "IMAGE_MASK_RATIO = 0.875", "TEXT_LENGTH = 4"]
    gin_utils.parse(
        ["benchmarks/law/sweep.gin"], [*overrides, "RANDOM_SEED = 1", "MODEL_DIR = 'unused'"],
        [str(experiments.GIN)], root=experiments.TRAIN,
    )  # fmt: skip
    built = gin_utils.build_arguments(experiments.TRAIN)
    towers = built["model"].image_tower, built["model"].text_tower
    assert [(tower.width, tower.mlp_dim) for tower in towers] == [(32, 64)] * 2
    assert towers[0].mask_ratio == 0.875 and built["random_seed"] == 1
    assert built["train_dataset_cfg"].task_feature_lengths == {"images": 48, "text": 4}
