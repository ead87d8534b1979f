"""CLIPA's files and folders, read as a model's parameters."""

import clipa_files
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from clipa_t5x import checkpoints, models, stage_handover
from clipa_t5x.errors import UserError
from clipa_t5x.towers import layers, position_embeddings
from clipa_t5x.weights import layouts, parameter_files

RESIZED = checkpoints.RestoreCheckpointConfig().resized


@pytest.fixture(scope="module")
def make(make_trainer):
    """Returns a function that makes a trainer of a model of `clipa_files`' sizes."""

    def trainer(scan=True, image=None, text=None, **kwargs):
        sizes = {"out_dim": clipa_files.OUT_DIM, "scan_layers": scan}
        images = {**sizes, **clipa_files.IMAGE, "patch_size": clipa_files.PATCH, **(image or {})}
        texts = {**sizes, **clipa_files.TEXT, "vocab_size": clipa_files.VOCABULARY, **(text or {})}
        settings = {"length": clipa_files.LENGTH, "pixels": clipa_files.PIXELS, "devices": 1}
        settings = {"image": images, "text": texts, **settings, **kwargs}
        if str(settings) not in made:
            made[str(settings)] = make_trainer(**settings)
        return made[str(settings)]

    made = {}
    return trainer


@pytest.fixture(scope="module")
def clipa():
    return clipa_files.arrays()


def load(path, trainer, resized=(), model=None):
    return stage_handover.load_params(str(path), trainer.abstract_state.params, resized, model)


def refused(path, trainer, *words, **kwargs):
    with pytest.raises(UserError) as caught:
        load(path, trainer, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for each in words:
        assert each in message, message
    return message


def embeddings(trainer, params, images, text):
    """Of float images, in full precision."""
    with jax.default_matmul_precision("highest"):
        return [
            np.asarray(trainer.model.apply({"params": params}, x, method=method))
            for method, x in (
                (models.ClipModel.embed_images, images),
                (models.ClipModel.embed_text, text),
            )
        ]


def inputs(pixels=clipa_files.PIXELS, length=clipa_files.LENGTH):
    rng = np.random.default_rng(5)
    images = rng.normal(size=(3, pixels, pixels, 3)).astype(np.float32)
    return images, rng.integers(0, clipa_files.VOCABULARY, (3, length)).astype(np.int32)


@pytest.mark.parametrize("pooling, learned, scan", [("gap", None, True), ("tok", 4, False)])
def test_embeddings_are_those_of_clipas_formulas(tmp_path, make, pooling, learned, scan):
    found = clipa_files.arrays(1, learned_grid=learned)
    np.savez(tmp_path / "w.npz", **{f"params/{k}": v for k, v in found.items()})
    options = {"pooling": pooling, "position_embedding": "learned" if learned else "sincos2d"}
    trainer = make(scan, image=options)
    params = load(tmp_path / "w.npz", trainer).params
    images, text = inputs()
    expected = clipa_files.embed(found, images, text, pooling=pooling)
    for ours, theirs in zip(embeddings(trainer, params, images, text), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert np.abs(ours - ours[:1]).max() > 1e-2
    assert float(params["logit_scale"]) == 2.5


def as_npz(arrays, folder):
    np.savez(folder / "w.npz", **arrays)
    return folder / "w.npz"


def as_safetensors(arrays, folder):
    safetensors.numpy.save_file(arrays, folder / "w.bin")
    return folder / "w.bin"


def with_optimizer(arrays):
    """As a whole training checkpoint: moments, counts, timers."""
    moments = {f"opt/1/0/1/{name}": np.zeros_like(array) for name, array in arrays.items()}
    rest = {"opt/1/0/0": np.int32(5), "chrono/accum_examples_seen": np.float64(3)}
    return {**{f"params/{k}": v for k, v in arrays.items()}, **moments, **rest}


@pytest.mark.parametrize(
    "form, writer, tree",
    [
        (lambda a: a, as_npz, ""),
        (with_optimizer, as_npz, ""),
        (lambda a: {f"opt/target/{k}": v for k, v in a.items()}, as_npz, ""),
        (clipa_files.heads_joined, as_npz, ""),
        (lambda a: {f"ema/of/{k}": v for k, v in a.items()} | {"x": np.ones(2)}, as_npz, ":ema/of"),
        (with_optimizer, as_npz, ":params"),
        (lambda a: a, as_safetensors, ""),
    ],
)
def test_every_form_gives_the_same_parameters(tmp_path, make, clipa, form, writer, tree):
    trainer = make()
    np.savez(tmp_path / "plain.npz", **clipa)
    plain = load(tmp_path / "plain.npz", trainer).params
    loaded = load(f"{writer(form(clipa), tmp_path)}{tree}", trainer)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, plain)
    file = loaded.file
    assert (file.layout, file.num_arrays, loaded.step) == ("CLIPA's", len(clipa), 0)
    expected = len(clipa) + 2 if form is with_optimizer and not tree else 0
    assert len(file.ignored) == expected


@pytest.mark.parametrize("joined", [False, True])
def test_a_folder_of_the_partitioned_trainer(tmp_path, make, clipa, joined):
    trainer = make(devices=8)
    np.savez(tmp_path / "plain.npz", **clipa)
    found = clipa_files.heads_joined(clipa) if joined else clipa
    folder = tmp_path / "checkpoint_7"
    folder.mkdir()
    loaded = load(clipa_files.write_t5x(folder, found), trainer)
    jax.tree.map(
        np.testing.assert_array_equal, loaded.params, load(tmp_path / "plain.npz", trainer).params
    )
    assert loaded.file.layout == "CLIPA's"


def test_halves_of_numbers_that_numpy_writes_without_a_name(tmp_path, make, clipa):
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in clipa.items()}
    np.savez(tmp_path / "w.npz", **halves)
    params = load(tmp_path / "w.npz", make()).params
    kernel = params["image_tower"]["head"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, halves["img/head/kernel"].astype(np.float32))


