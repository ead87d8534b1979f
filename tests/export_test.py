import contextlib
import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import saved_runs
import tiny_records
import trap_weights
from flax import traverse_util

from clipa_t5x import checkpoints, export, main
from clipa_t5x.data import preprocessors
from clipa_t5x.errors import UserError
from clipa_t5x.weights import exporting, parameter_files, parity

PIXELS, LENGTH = 16, 8


def run_arguments(directory, model, resize=preprocessors.squash):
    """Arguments of `train.train` that exporting looks at."""
    cfg = tiny_records.config(tiny_records.task("exported", directory, resize))
    return {
        "model": model, "train_dataset_cfg": cfg, "train_eval_dataset_cfg": cfg,
        "model_dir": str(directory / "run"), "evaluators": {},
    }  # fmt: skip


@pytest.fixture
def exported(tmp_path, tiny_model):
    """Returns a function that exports trap weights: (arrays here, folder, certificate)."""

    def run(export_format, image=None, text=None, resize=preprocessors.squash, **kwargs):
        model = tiny_model(image=image, text=text)
        weights = trap_weights.save(tmp_path / "w.safetensors", model, PIXELS, LENGTH)
        folder = tmp_path / kwargs.pop("folder", "exported")
        found = export.export(
            **run_arguments(tmp_path, model, resize),
            output_dir=str(folder),
            export_format=export_format,
            checkpoint=str(tmp_path / "w.safetensors"),
            **{"verify": True, **kwargs},
        )
        assert found == json.loads((folder / parity.FILE).read_text())
        return weights, folder, found

    return run


def test_a_folder_for_open_clip(exported):
    weights, folder, found = exported("open_clip")
    tensors = safetensors.numpy.load_file(folder / "open_clip_model.safetensors")
    assert len(tensors) == 5 + 2 * 12 + 2 * 12 + 5 + 2  # stem, blocks, blocks, text's, projections
    assert tensors["logit_scale"] == weights["logit_scale"]
    assert tensors["visual.positional_embedding"].shape == (1 + 4, 32)  # fixed, and stored
    query, key = (
        weights[f"text_tower/encoder/layers/attention/{n}/kernel"][1] for n in ("query", "key")
    )
    in_proj = tensors["transformer.resblocks.1.attn.in_proj_weight"]
    np.testing.assert_array_equal(in_proj[:32], query.reshape(32, 32).T)
    np.testing.assert_array_equal(in_proj[32:64], key.reshape(32, 32).T)
    assert found["passed"] and found["text_embeddings"]["max_abs_difference"] <= 1e-6
    entry = found["parameters"]["transformer.resblocks.1.attn.in_proj_weight"]
    assert entry["shape"] == [96, 32] and len(entry["from"]) == 3
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"]["resize_mode"] == "squash"
    vocabulary = (folder / "vocab.txt").read_text()
    assert vocabulary.startswith("[PAD]\n[UNK]\n[CLS]\nred\n")


def test_images_that_are_cropped_in_evaluation_are_so_there(exported):
    _, folder, _ = exported(
        "open_clip", resize=preprocessors.center_crop, probe_rows=0, verify=False
    )
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"]["resize_mode"] == "shortest"


@pytest.mark.parametrize("scan", [False, True])
def test_clipa_s_npz(exported, scan):
    weights, folder, found = exported("clipa", {"scan_layers": scan}, {"scan_layers": scan})
    with np.load(folder / "model.npz", allow_pickle=False) as arrays:
        assert "params/img/pos_embedding" not in arrays  # fixed
        assert arrays["params/t"].shape == (1,)
        key = arrays[
            "params/img/Transformer/encoderblock_1/MultiHeadDotProductAttention_0/key/kernel"
        ]
    here = "image_tower/encoder/layers{}/attention/key/kernel"
    np.testing.assert_array_equal(
        key, weights[here.format("")][1] if scan else weights[here.format("_1")]
    )
    assert found["passed"] and found["image_embeddings"]["max_abs_difference"] <= 1e-6


