"""Weights of other trainers, made into a checkpoint.

`python -m clipa_t5x.import_weights --source=... --gin_file=gin/H14_stage3.gin --gin.MODEL_DIR=...`
"""

import collections
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipa_t5x import (
    agreement,
    checkpoint_folders,
    checkpoints,
    model_info,
    models,
    optimizers,
    partitioning,
    stage_handover,
    train,
)
from clipa_t5x import trainer as trainer_lib
from clipa_t5x.data import input_pipeline
from clipa_t5x.errors import UserError
from clipa_t5x.weights import exporting, open_clip_peer, parity

# What a run that has read no data yet would say of its position in them.
_NO_DATA_YET = {"next_sample": 0}


def import_weights(
    *,
    source: str,
    model: models.ClipModel,
    optimizer: optimizers.Optimizer,
    partitioner: partitioning.PjitPartitioner,
    train_dataset_cfg: input_pipeline.DatasetConfig,
    checkpoint_cfg: checkpoints.CheckpointConfig,
    model_dir: str,
    random_seed: int,
    summarize_config_fn: Callable[..., None],
    trainer_cls: Callable[..., trainer_lib.Trainer] = trainer_lib.Trainer,
    verify: bool = False,
    tolerance: float = parity.TOLERANCE,
    **_: Any,
) -> str:
    """Writes `checkpoint_0` with given parameters and a fresh optimizer, and `config.gin`.

    Training with this configuration goes on from there, at step 0, with any data; evaluation and
    export take it as any other checkpoint.

    Args:
      source: CLIPA's, OpenCLIP's or this package's weights, see `stage_handover.load_params`.
      model: as for `train.train`.
      optimizer: as for `train.train`.
      partitioner: as for `train.train`.
      train_dataset_cfg: as for `train.train`; no data are read.
      checkpoint_cfg: as for `train.train`; says which position tables may be resized.
      model_dir: where the checkpoint goes; must hold none.
      random_seed: of the masks of a run that goes on from there.
      summarize_config_fn: as for `train.train`.
      trainer_cls: as for `train.train`.
      verify: whether embeddings that differ, see `parity.json` in `model_dir`, are an error.
      tolerance: see `parity.certificate`.
      **_: the other arguments of `train.train`, which are not used.

    Returns:
      What was taken from where, a few lines.

    Raises:
      UserError: `model_dir` has a checkpoint already, or the weights are damaged or of another
        model, and nothing is written then; or embeddings differ, and `verify` is set.
    """
    train.check_arguments(model_dir, checkpoint_cfg.save, random_seed)
    if steps := checkpoints.all_steps(model_dir):
        raise UserError(
            f"MODEL_DIR {model_dir} has a checkpoint already, of step {steps[-1]}: name another "
            "one for what is imported."
        )
    trainer = trainer_cls(
        model=model,
        optimizer=optimizer,
        partitioner=partitioner,
        batch_spec=train_dataset_cfg.batch_spec(),
    )
    loaded = stage_handover.load_params(
        source, trainer.abstract_state.params, checkpoint_cfg.restore.resized, model
    )
    lengths = train_dataset_cfg.task_feature_lengths
    batch = parity.probe(4, lengths["images"], lengths["text"], model.text_tower.vocab_size)
    before = _embed_source(source, loaded, model, batch)
    state = trainer.init_state(random_seed, loaded.params)
    summarize_config_fn(model_dir, None, 0)
    checkpointer = checkpoints.Checkpointer(model_dir, checkpoint_cfg.save)
    checkpointer.save(0, state, _NO_DATA_YET)
    checkpointer.close()
    num_params = model_info.num_params(trainer.abstract_state.params)
    compared, passed = _certify(source, model_dir, loaded, trainer, batch, before, tolerance)
    if verify and not passed:
        raise UserError(f"{model_dir} is not what it comes from: {compared}.")
    return f"{_summary(source, model_dir, loaded, num_params)}\n{compared}"


def _certify(
    source: str,
    model_dir: str,
    loaded: stage_handover.Loaded,
    trainer: trainer_lib.Trainer,
    batch: parity.Probe,
    before: tuple[parity.Embeddings, str],
    tolerance: float,
) -> tuple[str, bool]:
    """Reads the checkpoint again, compares, writes `parity.json`: (a line about it, passed).

    All processes embed, and gather parameter by parameter; the first one compares and writes.
    """
    again = stage_handover.load_params(model_dir, trainer.abstract_state.params).params
    after = parity.embed(trainer.model, again, batch)
    parameters = {}
    for name, array in checkpoints.flatten(again).items():
        values = _whole(array)
        if jax.process_index() == 0:
            parameters[name] = {**exporting.describe(values), "from": [name]}

    def write() -> str:
        found = parity.certificate(
            source=source,
            target=model_dir,
            layout=loaded.file.layout if loaded.file else "a checkpoint",
            parameters=parameters,
            batch=batch,
            compared_with=before[1],
            before=before[0],
            after=after,
            tolerance=tolerance,
        )
        return json.dumps([parity.write(model_dir, found), found["passed"]])

    line, passed = json.loads(agreement.same_for_all("import_certified", write))
    return line, passed


def _whole(array: jax.Array) -> np.ndarray:
    """A parameter of which this process may have a part only; called by all of them."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _embed_source(
    source: str, loaded: stage_handover.Loaded, model: models.ClipModel, batch: parity.Probe
) -> tuple[parity.Embeddings, str]:
    """(embeddings of what is imported, whose they are): OpenCLIP's where it can make them.

    It makes them on the first process, as `certificate` is made there; ours are made by all.
    """

    def peer() -> str:
        is_its = open_clip_peer.is_folder(source) and not loaded.notes  # Resized, it is another's.
        return (open_clip_peer.version() if is_its else None) or ""

    version = agreement.same_for_all("import_compared_with", peer)
    if version and jax.process_index() == 0:
        return open_clip_peer.embed(source, batch), version
    if version:
        return parity.Embeddings(*(np.empty((0, 0), np.float32) for _ in range(2))), version
    return parity.embed(model, loaded.params, batch), "this package, before the checkpoint"


def _summary(source: str, model_dir: str, loaded: stage_handover.Loaded, num_params: int) -> str:
    file = loaded.file
    layout = f"{file.layout} layout, {file.num_arrays} arrays" if file else "a checkpoint"
    lines = [f"{source}: {layout}, {num_params:,} parameters"]
    lines += [f"resized {note}" for note in loaded.notes]
    if file and file.ignored:
        lines.append(f"left out {_by_top(file.ignored)}")
    lines += [f"warning: {warning}" for warning in (file.warnings if file else ())]
    folder = checkpoint_folders.folder_of(model_dir, 0)
    lines.append(f"wrote {folder}; the optimizer, the step and the data begin anew")
    return "\n".join(lines)


def _by_top(names: Sequence[str]) -> str:
    """'12 arrays (opt: 10, chrono: 2)'."""
    tops = collections.Counter(name.partition("/")[0] for name in names).most_common(5)
    shown = ", ".join(f"{top}: {count}" for top, count in tops)
    return f"{len(names)} arrays ({shown})"


if __name__ == "__main__":
    from clipa_t5x import main

    main.run("import_weights")