@pytest.mark.parametrize("partitions", [1, 4])
def test_scanned_layers_are_stacked_onto_every_mesh(tmp_path, make, clipa, partitions):
    np.savez(tmp_path / "w.npz", **clipa)
    sizes = {"num_heads": 4, "width": 16, "mlp_dim": 32}
    image = {**clipa_files.IMAGE, **sizes}
    text = {**clipa_files.TEXT, **sizes}
    found = clipa_files.arrays(image=image, text=text)
    np.savez(tmp_path / "w.npz", **found)
    trainer = make(image=image, text=text, devices=8, partitions=partitions)
    params = load(tmp_path / "w.npz", trainer).params
    key = params["text_tower"]["encoder"]["layers"]["attention"]["key"]["kernel"]
    assert not key.is_fully_replicated
    for i in range(3):
        name = f"txt/Transformer/encoderblock_{i}/MultiHeadDotProductAttention_0/key/kernel"
        np.testing.assert_array_equal(key[i], found[name])
    for x, wanted in zip(
        jax.tree.leaves(params), jax.tree.leaves(trainer.abstract_state.params), strict=True
    ):
        assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)


def test_one_parameter_is_read_at_a_time(tmp_path, make, clipa):
    np.savez(tmp_path / "w.npz", **clipa)
    wanted = checkpoints.flatten(make().abstract_state.params)
    with parameter_files.open_parameters(str(tmp_path / "w.npz"), wanted) as file:
        stacked = file.saved["image_tower/encoder/layers/mlp/fc1/kernel"]
        assert stacked.shape == (2, 24, 40)
        read = stacked.read()
    for i in range(2):
        name = f"img/Transformer/encoderblock_{i}/MlpBlock_0/Dense_0/kernel"
        np.testing.assert_array_equal(read[i], clipa[name])


@pytest.mark.parametrize("scan", [True, False])
def test_own_layers_are_stacked_where_that_is_wanted(tmp_path, make, random_params, scan):
    unrolled = make(False)
    images, text = inputs()
    params = random_params(unrolled.model, {"images": images, "text": text})
    np.savez(tmp_path / "w.npz", **checkpoints.flatten(params))
    loaded = load(tmp_path / "w.npz", make(scan)).params
    if scan:
        for tower, sizes in (("image_tower", clipa_files.IMAGE), ("text_tower", clipa_files.TEXT)):
            encoder = params[tower]["encoder"]
            params[tower]["encoder"] = layers.stack_layers(encoder, sizes["depth"])
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_own_stacks_are_not_taken_apart(tmp_path, make, random_params):
    images, text = inputs()
    params = random_params(make(True).model, {"images": images, "text": text})
    np.savez(tmp_path / "w.npz", **checkpoints.flatten(params))
    refused(tmp_path / "w.npz", make(False), "scan_layers is True there and False here")


