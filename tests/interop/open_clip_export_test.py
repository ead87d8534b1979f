"""Exported folders, loaded by the real OpenCLIP as its users do: the embeddings are ours."""

import numpy as np
import pytest
import tiny_records
import trap_weights

from clipa_t5x import export, models
from clipa_t5x.data import preprocessors, vocabularies, wordpiece
from clipa_t5x.towers import text_transformer, vision_transformer

LENGTH = 12
# (width, heads, MLP) of image and text tower, patch size, joint size; as published, but for depth.
PUBLISHED = {
    "L": ((1024, 16, 4096), (768, 12, 3072), 14, 768),
    "H": ((1280, 16, 5120), (1024, 16, 4096), 14, 1024),
    "bigG": ((1664, 16, 8192), (1280, 20, 5120), 14, 1280),
}
OPENAI = (
    {"pre_norm": True, "pooling": "tok", "position_embedding": "learned"},
    {"causal": True, "pooling": "argmax"},
    {"activation": "gelu_quick", "layer_norm_epsilon": 1e-5},
)


def clip(name, image=None, text=None, both=None):
    sizes = PUBLISHED[name]
    towers = [
        dict(width=width, num_heads=heads, mlp_dim=mlp_dim, depth=2, out_dim=sizes[3],
             **(both or {}))
        for width, heads, mlp_dim in sizes[:2]
    ]  # fmt: skip
    return models.ClipModel(
        vision_transformer.VisionTransformer(**towers[0], patch_size=sizes[2], **(image or {})),
        text_transformer.TextTransformer(**towers[1], vocab_size=300, **(text or {})),
    )


@pytest.fixture
def exported(tmp_path, open_clip):
    """Returns a function that exports trap weights: (folder, certificate)."""

    def run(model):
        size = 2 * model.image_tower.patch_size
        path = tmp_path / "vocab.txt"
        words = [tiny_records.caption(i) for i in range(8)]
        wordpiece.write_vocabulary(path, wordpiece.build_vocabulary(words))
        name = tiny_records.task(
            "interop", tmp_path, preprocessors.squash,
            vocabulary=vocabularies.BertVocabulary(str(path)),
        )  # fmt: skip
        lengths = {"images": size, "text": LENGTH}
        cfg = tiny_records.config(name, task_feature_lengths=lengths)
        trap_weights.save(tmp_path / "w.safetensors", model, size, LENGTH)
        folder = str(tmp_path / "exported")
        return folder, export.export(
            model=model, train_dataset_cfg=cfg, train_eval_dataset_cfg=cfg, model_dir="",
            checkpoint=str(tmp_path / "w.safetensors"), output_dir=folder, verify=True,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("name", [*PUBLISHED, "L openai"])
def test_open_clip_s_embeddings_are_ours(exported, open_clip, name):
    size, _, kind = name.partition(" ")
    folder, found = exported(clip(size, *(OPENAI if kind else ())))
    assert found["compared_with"] == f"open_clip {open_clip.__version__}"
    for side in ("image_embeddings", "text_embeddings"):
        print(name, side, found[side])
        assert found[side]["max_abs_difference"] <= 1e-5
        assert found[side]["min_cosine"] >= 0.99999
    model = open_clip.create_model(f"local-dir:{folder}")
    assert found["parameters"].keys() == model.state_dict().keys()
    assert found["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert float(model.logit_scale) == 3.0


def test_preprocessing_and_tokens_are_ours(exported, open_clip):
    folder, _ = exported(clip("L"))
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    steps = [type(step).__name__ for step in preprocess.transforms]
    assert "CenterCrop" not in steps and tuple(preprocess.transforms[0].size) == (28, 28)
    assert preprocess.transforms[0].interpolation.value == "bilinear"
    assert tuple(preprocess.transforms[-1].mean) == (0.485, 0.456, 0.406)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    texts = [tiny_records.caption(i) for i in range(5)]
    vocabulary = vocabularies.BertVocabulary(f"{folder}/vocab.txt")
    own = preprocessors.tokenize(np.array(texts), vocabulary, LENGTH).numpy()
    np.testing.assert_array_equal(tokenizer(texts).numpy(), own)
