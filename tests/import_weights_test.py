import dataclasses
import json
import pathlib
import re

import clipa_files
import experiments
import google_crc32c
import jax
import numpy as np
import pytest
from saved_runs import assert_same

from clipa_t5x import (
    bad_numbers,
    checkpoint_manifest,
    checkpoints,
    experiment,
    export,
    gin_utils,
    import_weights,
    main,
    recipe_changes,
    train,
    trainer,
)
from clipa_t5x.errors import UserError
from clipa_t5x.weights import open_clip_options, open_clip_peer, parity

SIZES = {"width": 32, "mlp_dim": 64, "num_heads": 4}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return experiments.digits_dir(str(tmp_path_factory.mktemp("workspace")))


@pytest.fixture(autouse=True)
def in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture
def weights(tmp_path):
    """CLIPA's training checkpoint of the miniature digits model, with longer texts."""
    return save(tmp_path / "clipa.npz", length=16)


def save(path, length):
    arrays = clipa_files.arrays(
        image={**SIZES, "depth": 2}, text={**SIZES, "depth": 1}, patch=4, vocabulary=512,
        out_dim=32, length=length,
    )  # fmt: skip
    more = {"opt/1/0/0": np.int32(9), "chrono/accum_train_time": np.float64(1)}
    np.savez(path, **{f"params/{name}": array for name, array in arrays.items()}, **more)
    return str(path)


def bindings(model_dir, *more):
    return [*experiments.UNEVALUATED, f"MODEL_DIR = {str(model_dir)!r}", "TRAIN_STEPS = 2", *more]


def run(source, model_dir, *more):
    experiments.parse("digits_stage1", *bindings(model_dir, *more))
    arguments = gin_utils.build_arguments(experiments.TRAIN)
    return import_weights.import_weights(source=source, **arguments)


def test_what_is_imported_is_trained_as_a_stage_that_begins_with_it(weights, tmp_path):
    imported, direct = tmp_path / "imported", tmp_path / "direct"
    summary = run(weights, imported)
    assert "CLIPA's layout" in summary
    assert "resized text_tower/position_embedding: 16 -> 8 positions" in summary
    assert "left out 2 arrays (opt: 1, chrono: 1)" in summary
    assert str(imported / "checkpoint_0") in summary
    checkpoint_manifest.check(imported / "checkpoint_0", 0)
    assert experiments.saved_state(str(imported), 0)["step"] == 0
    # The same configuration goes on from there, and is the recipe that was written down.
    experiments.parse("digits_stage1", *bindings(imported))
    arguments = gin_utils.build_arguments(experiments.TRAIN)
    recipe_changes.refuse(str(imported), gin_utils.operative_config())
    states = []
    for model_dir, path in ((imported, None), (direct, weights)):
        checkpointer = checkpoints.Checkpointer(str(model_dir), arguments["checkpoint_cfg"].save)
        cfg = dataclasses.replace(arguments["checkpoint_cfg"].restore, path=path)
        data = arguments["train_dataset_cfg"]
        bound = trainer.Trainer(
            **{name: arguments[name] for name in ("model", "optimizer", "partitioner")},
            batch_spec=data.batch_spec(), bad_numbers=bad_numbers.Policy(),
        )  # fmt: skip
        start = train.starting_point(bound, checkpointer, cfg, data, arguments["random_seed"])
        assert (start.step, start.position) == (0, 0)
        states.append(start.state)
        checkpointer.close()
    assert_same(*states)


@pytest.mark.slow
def test_training_goes_on_from_an_import(weights, tmp_path):
    imported, direct = tmp_path / "imported", tmp_path / "direct"
    run(weights, imported)
    experiments.train("digits_stage1", *bindings(imported))
    experiments.train("digits_stage1", *bindings(direct, f"INITIAL_CHECKPOINT_PATH = {weights!r}"))
    states = [experiments.saved_state(str(each), 2) for each in (imported, direct)]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        np.testing.assert_array_equal(states[0][name], states[1][name], err_msg=name)


