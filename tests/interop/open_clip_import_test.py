"""OpenCLIP's models, imported: the embeddings are its own."""

import copy
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn

from clipa_t5x import checkpoints, models, stage_handover
from clipa_t5x.errors import UserError
from clipa_t5x.towers import position_embeddings, text_transformer, vision_transformer
from clipa_t5x.weights import layouts, open_clip_options, open_clip_peer, parity

TOLERANCE, MIN_COSINE = 1e-5, 0.99999
# What a wrong convention moves these embeddings by, at least.
MOVED = 30 * TOLERANCE
VOCABULARY, LENGTH, GRID, BATCH = 300, 12, 2, 3
EXACT = {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}
# What a small model of OpenAI's kind says, beyond the defaults.
OPENAI = {
    "embed_dim": 96,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 192, "patch_size": 32},
    "text_cfg": {
        **{"context_length": LENGTH, "vocab_size": VOCABULARY},
        **{"width": 128, "heads": 2, "layers": 3},
    },
}


def configuration(open_clip, name):
    """A published configuration at its width, heads and MLP, with few layers, words and pixels."""
    if name == "openai":
        return copy.deepcopy(OPENAI)
    name, _, numerics = name.partition(" ")
    config = open_clip.get_model_config(name)
    config["vision_cfg"].update(layers=2, image_size=GRID * config["vision_cfg"]["patch_size"])
    config["text_cfg"].update(layers=2, context_length=LENGTH, vocab_size=VOCABULARY)
    if numerics:  # CLIPA's own, which OpenCLIP's files do not say.
        config["vision_cfg"].update(EXACT)
        config["text_cfg"].update(EXACT)
    return config


def trap_weights(model, seed=0):
    """Random weights under which no two conventions give the same embeddings."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        values = np.asarray(rng.standard_normal(shape, np.float32))
        if name == "logit_scale":
            return np.full(shape, 2.3, np.float32)
        if "embedding" in name:
            return 0.01 * values  # So small that epsilon is seen.
        if name.endswith("c_fc.bias"):
            return 0.2 * values - 2.3  # Where kinds of GELU differ by a few per cent of it ...
        if len(shape) < 2:
            is_scale = "ln_" in name and name.endswith("weight")
            return 1 + 0.3 * values if is_scale else 0.2 * values
        fan_in = shape[0] if name.endswith(("proj", "projection")) else np.prod(shape[1:])
        factors = {"conv1": 0.01, "c_fc": 0.5, "c_proj": 20.0}  # ... and count.
        factor = next((each for part, each in factors.items() if part in name), 1.0)
        return values * np.float32(factor * fan_in**-0.5)

    return {name: draw(name, tuple(x.shape)) for name, x in model.state_dict().items()}


def model_of(config, **towers):
    """Our model, of nothing but what the configuration says."""
    values = open_clip_options.options(config).values

    def options(owner):
        start = f"{owner}."
        return {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}

    return models.ClipModel(
        image_tower=vision_transformer.VisionTransformer(
            **{**options("VisionTransformer"), **towers.get("image", {})}
        ),
        text_tower=text_transformer.TextTransformer(
            **{**options("TextTransformer"), **towers.get("text", {})}
        ),
    )


def abstract_params(model, images, text):
    batch = {"images": images[:1], "text": text[:1]}
    shapes = jax.eval_shape(lambda b: models.init_params(model, jax.random.key(0), b), batch)
    sharding = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)), jax.sharding.PartitionSpec()
    )
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), nn.unbox(shapes)
    )


def ours(model, params, images, text):
    with jax.default_matmul_precision("highest"):
        return [
            np.asarray(jax.jit(lambda p, x, m=method: model.apply({"params": p}, x, method=m))(
                params, x
            ))
            for method, x in (
                (models.ClipModel.embed_images, images), (models.ClipModel.embed_text, text),
            )
        ]  # fmt: skip


def inputs(config):
    rng = np.random.default_rng(1)
    size = config["vision_cfg"]["image_size"]
    images = rng.standard_normal((BATCH, size, size, 3), np.float32)
    text = rng.integers(1, VOCABULARY - 1, (BATCH, LENGTH)).astype(np.int32)
    for row, end in enumerate((4, 7, LENGTH - 1)):
        text[row, end] = VOCABULARY - 1  # The end of text, where OpenAI's models pool.
        text[row, end + 1 :] = 0
    return images, text


class Case:
    """A model of OpenCLIP's with trap weights, its folder, and its own embeddings."""

    def __init__(self, open_clip, name, folder, custom_text=False):
        import torch

        self.config = configuration(open_clip, name)
        kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
        self.peer = kind(**self.config).eval()
        self.weights = trap_weights(self.peer)
        self.fixed = name != "openai"
        if self.fixed:
            width = self.config["vision_cfg"]["width"]
            table = position_embeddings.sincos_2d(GRID, GRID, width)
            self.weights["visual.positional_embedding"] = table
        self.peer.load_state_dict({k: torch.from_numpy(v) for k, v in self.weights.items()})
        self.images, self.text = inputs(self.config)
        with torch.no_grad():
            pixels = torch.from_numpy(self.images.transpose(0, 3, 1, 2).copy())
            ids = torch.from_numpy(self.text.astype(np.int64))
            self.embeddings = [
                self.peer.encode_image(pixels, normalize=True).numpy(),
                self.peer.encode_text(ids, normalize=True).numpy(),
            ]
        safetensors.numpy.save_file(self.weights, folder / "open_clip_model.safetensors")
        config = {"model_cfg": self.config, "preprocess_cfg": {}}
        (folder / open_clip_options.CONFIG_FILE).write_text(json.dumps(config))
        self.folder = str(folder)

    def model(self, **towers):
        table = "sincos2d" if self.fixed else "learned"
        image = {"position_embedding": table, **towers.pop("image", {})}
        return model_of(self.config, image=image, **towers)

    def load(self, model):
        wanted = abstract_params(model, self.images, self.text)
        return stage_handover.load_params(self.folder, wanted, model=model).params