_SERVER = """
import json, pathlib, sys
sys.modules["clipa_t5x"] = sys.modules["flax"] = None  # neither can be imported
import jax, numpy as np, safetensors.numpy
from jax import export
folder = pathlib.Path(sys.argv[1])
params = safetensors.numpy.load_file(folder / "parameters.safetensors")
inputs = np.load(folder / "inputs.npz")
for tower in ("image_tower", "text_tower"):
    embed = export.deserialize(bytearray((folder / f"{tower}.stablehlo").read_bytes())).call
    own = {name: array for name, array in params.items() if name.startswith(tower)}
    for rows in (1, 3):
        np.save(folder / f"{tower}{rows}.npy", embed(own, inputs[tower][:rows]))
"""


def test_both_towers_serve_without_this_package(exported, tiny_model):
    weights, folder, _ = exported("stablehlo")
    batch = parity.probe(3, PIXELS, LENGTH, 64, seed=5)
    np.savez(folder / "inputs.npz", image_tower=batch.images, text_tower=batch.ids)
    subprocess.run([sys.executable, "-c", _SERVER, str(folder)], check=True)
    expected = parity.embed(tiny_model(), traverse_util.unflatten_dict(weights, sep="/"), batch)
    preprocessing = json.loads((folder / "signature.json").read_text())["preprocessing"]
    assert preprocessing["images"]["resize_mode"] == "squash"
    assert preprocessing["images"]["mean"] == list(tiny_model().image_mean)
    texts = preprocessing["texts"]
    assert (texts["length"], texts["tokenization"], texts["first_id"]) == (LENGTH, "clipa", 2)
    assert (folder / texts["vocabulary"]).read_text().startswith("[PAD]\n[UNK]\n[CLS]\nred\n")
    for tower, embeddings in zip(("image_tower", "text_tower"), expected, strict=True):
        for rows in (1, 3):
            served = np.load(folder / f"{tower}{rows}.npy")
            np.testing.assert_allclose(served, embeddings[:rows], atol=2e-6)


def test_towers_in_bfloat16_are_compared_in_bfloat16(exported):
    half = {"dtype": "bfloat16"}
    _, _, found = exported("stablehlo", half, half)
    assert found["passed"] and found["computed_in"] == ["bfloat16", "bfloat16"]
    _, _, found = exported("clipa", half, half, folder="another")
    assert found["passed"] and found["computed_in"] == ["float32", "float32"]