def test_numbers_that_become_others_and_a_missing_vocabulary_are_told(weights, tmp_path):
    with np.load(weights) as arrays:
        halves = {name: x.astype("f2") if x.ndim > 1 else x for name, x in arrays.items()}
    np.savez(tmp_path / "halves.npz", **halves)
    summary = run(str(tmp_path / "halves.npz"), tmp_path / "run", "VOCABULARY_PATH = 'gone.txt'")
    assert re.search(r"\n\d+ arrays of float16 became float32\n", summary)
    assert "warning: vocabulary file gone.txt does not exist: set VOCABULARY_PATH" in summary


def test_a_folder_with_a_checkpoint_and_another_model_are_refused(weights, tmp_path):
    model_dir = tmp_path / "run"
    with pytest.raises(UserError, match="VisionTransformer.depth is 2 there and 1 here"):
        run(weights, model_dir, "VisionTransformer.depth = 1")
    assert not model_dir.exists()
    run(weights, model_dir)
    with pytest.raises(UserError, match="has a checkpoint already, of step 0"):
        run(weights, model_dir)
    assert checkpoints.all_steps(str(model_dir)) == [0]


def test_the_command_prints_what_it_did_and_training_goes_on(weights, tmp_path, capsys):
    """With the same command line, of a stage that begins with another's parameters."""
    files, paths = [str(experiments.GIN / "digits_stage2.gin")], [str(experiments.GIN)]
    gin = [f"--gin_file={files[0]}", f"--gin_search_paths={paths[0]}"]
    flags = [f"--gin_bindings={each}" for each in bindings(tmp_path / "run")]
    for arguments, status in (([], 2), ([f"--source={weights}"], 0)):
        with pytest.raises(SystemExit) as exit_:
            main.run("import_weights", [*gin, *flags, *arguments, "--compilation_cache_dir="])
        assert exit_.value.code == status
    captured = capsys.readouterr()
    assert "error: import_weights needs --source" in captured.err
    assert f"{weights}: CLIPA's layout, " in captured.out
    assert (pathlib.Path(tmp_path) / "run" / "config.gin").exists()
    experiment.parse_to_go_on(files, bindings(tmp_path / "run"), paths)
    arguments = gin_utils.build_arguments(experiments.TRAIN)
    recipe_changes.refuse(str(tmp_path / "run"), gin_utils.operative_config())
    assert arguments["checkpoint_cfg"].restore.path is None


@pytest.mark.slow
def test_the_command_line_that_imported_trains_evaluates_and_exports(weights, tmp_path):
    given = [
        f"--gin_file={experiments.GIN}/digits_stage2.gin",
        *(f"--gin_bindings={each}" for each in bindings(tmp_path / "run")),
    ]  # fmt: skip
    verbs = {
        "import_weights": [f"--source={weights}", "--verify"],
        "train": [],
        "eval": [],
        "export": ["--verify", "--format=clipa", f"--output_dir={tmp_path}/out"],
    }
    for verb, flags in verbs.items():
        command = experiments.command(verb, *given, *flags)
        result = experiments.run(command, cwd=str(pathlib.Path.cwd()))
        assert result.returncode == 0, (verb, result.stderr[-2000:])
    assert checkpoints.all_steps(str(tmp_path / "run")) == [0, 2]


@pytest.mark.slow
def test_two_processes_certify_what_one_does(weights, workspace, tmp_path):
    """Parameters lie in parts on both, by 'model' too; the first process writes, once."""
    more = ["PjitPartitioner.num_partitions = 4"]
    run(weights, tmp_path / "one", *more)
    recipe = [f"--gin_file={experiments.GIN}/digits_stage1.gin", f"--source={weights}", "--verify"]
    flags = [f"--gin_bindings={each}" for each in bindings(tmp_path / "two", *more)]
    command = experiments.command("import_weights", *recipe, *flags)
    experiments.run_processes(command, workspace, 2, num_devices=4)
    one, two = (
        json.loads((tmp_path / name / "parity.json").read_text()) for name in ("one", "two")
    )
    assert two["passed"] and two["compared_with"] == one["compared_with"]
    assert two["parameters"] == one["parameters"] and len(two["parameters"]) > 40
    for name in ("image_embeddings", "text_embeddings"):
        assert two[name]["max_abs_difference"] == 0