@pytest.fixture
def case(open_clip, tmp_path):
    return lambda name, **kwargs: Case(open_clip, name, tmp_path, **kwargs)


CASES = [
    "ViT-L-14-CLIPA", "ViT-H-14-CLIPA", "ViT-bigG-14-CLIPA", "ViT-L-14-CLIPA tanh, 1e-6",
    "ViT-bigG-14-CLIPA tanh, 1e-6", "openai",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_embeddings_are_open_clips_own(case, name):
    subject = case(name, custom_text=name == "ViT-H-14-CLIPA")
    model = subject.model()
    params = subject.load(model)
    found = ours(model, params, subject.images, subject.text)
    for kind, here, there in zip(("image", "text"), found, subject.embeddings, strict=True):
        difference, cosine = np.abs(here - there).max(), (here * there).sum(axis=1).min()
        print(f"{name}, {kind}: max abs difference {difference:.2g}, min cosine {cosine:.7f}")
        assert difference <= TOLERANCE, (kind, difference)
        assert cosine >= MIN_COSINE, (kind, cosine)
        # And are no one point, which any weights would give.
        assert np.abs(here[0] - here[1]).max() > MOVED
    # Scanned parameters and back: every byte, and no name more or less than there.
    flat = checkpoints.flatten(jax.device_get(params))
    apart = {
        each: array
        for key, stack in flat.items()
        for each, array in (
            zip(layouts.layer_names(key, len(stack)), stack, strict=True)
            if layouts.is_stacked(key)
            else [(key, stack)]
        )
    }
    apart.setdefault(layouts.IMAGE_POSITIONS, subject.weights["visual.positional_embedding"])
    tensors = layouts.open_clip({key: np.shape(array) for key, array in apart.items()})
    wanted = {key.removeprefix("text."): array for key, array in subject.weights.items()}
    assert {tensor.name for tensor in tensors} == wanted.keys()
    for tensor in tensors:
        back = tensor.join([np.asarray(apart[part]) for part in tensor.parts])
        assert (back.shape, back.dtype) == (wanted[tensor.name].shape, np.float32)
        assert back.tobytes() == wanted[tensor.name].tobytes(), tensor.name


@pytest.mark.parametrize(
    "name, tower, option",
    [
        ("ViT-L-14-CLIPA", "image", {"activation": "gelu_tanh"}),
        ("ViT-L-14-CLIPA", "text", {"activation": "gelu_tanh"}),
        ("ViT-L-14-CLIPA", "text", {"layer_norm_epsilon": 1e-6}),
        ("ViT-L-14-CLIPA", "image", {"pooling": "tok"}),
        ("ViT-L-14-CLIPA", "text", {"pooling": "first"}),
        ("ViT-L-14-CLIPA", "text", {"causal": True}),
        ("ViT-L-14-CLIPA", "text", {"mask_padding": True}),
        ("openai", "image", {"activation": "gelu_exact"}),
        ("openai", "text", {"activation": "gelu_exact"}),
        ("openai", "text", {"causal": False}),
        ("openai", "text", {"pooling": "last"}),
        ("openai", "image", {"num_heads": 4}),
        ("openai", "image", {"layer_norm_epsilon": 1e-6}),
    ],
)
def test_the_comparison_feels_every_convention(case, name, tower, option):
    """Otherwise it would prove nothing."""
    subject = case(name)
    wrong = subject.model(**{tower: option})
    wanted = abstract_params(wrong, subject.images, subject.text)
    # Without the model, so that its configuration is not compared.
    params = stage_handover.load_params(subject.folder, wanted).params
    found = ours(wrong, params, subject.images, subject.text)
    index = 0 if tower == "image" else 1
    assert np.abs(found[index] - subject.embeddings[index]).max() > MOVED


def test_a_peer_is_built_with_what_its_configuration_does_not_say(case):
    """CLIPA's published ones say neither GELU nor epsilon."""
    subject = case("ViT-L-14-CLIPA")
    clipas = {"activation": "gelu_tanh", "layer_norm_epsilon": 1e-6}
    model = subject.model(image=clipas, text=clipas)
    params = subject.load(model)
    pixels = subject.config["vision_cfg"]["image_size"]
    batch = parity.probe(4, pixels, LENGTH, VOCABULARY)
    mean, std = ([x / 255 for x in each] for each in (model.image_mean, model.image_std))
    config = {"model_cfg": subject.config, "preprocess_cfg": {"mean": mean, "std": std}}
    said, _ = open_clip_options.completed(config, model)
    own = parity.embed(model, params, batch)
    for peer, bound in (
        (open_clip_peer.embed(subject.folder, batch, said), (0, TOLERANCE)),
        (open_clip_peer.embed(subject.folder, batch, config), (MOVED, np.inf)),
    ):
        for here, there in zip(own, peer, strict=True):
            assert bound[0] <= np.abs(here - there).max() <= bound[1]


def test_a_peer_that_cannot_embed_says_so_in_a_line(case):
    subject = case("ViT-L-14-CLIPA")
    batch = parity.probe(2, 2 * subject.config["vision_cfg"]["image_size"], LENGTH, VOCABULARY)
    with pytest.raises(UserError, match="makes no embeddings of .*RuntimeError") as caught:
        open_clip_peer.embed(subject.folder, batch)
    assert "\n" not in str(caught.value)