@pytest.mark.parametrize("export_format", ["open_clip", "clipa", "stablehlo"])
def test_without_a_probe_what_was_written_is_read_back(exported, monkeypatch, export_format):
    _, folder, found = exported(export_format, probe_rows=0)
    assert found["passed"] and found["probe"] is None and found["differing_arrays"] == []
    original = exporting.array_writers.open_writer

    @contextlib.contextmanager
    def damaging(path, stated):
        with original(path, stated) as writer:
            write = writer.write
            writer.write = lambda name, array: write(name, array + np.float32("scale" in name))
            yield writer

    monkeypatch.setattr(exporting.array_writers, "open_writer", damaging)
    with pytest.raises(
        UserError, match="arrays; read back, .* are not as they were written: .*scale"
    ):
        exported(export_format, probe_rows=0)
    assert json.loads((folder / parity.FILE).read_text())["passed"] is False


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float32("nan"), "logit_scale of .* holds 1 numbers of 1 that are NaN"),
        (np.int32(3), "logit_scale of .* is of int32"),
    ],
)
@pytest.mark.parametrize("export_format", ["open_clip", "clipa", "stablehlo"])
def test_what_no_model_can_have_is_not_exported(
    tmp_path, tiny_model, export_format, value, message
):
    model = tiny_model()
    weights = {**trap_weights.make(model, PIXELS, LENGTH), "logit_scale": np.asarray(value)}
    safetensors.numpy.save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=message):
        export.export(
            **run_arguments(tmp_path, model), checkpoint=str(tmp_path / "w.safetensors"),
            output_dir=str(tmp_path / "out"), export_format=export_format, probe_rows=0,
        )  # fmt: skip
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_is_none_or_another_export_s_is_refused(exported, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/within"):
        with pytest.raises(UserError, match="--output_dir .*file.* cannot be made"):
            exported("clipa", folder=folder)
    exported("clipa")
    exported("clipa")
    with pytest.raises(UserError, match="parity.json of weights in another layout, clipa: name"):
        exported("stablehlo")


def test_a_run_s_checkpoint_is_read_parameter_by_parameter(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    state = saved_runs.filled(trainer)
    arguments = run_arguments(tmp_path, trainer.model)
    checkpointer = checkpoints.Checkpointer(
        arguments["model_dir"], checkpoints.SaveCheckpointConfig()
    )
    checkpointer.save(6, state, saved_runs.DATA)
    checkpointer.close()
    read = []
    monkeypatch.setattr(
        export.stage_handover.Checkpoint, "read",
        functools.partialmethod(_noted, read, export.stage_handover.Checkpoint.read),
    )  # fmt: skip
    found = export.export(
        **arguments, output_dir=str(tmp_path / "out"), export_format="clipa", probe_rows=0
    )
    assert found["passed"] is None and found["source"].endswith("checkpoint_6")
    params = checkpoints.flatten(state.params)
    assert sorted(read) == sorted(params)  # each once
    with parameter_files.open_parameters(str(tmp_path / "out/model.npz"), params) as file:
        for name, array in params.items():
            np.testing.assert_array_equal(file.saved[name].read(), array, err_msg=name)


def _noted(checkpoint, read, original, name):
    read.append(name)
    return original(checkpoint, name)


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        ({"pooling": "map"}, {}, "VisionTransformer.pooling is 'map'"),
        ({}, {"pooling": "gap"}, "TextTransformer.pooling is 'gap'"),
        ({}, {"mask_padding": True}, "TextTransformer.mask_padding is True"),
        ({"activation": "gelu_quick"}, {}, "quick_gelu is for both towers"),
    ],
)
def test_what_open_clip_has_not_is_named(exported, image, text, message):
    with pytest.raises(UserError, match=message):
        exported("open_clip", image, text)


def test_a_vocabulary_that_the_table_has_no_rows_for_is_not_exported(exported):
    few = {"vocab_size": 14}
    with pytest.raises(UserError, match="has 15 pieces and TextTransformer.vocab_size is 14"):
        exported("open_clip", text=few)
    # What can be used without one says that it has none.
    _, folder, _ = exported("stablehlo", text=few, folder="another")
    texts = json.loads((folder / "signature.json").read_text())["preprocessing"]["texts"]
    assert texts["vocabulary"] is None and not (folder / "vocab.txt").exists()


def test_embeddings_that_differ_fail_the_command(exported, monkeypatch):
    with pytest.raises(UserError, match="is not what it comes from.*beyond 0"):
        _tampered(monkeypatch)
        exported("clipa", tolerance=0.0)


def _tampered(monkeypatch):
    original = parity.embed
    calls = []

    def embed(*args):
        calls.append(None)
        found = original(*args)
        return found if len(calls) == 1 else parity.Embeddings(found.images + 1e-3, found.texts)

    monkeypatch.setattr(parity, "embed", embed)


def test_a_checkpoint_of_another_model_is_refused(exported, tmp_path, tiny_model):
    other = tiny_model(text={"mlp_dim": 48})
    trap_weights.save(tmp_path / "other.safetensors", other, PIXELS, LENGTH)
    with pytest.raises(UserError, match="mlp/fc1/bias is .*48"):
        export.export(
            **run_arguments(tmp_path, tiny_model()),
            output_dir=str(tmp_path / "out"),
            checkpoint=str(tmp_path / "other.safetensors"),
        )
    assert not (tmp_path / "out").exists()


def test_the_command_wants_a_folder(capsys):
    with pytest.raises(SystemExit) as exit_:
        main.run("export", ["--gin_file=gin/digits_stage1.gin", "--gin.MODEL_DIR='x'"])
    assert exit_.value.code == 2
    assert "export needs --output_dir=DIR" in capsys.readouterr().err