@pytest.mark.parametrize("partitions", [4])
def test_scanned_layers_on_eight_devices(weights, tmp_path, partitions):
    assert jax.device_count() == 8
    scanned = [f"{tower}.scan_layers = True" for tower in ("VisionTransformer", "TextTransformer")]
    run(weights, tmp_path / "run", *scanned, f"PjitPartitioner.num_partitions = {partitions}")
    state = experiments.saved_state(str(tmp_path / "run"), 0)
    stack = state["params/image_tower/encoder/layers/mlp/fc1/bias"]
    names = [f"params/img/Transformer/encoderblock_{i}/MlpBlock_0/Dense_0/bias" for i in range(2)]
    # The certificate has the arrays that each parameter is made of, as they are in the file.
    found = json.loads((tmp_path / "run" / parity.FILE).read_text())["parameters"]
    entry = found["image_tower/encoder/layers/mlp/fc1/bias"]
    assert entry["shape"] == [2, 64] and len(entry["from"]) == 2
    with np.load(weights) as arrays:
        for i, name in enumerate(names):
            np.testing.assert_array_equal(stack[i], arrays[name])
            crc32c = f"{google_crc32c.value(arrays[name].tobytes()):08x}"
            own = {"name": name, "shape": [64], "dtype": "float32", "crc32c": crc32c}
            assert entry["from"][i] == own
    table = found["text_tower/position_embedding"]
    assert table["shape"] == [8, 32] and table["from"][0]["shape"] == [1, 16, 32]


def folder(path, **changes):
    """OpenCLIP's folder of the weights, for texts of 8 tokens; with another configuration."""
    evaluated = "TRAIN_EVAL_DATASET = @train_eval/input_pipeline.DatasetConfig()"
    experiments.parse("digits_stage1", *bindings(path, evaluated))
    arguments = gin_utils.build_arguments(experiments.TRAIN)
    export.export(
        **arguments, checkpoint=save(path.with_suffix(".npz"), length=8), output_dir=str(path),
        probe_rows=0,
    )  # fmt: skip
    config = json.loads((path / open_clip_options.CONFIG_FILE).read_text())
    for section, values in changes.items():
        config["model_cfg"][section].update(values)
    (path / open_clip_options.CONFIG_FILE).write_text(json.dumps(config))
    return str(path)


def test_a_peer_is_asked_for_the_same_images_only(tmp_path, monkeypatch):
    """Its positions are those of its own image size; ours go on from one size to another."""
    source = folder(tmp_path / "folder", vision_cfg={"act_kwargs": {}})
    asked = []

    def embed(path, batch, config):
        asked.append(config)
        raise UserError("asked")

    monkeypatch.setattr(open_clip_peer, "version", lambda: "open_clip 0")
    monkeypatch.setattr(open_clip_peer, "embed", embed)
    larger = "TASK_FEATURE_LENGTHS = {'images': 32, 'text': 8}"
    summary = run(source, tmp_path / "larger", larger)
    assert "is for 16 px and 8 tokens, and these have 32 and 8" in summary and not asked
    with pytest.raises(UserError, match="asked"):
        run(source, tmp_path / "same")
    # It takes our GELU where the folder does not say its own.
    assert asked[0]["model_cfg"]["vision_cfg"]["act_kwargs"] == {"approximate": "tanh"}
    assert not (tmp_path / "same").exists()


@pytest.mark.slow
def test_what_is_imported_from_a_checkpoint_has_its_names(weights, tmp_path):
    run(weights, tmp_path / "run")
    run(str(tmp_path / "run"), tmp_path / "again")
    again = json.loads((tmp_path / "again" / parity.FILE).read_text())["parameters"]
    for name, entry in again.items():
        assert entry["from"] == [{"name": name, **{k: v for k, v in entry.items() if k != "from"}}]


def test_what_is_not_as_it_was_leaves_no_checkpoint(weights, tmp_path, monkeypatch):
    original, calls = parity.embed, []

    def embed(*args):
        calls.append(None)
        return parity.Embeddings(*(each + 1e-3 * len(calls) for each in original(*args)))

    monkeypatch.setattr(parity, "embed", embed)
    experiments.parse("digits_stage1", *bindings(tmp_path / "run"))
    arguments = gin_utils.build_arguments(experiments.TRAIN)
    with pytest.raises(UserError, match="is not imported.*beyond 1e-05"):
        import_weights.import_weights(source=weights, verify=True, **arguments)
    assert checkpoints.all_steps(str(tmp_path / "run")) == []
    assert json.loads((tmp_path / "run" / parity.FILE).read_text())["passed"] is False