def test_position_tables_are_resized_only_where_that_is_said(tmp_path, make, clipa):
    np.savez(tmp_path / "w.npz", **clipa)
    longer = make(length=12)
    refused(
        tmp_path / "w.npz", longer,
        "TASK_FEATURE_LENGTHS['text'] is 8 there and 12 here", "(8, 16) there and (12, 16) here",
    )  # fmt: skip
    loaded = load(tmp_path / "w.npz", longer, RESIZED)
    assert loaded.notes == ["text_tower/position_embedding: 8 -> 12 positions"]
    old = clipa["txt/pos_embedding"][0]
    np.testing.assert_allclose(
        loaded.params["text_tower"]["position_embedding"],
        stage_handover.resize_positions(old, 12), rtol=1e-5,
    )  # fmt: skip
    # A fixed table is as long as need be.
    assert load(tmp_path / "w.npz", make(pixels=24)).notes == []
    learned = clipa_files.arrays(learned_grid=4)
    np.savez(tmp_path / "learned.npz", **learned)
    larger = make(image={"position_embedding": "learned"}, pixels=24)
    refused(tmp_path / "learned.npz", larger, "(17, 24) there and (37, 24) here")
    notes = load(tmp_path / "learned.npz", larger, RESIZED).notes
    assert notes == ["image_tower/position_embedding: 17 -> 37 positions"]


@pytest.mark.parametrize("change", [0.0, 1e-3])
def test_a_stored_table_must_be_the_fixed_one(tmp_path, make, change):
    found = clipa_files.arrays(learned_grid=4)
    table = position_embeddings.sincos_2d(4, 4, 24)[None].astype(np.float32)
    table[0, 3, 1] += change
    found["img/pos_embedding"] = table
    np.savez(tmp_path / "w.npz", **found)
    if change:
        refused(
            tmp_path / "w.npz", make(), "17 rows",
            "--gin.VisionTransformer.position_embedding=\"'learned'\"",
        )  # fmt: skip
    else:
        assert load(tmp_path / "w.npz", make()).notes == []


@pytest.mark.parametrize(
    "tower, change, words",
    [
        ("image", {"width": 48}, "VisionTransformer.width is 24 there and 48 here"),
        ("image", {"depth": 1}, "VisionTransformer.depth is 2 there and 1 here"),
        ("image", {"mlp_dim": 41}, "VisionTransformer.mlp_dim is 40 there and 41 here"),
        ("image", {"num_heads": 4}, "VisionTransformer.num_heads is 3 there and 4 here"),
        ("image", {"patch_size": 8}, "VisionTransformer.patch_size is 4 there and 8 here"),
        ("image", {"pre_norm": True}, "no place for image_tower/pre_norm"),
        ("image", {"pooling": "map"}, "VisionTransformer.pooling='map'"),
        (
            "image",
            {"position_embedding": "learned"},
            "VisionTransformer.position_embedding is fixed there and learned here",
        ),
        ("text", {"vocab_size": 64}, "TextTransformer.vocab_size is 52 there and 64 here"),
        ("text", {"mlp_dim": 20}, "TextTransformer.mlp_dim is 28 there and 20 here"),
        ("text", {"out_dim": 11}, "TextTransformer.out_dim is 10 there and 11 here"),
        (
            "text",
            {"position_embedding": "sincos1d"},
            "--gin.TextTransformer.position_embedding=\"'learned'\"",
        ),
    ],
)
def test_a_file_of_another_model_names_the_option(tmp_path, make, clipa, tower, change, words):
    np.savez(tmp_path / "w.npz", **clipa)
    refused(tmp_path / "w.npz", make(**{tower: change}), str(tmp_path / "w.npz"), words)


def test_names_that_differ_come_with_the_nearest(tmp_path, make, clipa):
    renamed = {k.replace("encoder_norm/scale", "encoder_norm/gamma"): v for k, v in clipa.items()}
    np.savez(tmp_path / "w.npz", **renamed)
    refused(
        tmp_path / "w.npz", make(), "4 parameters differ",
        "img/encoder_norm/scale is missing there (nearest: img/encoder_norm/gamma)",
        "txt/encoder_norm/gamma is unknown here (nearest: txt/encoder_norm/scale)",
    )  # fmt: skip


def test_another_file_s_numbers_are_refused_by_our_names(tmp_path, make, clipa):
    bad = {**clipa, "img/head/kernel": np.full_like(clipa["img/head/kernel"], np.nan)}
    np.savez(tmp_path / "w.npz", **bad)
    refused(tmp_path / "w.npz", make(), "image_tower/head/kernel", "NaN")


def open_clip_arrays(make, custom_text=False):
    """Random state dict of the sizes of `clipa_files`, in OpenCLIP's layout."""
    shapes = layouts.unstacked(
        {k: v.shape for k, v in checkpoints.flatten(make().abstract_state.params).items()}
    )
    shapes[layouts.IMAGE_POSITIONS] = (17, 24)
    rng = np.random.default_rng(3)
    found = {
        tensor.name: rng.normal(size=tensor.shapes[0]).astype(np.float32)
        for tensor in layouts.open_clip(shapes)
    }
    found["visual.positional_embedding"] = position_embeddings.sincos_2d(4, 4, 24)
    if custom_text:
        found = {
            k if k.startswith(("visual.", "logit")) else f"text.{k}": v for k, v in found.items()
        }
    return found


