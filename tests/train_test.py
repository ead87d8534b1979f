import json

import experiments
import jax
import numpy as np
import pytest

from clipa_t5x import gin_utils, train
from clipa_t5x.errors import UserError


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return experiments.digits_dir(str(tmp_path_factory.mktemp("workspace")))


@pytest.fixture(autouse=True)
def in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def overrides(model_dir, **macros):
    return [*experiments.UNEVALUATED, f"MODEL_DIR = {str(model_dir)!r}",
            *(f"{name} = {value!r}" for name, value in macros.items())]  # fmt: skip


def flags(model_dir, **macros):
    return [f"--gin_bindings={b}" for b in overrides(model_dir, **macros)]


def assert_same_arrays(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            np.testing.assert_allclose(a[name], b[name], err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_two_processes_equal_one(workspace, tmp_path):
    """2 processes x 4 devices = 1 process x 8 devices: same data, same losses, same parameters."""
    recipe = experiments.command("train", f"--gin_file={experiments.GIN}/digits_stage1.gin")
    macros = ["TRAIN_STEPS = 4", "CHECKPOINT_PERIOD = 4", "EVAL_PERIOD = 4", "WARMUP_STEPS = 2"]
    one, two = tmp_path / "one", tmp_path / "two"
    macros = [*experiments.MINIATURE, *macros]
    experiments.train("digits_stage1", *macros, f"MODEL_DIR = {str(one)!r}")
    bindings = [f"--gin_bindings={b}" for b in (*macros, f"MODEL_DIR = {str(two)!r}")]
    experiments.run_processes([*recipe, *bindings], workspace, 2, num_devices=4)
    losses = [[r["loss"] for r in experiments.records(d, "train").values()] for d in (one, two)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    states = [experiments.saved_state(directory, 4) for directory in (one, two)]
    # A softmax does not feel its keys' bias: the gradient is rounding noise, which Adam scales up.
    states = [{k: v for k, v in s.items() if "key/bias" not in k} for s in states]
    assert_same_arrays(*states, rtol=1e-3, atol=1e-5)
    for group in ("inference_eval/digit", "inference_eval/gallery"):
        assert experiments.records(one, group)[4] == experiments.records(two, group)[4]


def test_the_saved_configuration_alone_repeats_the_run(tmp_path):
    first = experiments.train("digits_stage1", *overrides(tmp_path / "a", TRAIN_STEPS=3))
    config = tmp_path / "config.gin"
    config.write_text((tmp_path / "a" / "config.gin").read_text())
    gin_utils.parse([str(config)], [f"MODEL_DIR = {str(tmp_path / 'b')!r}"], [],
                    root=experiments.TRAIN)  # fmt: skip
    second = gin_utils.get_root(experiments.TRAIN)()
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    a, b = ((tmp_path / d / "config.gin").read_text() for d in "ab")
    assert a.replace(str(tmp_path / "a"), "") == b.replace(str(tmp_path / "b"), "")


def test_stage_2_takes_parameters_and_nothing_else(tmp_path):
    one, two = tmp_path / "stage1", tmp_path / "stage2"
    before = experiments.train("digits_stage1", *overrides(one, TRAIN_STEPS=3))
    macros = {"TRAIN_STEPS": 1, "INITIAL_CHECKPOINT_PATH": str(one), "LEARNING_RATE": 0.0}
    after = experiments.train("digits_stage2", *overrides(two, **macros))
    text = after.params["text_tower"]
    assert text["position_embedding"].shape == (16, 32)
    for name in ("image_tower", "logit_scale"):
        jax.tree.map(np.testing.assert_array_equal, before.params[name], after.params[name])
    np.testing.assert_array_equal(
        before.params["text_tower"]["encoder"]["layers_0"]["mlp"]["fc1"]["kernel"],
        text["encoder"]["layers_0"]["mlp"]["fc1"]["kernel"],
    )
    assert int(after.step) == 1
    counts = [x for x in jax.tree.leaves(after.opt_state) if x.dtype == np.int32]
    assert counts and all(int(count) == 1 for count in counts)


def test_digits_are_learnt(workspace, tmp_path):
    """Half of stage 1, on real handwriting."""
    recipe = experiments.command("train", f"--gin_file={experiments.GIN}/digits_stage1.gin")
    macros = [f"--gin.MODEL_DIR={str(tmp_path)!r}", "--gin.TRAIN_STEPS=150"]
    done = experiments.run([*recipe, *macros], workspace, optimized=True)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = experiments.records(tmp_path, "train")
    assert losses[140]["loss"] < 0.8 * losses[20]["loss"]
    assert experiments.records(tmp_path, "inference_eval/digit")[150]["accuracy"] > 0.75
    gallery = json.loads((tmp_path / "gallery.json").read_text())
    assert len(gallery["items"]) == 12


@pytest.mark.slow
def test_three_stages_of_digits_reach_the_readmes_figure(workspace, tmp_path):
    recipe = experiments.command("schedule", f"--gin_file={experiments.GIN}/digits.gin")
    recipe.append(f"--gin_search_paths={experiments.GIN},{experiments.REPOSITORY}")
    macros = [f"--gin.MODEL_DIR={str(tmp_path)!r}"]
    done = experiments.run([*recipe, *macros], workspace, timeout=900, optimized=True)
    assert done.returncode == 0, done.stderr[-4000:]
    last = experiments.records(tmp_path / "stage3", "inference_eval/digit")[200]
    assert last["accuracy"] >= 0.95 and last["num_examples"] == 360
    # The second stage began where the first had ended, not from scratch.
    first, second = (experiments.records(tmp_path / f"stage{i}", "train") for i in (1, 2))
    assert second[20]["loss"] < first[20]["loss"]


def test_a_finished_run_has_nothing_to_do(tmp_path):
    macros = overrides(tmp_path / "run", TRAIN_STEPS=2)
    state = experiments.train("digits_stage1", *macros)
    again = experiments.train("digits_stage1", *macros)
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    with pytest.raises(UserError, match="TRAIN_STEPS is 1, and the newest checkpoint .* step 2"):
        experiments.train("digits_stage1", *macros, "TRAIN_STEPS = 1", "WARMUP_STEPS = 0")


@pytest.mark.parametrize(
    "experiment, bindings, message",
    [
        ("digits_stage1", ["MODEL_DIR = ''"], "MODEL_DIR is empty"),
        ("digits_stage1", ["BATCH_SIZE = 60"], r"BATCH_SIZE is 60.*8 parts.*56 or 64"),
        ("digits_stage1", ["NUM_MICROBATCHES = 5"], "is 5.* 8 rows .*64: .*, 4, 8"),
        ("digits_stage1", ["VOCABULARY_PATH = 'no/vocab.txt'"], "vocabulary file no/vocab.txt"),
        ("digits_stage1", ["DATA_DIR = 'nowhere'"], "directory nowhere does not exist"),
        ("digits_stage1", ["MIXTURE_OR_TASK_NAME = 'digit'"], "'digit', which is not a registered"),
        ("digits_stage1", ["WARMUP_STEPS = 5"], "WARMUP_STEPS is 5 and TRAIN_STEPS is 3"),
        ("digits_stage1", ["LOG_PERIOD = 0"], "LOG_PERIOD is 0"),
        ("digits_stage1", ["CHECKPOINT_PERIOD = 0"], "CHECKPOINT_PERIOD is 0"),
        ("digits_stage1", ["EVAL_PERIOD = '2'"], "EVAL_PERIOD is '2'"),
        ("digits_stage1", ["BATCH_SIZE = '64'"], "BATCH_SIZE is '64'"),
        ("digits_stage1", ["BATCH_SIZE = 64.0"], "BATCH_SIZE is 64.0"),
        ("digits_stage1", ["LEARNING_RATE = '1e-3'"], "LEARNING_RATE is '1e-3'"),
        ("digits_stage1", ["CAPTION_KEY = 'text'"], "have no field 'text'; their fields are"),
        ("digits_stage1", ["IMAGE_MASK_RATIO = 1.0"], r"mask_ratio is 1.0; it must be in \[0, 1\)"),
        ("digits_stage1", ["digit/ZeroShotClassification.class_names_path = 'gone'"], "gone"),
        ("digits_stage1", ["TextTransformer.vocab_size = 20"], "vocab_size is 20"),
        ("digits_stage1", ["RANDOM_SEED = 'x'"], "RANDOM_SEED is 'x'"),
        ("digits_stage1", ["KEEP_CHECKPOINTS = 0"], "KEEP_CHECKPOINTS is 0"),
        ("digits_stage1", ["EVAL_EXAMPLES = 0"], "EVAL_EXAMPLES is 0"),
        ("digits_stage1", ["MU_DTYPE = 'float23'"], "MU_DTYPE is 'float23'; .*'bfloat16'"),
        ("digits_stage1", ["MODEL_DIR = 'data/digits/vocab.txt'"], "MODEL_DIR .* is a file"),
        ("digits_stage1", ["TASK_FEATURE_LENGTHS = {'images': 16}"], "'text' must be"),
        ("digits_stage1", ["TEXT_REDUCTION = 'noun'"], "TEXT_REDUCTION is 'noun'; .*'syntax'"),
        ("digits_stage2", ["INITIAL_CHECKPOINT_PATH = 'gone'"], "no complete checkpoint at gone"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_line(tmp_path, experiment, bindings, message):
    if experiment == "digits_stage2" and "INITIAL" not in bindings[0]:
        bindings = [*bindings, "INITIAL_CHECKPOINT_PATH = None"]
    with pytest.raises(UserError, match=message) as caught:
        experiments.train(
            experiment,
            *experiments.MINIATURE,
            "TRAIN_STEPS = 3",
            f"MODEL_DIR = '{tmp_path}/run'",
            *bindings,
        )
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    """And the start that was refused leaves what the one before it wrote."""
    experiments.train("digits_stage1", *overrides(tmp_path / "run", TRAIN_STEPS=2))
    described = ("config.gin", "stage.json", "model-info.txt", "sharding.json")
    before = [(tmp_path / "run" / name).read_text() for name in described]
    other = [*overrides(tmp_path / "run", TRAIN_STEPS=4), "VisionTransformer.mlp_dim = 48"]
    with pytest.raises(UserError, match=r"image_tower/encoder/layers_0/mlp/fc1/kernel is \(32, 64"):
        experiments.train("digits_stage1", *other)
    assert before == [(tmp_path / "run" / name).read_text() for name in described]


@pytest.mark.slow
def test_a_diverged_run_stops_and_saves_no_such_parameters(tmp_path):
    """Also where metrics are not yet due when the checkpoint is."""
    macros = overrides(tmp_path / "run", TRAIN_STEPS=30, LEARNING_RATE=1e30, LOG_PERIOD=30,
                       CHECKPOINT_PERIOD=1)  # fmt: skip
    with pytest.raises(UserError, match="is (nan|inf) at step"):
        experiments.train("digits_stage1", *macros)
    for path in (tmp_path / "run").glob("checkpoint_*"):
        state = experiments.saved_state(tmp_path / "run", int(path.name.split("_")[1]))
        params = {k: v for k, v in state.items() if k.startswith("params/")}
        assert params and all(np.isfinite(value).all() for value in params.values())


def test_describe_lays_bigg_on_its_mesh_without_allocating_it():
    experiments.parse("bigG14_stage1", "MODEL_DIR = 'unused'")
    text = train.describe(**gin_utils.build_arguments(experiments.TRAIN))
    assert "mesh: replica=4, data=64, model=1 (256 devices)" in text
    assert "parameters: 2,516,765,569" in text
    live = sum(x.nbytes for x in jax.live_arrays())
    assert live < 1e9
    narrow = train.describe(
        **gin_utils.build_arguments(experiments.TRAIN), mesh_shape={"data": 16, "model": 2}
    )
    assert "mesh: replica=1, data=16, model=2 (32 devices)" in narrow
