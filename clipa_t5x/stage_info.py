"""The facts of a run that its report tells: `stage.json` in MODEL_DIR."""

import dataclasses
import json
from typing import Any

import jax
from etils import epath

from clipa_t5x import checkpoints, errors, flops, model_info, models, run_history
from clipa_t5x.data import input_pipeline
from clipa_t5x.towers import token_reduction


@dataclasses.dataclass
class StageInfo:
    """What a report says about a stage; `stage.json` in MODEL_DIR."""

    model: str
    num_params: int
    image_size: int
    patch_size: int | None
    num_image_tokens: int | None
    num_image_tokens_kept: int | None
    text_length: int
    batch_size: int
    total_steps: int
    devices: str
    initial_checkpoint: str | None
    train_flops_per_example: int | None = None

    @property
    def resolution(self) -> str:
        """How console lines name the stage, as in '84 px / 8 tokens'."""
        return f"{self.image_size} px / {self.text_length} tokens"

    @classmethod
    def collect(
        cls,
        model: models.ClipModel,
        abstract_params: Any,
        dataset_cfg: input_pipeline.DatasetConfig,
        checkpoint_cfg: checkpoints.CheckpointConfig,
        total_steps: int,
    ) -> "StageInfo":
        """Gathers them from the run's parts; towers of other kinds leave out what they lack."""
        size = dataset_cfg.task_feature_lengths["images"]
        patch_size = getattr(model.image_tower, "patch_size", None)
        tokens = kept = None
        if patch_size:
            grid = (size // patch_size, size // patch_size)
            ratio = getattr(model.image_tower, "mask_ratio", 0.0)
            strategy = getattr(model.image_tower, "mask_strategy", "random")
            tokens = grid[0] * grid[1]
            kept = token_reduction.num_kept(grid, ratio, strategy)
        device = jax.devices()[0]
        return cls(
            model=type(model.image_tower).__name__,
            num_params=model_info.num_params(abstract_params),
            image_size=size,
            patch_size=patch_size,
            num_image_tokens=tokens,
            num_image_tokens_kept=kept,
            text_length=dataset_cfg.task_feature_lengths["text"],
            batch_size=dataset_cfg.batch_size,
            total_steps=total_steps,
            devices=f"{jax.device_count()} x {device.device_kind}",
            initial_checkpoint=checkpoint_cfg.restore.path,
            train_flops_per_example=_train_flops(
                model, size, dataset_cfg.task_feature_lengths["text"]
            ),
        )

    def write(self, model_dir: str, completed: bool) -> None:
        """Writes `stage.json`; process 0 only."""
        if jax.process_index() == 0:
            record = {**dataclasses.asdict(self), "completed": completed}
            (epath.Path(model_dir) / "stage.json").write_text(json.dumps(record, indent=2) + "\n")


def _train_flops(model: models.ClipModel, pixels: int, text_length: int) -> int | None:
    """Of one example, for the tokens that masking keeps; None for towers of other kinds."""
    try:
        return flops.forward_flops(model, pixels, text_length).training
    except errors.UserError:
        return None


def is_completed(model_dir: str) -> bool:
    """Whether a run has been trained to its end, its evaluation included."""
    return _read(model_dir).get("completed") is True


def initial_checkpoint(model_dir: str) -> str | None:
    """Where a run took its first parameters from; None where from nowhere, or it is not said."""
    path = _read(model_dir).get("initial_checkpoint")
    return path if isinstance(path, str) else None


def _read(model_dir: str) -> dict[str, Any]:
    path = epath.Path(model_dir) / run_history.STAGE_FILE
    try:
        record = json.loads(path.read_text()) if path.exists() else {}
    except (ValueError, RecursionError):  # Torn by a kill, and not worth an error.
        return {}
    return record if isinstance(record, dict) else {}