@pytest.mark.parametrize("custom_text", [False, True])
def test_both_classes_of_open_clip(tmp_path, make, custom_text):
    found = open_clip_arrays(make, custom_text)
    mask = {"text.attn_mask" if custom_text else "attn_mask": np.zeros((8, 8), np.float32)}
    safetensors.numpy.save_file({**found, **mask}, tmp_path / "open_clip_model.safetensors")
    loaded = load(tmp_path, make())
    assert loaded.file.layout == "OpenCLIP's"
    assert loaded.file.ignored == ["attn_mask"]
    prefix = "text." if custom_text else ""
    np.testing.assert_array_equal(
        loaded.params["text_tower"]["head"]["kernel"], found[f"{prefix}text_projection"]
    )
    fused = found["visual.transformer.resblocks.1.attn.in_proj_weight"]
    value = loaded.params["image_tower"]["encoder"]["layers"]["attention"]["value"]["kernel"][1]
    np.testing.assert_array_equal(np.asarray(value).reshape(24, 24).T, fused[48:])


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda a: a | {"visual.ln_pre.weight": np.ones(24, "f")},
            "VisionTransformer.pre_norm is True there and False here",
        ),
        (
            lambda a: {k: v for k, v in a.items() if k != "visual.positional_embedding"},
            "visual.positional_embedding is missing there",
        ),
        (lambda a: a | {"logit_bias": np.ones((), "f")}, "INIT_LOGIT_BIAS is set there and None"),
        (lambda a: {"visual.trunk.x": np.ones(2, "f")}, "is a timm model"),
        (lambda a: a | {"visual.layer1.0.x": np.ones(2, "f")}, "is a ResNet"),
    ],
)
def test_open_clip_s_files_of_another_model(tmp_path, make, change, words):
    found = change(open_clip_arrays(make))
    safetensors.numpy.save_file(found, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", make(), words)


def test_a_configuration_beside_the_weights_is_compared_with_the_model(tmp_path, make):
    safetensors.numpy.save_file(open_clip_arrays(make), tmp_path / "open_clip_model.safetensors")
    trainer = make()
    vision = {
        **{"image_size": 16, "layers": 2, "width": 24, "head_width": 8, "mlp_ratio": 1.6667},
        **{"patch_size": 4, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    }
    text = {
        **{"context_length": 8, "vocab_size": 52, "width": 16, "heads": 2, "layers": 3},
        **{"mlp_ratio": 1.75, "pool_type": "last", "no_causal_mask": True},
    }
    config = tmp_path / "open_clip_config.json"
    clipa_files.write_config(config, embed_dim=10, vision_cfg=vision, text_cfg=text)
    loaded = load(tmp_path, trainer, model=trainer.model)
    assert len(loaded.file.warnings) == 4  # GELU and epsilon, which OpenCLIP has others of
    clipa_files.write_config(
        config, embed_dim=10, vision_cfg=vision, text_cfg=text, quick_gelu=True
    )
    for path in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        refused(
            path, trainer, "VisionTransformer.activation is 'gelu_quick' there and 'gelu_tanh'",
            model=trainer.model,
        )  # fmt: skip


@pytest.mark.parametrize("layout", ["clipa", "open_clip"])
def test_there_and_back_is_every_byte(tmp_path, make, clipa, layout):
    """File -> parameters here, scanned -> that layout's arrays."""
    found = clipa if layout == "clipa" else open_clip_arrays(make)
    path = (as_npz if layout == "clipa" else as_safetensors)(found, tmp_path)
    params = checkpoints.flatten(jax.device_get(load(path, make(devices=8)).params))
    ours = {
        each: array
        for name, stack in params.items()
        for each, array in (
            zip(layouts.layer_names(name, len(stack)), stack, strict=True)
            if layouts.is_stacked(name)
            else [(name, stack)]
        )
    }
    if layout == "open_clip":
        ours[layouts.IMAGE_POSITIONS] = position_embeddings.sincos_2d(4, 4, 24)
    shapes = {name: array.shape for name, array in ours.items()}
    back = {
        tensor.name: tensor.join([np.asarray(ours[part]) for part in tensor.parts])
        for tensor in getattr(layouts, layout)(shapes)
    }
    assert back.keys() == found.keys()
    for name, array in found.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes(), name
