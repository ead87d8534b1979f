import dataclasses
import json

import pytest
from flax import linen

from clipa_t5x import checkpoints, flops, stage_info
from clipa_t5x.data import input_pipeline


@pytest.fixture
def info():
    return stage_info.StageInfo(
        "VisionTransformer", 10, 84, 14, 36, 36, 8, 64, 100, "1 x cpu", None
    )


def test_a_run_is_completed_when_it_says_so(info, tmp_path):
    assert not stage_info.is_completed(str(tmp_path))
    info.write(str(tmp_path), completed=False)
    assert not stage_info.is_completed(str(tmp_path))
    info.write(str(tmp_path), completed=True)
    assert stage_info.is_completed(str(tmp_path))
    record = json.loads((tmp_path / "stage.json").read_text())
    assert record == {**dataclasses.asdict(info), "completed": True}


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"completed": "yes"}'])
def test_what_cannot_be_read_is_not_completed(text, tmp_path):
    (tmp_path / "stage.json").write_text(text)
    assert not stage_info.is_completed(str(tmp_path))


def test_a_stage_is_named_by_its_tokens(info):
    assert info.resolution == "84 px / 8 tokens"


@pytest.mark.parametrize("image", [{}, {"mask_ratio": 0.75}])
def test_flops_are_those_of_kept_tokens(tiny_model, image):
    model = tiny_model(image=image)
    info = collect(model)
    assert info.train_flops_per_example == flops.forward_flops(model, 32, 8).training
    whole = flops.forward_flops(model, 32, 8, train=False).training
    assert (info.train_flops_per_example < whole) == bool(image)


def test_towers_of_other_kinds_tell_no_flops(tiny_model):
    model = tiny_model()
    assert collect(model.clone(text_tower=Other())).train_flops_per_example is None


class Other(linen.Module):
    pass


def collect(model):
    cfg = input_pipeline.DatasetConfig(
        "none", task_feature_lengths={"images": 32, "text": 8}, split="train", batch_size=4
    )
    return stage_info.StageInfo.collect(model, {}, cfg, checkpoints.CheckpointConfig(), 10)
