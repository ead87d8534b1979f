"""Every experiment in gin/ resolves to what its golden file says."""

import pathlib

import experiments
import pytest

from clipa_t5x import gin_utils, schedule
from clipa_t5x.data import input_pipeline
from clipa_t5x.errors import UserError

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "gin"
STAGE_FILES = sorted(p.stem for p in experiments.GIN.glob("*_stage*.gin"))
SCHEDULE_FILES = sorted(p.stem for p in experiments.GIN.glob("*.gin") if "_stage" not in p.stem)


def check_golden(path: pathlib.Path, text: str, update: bool) -> None:
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{path} is missing: run pytest --update_goldens and review it"
    assert text == path.read_text(), "resolved differently: run pytest --update_goldens, review"


@pytest.mark.parametrize("experiment", STAGE_FILES)
def test_resolved_configuration_is_the_golden_one(experiment, request):
    bindings = ["MODEL_DIR = '/model_dir'"]
    if not experiment.endswith("stage1"):
        bindings.append("INITIAL_CHECKPOINT_PATH = '/initial_checkpoint'")
    experiments.parse(experiment, *bindings)
    gin_utils.build_arguments(experiments.TRAIN)
    text = gin_utils.operative_config()
    path = GOLDENS / f"{experiment}.gin"
    check_golden(path, text, request.config.getoption("--update_goldens"))


@pytest.mark.parametrize("name", SCHEDULE_FILES)
def test_schedules_name_their_stages_in_order(name):
    search_paths = [str(experiments.GIN), str(experiments.REPOSITORY)]
    files = [str(experiments.GIN / f"{name}.gin")]
    gin_utils.parse(files, ["MODEL_DIR = '/m'"], search_paths, root=schedule.ROOT)
    stages = gin_utils.get_root(schedule.ROOT)().stages
    numbers = [int(stage.removesuffix(".gin").rpartition("_stage")[2]) for stage in stages]
    assert numbers in ([1, 2], [1, 2, 3]) and stages[0] == f"gin/{name}_stage1.gin"
    assert all((experiments.REPOSITORY / stage).exists() for stage in stages)


def test_a_schedule_is_no_experiment():
    files = [str(experiments.GIN / "digits.gin")]
    with pytest.raises(
        UserError, match="a schedule of several stages.* give the file of one stage"
    ):
        gin_utils.parse(files, ["MODEL_DIR = '/m'"], [str(experiments.GIN)], root=experiments.TRAIN)


def test_every_stage_belongs_to_a_schedule():
    named = "".join((experiments.GIN / f"{name}.gin").read_text() for name in SCHEDULE_FILES)
    assert not [stage for stage in STAGE_FILES if f"gin/{stage}.gin" not in named]


@pytest.mark.parametrize("experiment", STAGE_FILES)
def test_experiments_hold_macros_and_includes_only(experiment):
    """So that one file serves every engine; and they are about ten lines."""
    lines = (experiments.GIN / f"{experiment}.gin").read_text().splitlines()
    statements = [line for line in lines if line and not line.startswith("#")]
    for line in statements:
        name = line.partition("=")[0].strip()
        assert line.startswith("include ") or (name.isupper() and "." not in name), line
    assert len(statements) <= 20


def test_the_folder_does_not_shadow_the_gin_library():
    assert not list(experiments.GIN.rglob("__init__.py"))


@pytest.mark.parametrize("name, evaluators, bindings", [
    ("imagenet_variants",
     ["imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_real", "objectnet"],
     ["KEEP_CLASS_NAME = True", "TFDS_DIR = 'elsewhere'"]),
    ("imagenet_variants", ["r"], ["EVALUATORS = {'r': @imagenet_r/ZeroShotClassification()}"]),
    ("retrieval", ["coco", "flickr30k"], ["MAX_CAPTIONS = 3"]),
    ("few_shot", ["few_shot"], ["SHOTS = (2,)"]),
    ("coco", ["coco"], ["COCO_DIR = 'elsewhere'"]), ("flickr30k", ["flickr30k"], []),
    ("clip_benchmark", ["wds_cifar10"], ["CLIP_BENCHMARK_DIR = 'data/wds_cifar10'"]),
    ("clip_benchmark", ["a", "b"], ["CLIP_BENCHMARK_DIRS = ['data/a', 'data/b']"]),
])  # fmt: skip
@pytest.mark.parametrize("base", [
    experiments.GIN / "digits_stage3.gin", experiments.GIN / "H14_stage1.gin",
    GOLDENS / "H14_stage1.gin",  # as a run's config.gin
])  # fmt: skip
def test_evaluations_go_with_any_experiment(base, name, evaluators, bindings):
    """Beside the data of training, which they leave as they are."""
    arguments = []
    for extra, more in (([], []), ([experiments.GIN / f"evals/{name}.gin"], bindings)):
        more = ["MODEL_DIR = 'unused'", "INITIAL_CHECKPOINT_PATH = None", *more]
        files = [str(file) for file in (base, *extra)]
        gin_utils.parse(files, more, [str(experiments.GIN)], root=experiments.TRAIN)
        arguments.append(gin_utils.build_arguments(experiments.TRAIN))
    plain, extended = arguments
    assert list(extended["evaluators"]) == evaluators
    for key in ("train_dataset_cfg", "train_eval_dataset_cfg"):
        assert extended[key] == plain[key]
    found = [getattr(item, "dataset_cfg", None) for item in extended["evaluators"].values()]
    names = [cfg.mixture_or_task_name for cfg in found if cfg]
    retrieval = name in ("retrieval", "coco", "flickr30k")
    expected = {"imagenet_variants": evaluators if len(evaluators) > 1 else ["imagenet_r"]}
    assert names == expected.get(name, evaluators if retrieval else [])
    if retrieval:
        assert all(input_pipeline.has_all_captions(cfg) for cfg in found)
