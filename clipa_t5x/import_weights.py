"""Weights of other trainers, made into a checkpoint.

`python -m clipa_t5x.import_weights --source=... --gin_file=gin/H14_stage3.gin --gin.MODEL_DIR=...`
"""

import collections
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging

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
from clipa_t5x.weights import (
    array_sources,
    exporting,
    open_clip_options,
    open_clip_peer,
    parameter_files,
    parity,
    text_vocabularies,
)

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
        model, and nothing is written then; or embeddings differ, and `verify` is set: then no
        checkpoint is left.
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
    warnings = text_vocabularies.check_import(
        source, model.text_tower.vocab_size, train_dataset_cfg
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
    summary = _summary(source, model_dir, loaded, num_params, warnings)
    passed, line = _certify(source, model_dir, loaded, trainer, batch, before, tolerance)
    if verify and not passed:
        if jax.process_index() == 0:
            checkpoint_folders.remove(checkpoint_folders.folder_of(model_dir, 0))
        for warning in loaded.file.warnings if loaded.file else ():
            logging.warning("%s", warning)  # They may be why.
        raise UserError(
            f"{source} is not imported, because its embeddings are others: {line} (--tolerance). "
            f"See {model_dir}/{parity.FILE}."
        )
    return f"{summary}\n{line}"


def _certify(
    source: str,
    model_dir: str,
    loaded: stage_handover.Loaded,
    trainer: trainer_lib.Trainer,
    batch: parity.Probe,
    before: tuple[parity.Embeddings, str],
    tolerance: float,
) -> tuple[bool, str]:
    """Reads the checkpoint again, compares, writes `parity.json`: (whether it passed, a line).

    All processes embed together; the first one compares and writes.
    """
    wanted = checkpoints.flatten(trainer.abstract_state.params)
    again = stage_handover.load_params(model_dir, trainer.abstract_state.params).params
    after = parity.embed(trainer.model, again, batch)

    def write() -> str:
        made_of = _sources(source, wanted)
        checkpoint = stage_handover.open_checkpoint(model_dir, 0)
        found = parity.certificate(
            source=source,
            target=model_dir,
            layout=loaded.file.layout if loaded.file else "a checkpoint",
            parameters={
                name: {**exporting.describe(checkpoint.read(name)), "from": made_of[name]}
                for name in wanted
            },
            batch=batch,
            compared_with=before[1],
            before=before[0],
            after=after,
            tolerance=tolerance,
        )
        return json.dumps([found["passed"], parity.write(model_dir, found)])

    passed, line = json.loads(agreement.same_for_all("import_certified", write))
    return passed, line


def _sources(source: str, wanted: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By parameter: name, shape, dtype and checksum of each of the source's arrays it is made of.

    They are read once more, one at a time.
    """
    if not array_sources.is_source(source):
        checkpoint = stage_handover.open_checkpoint(*checkpoints.locate(source))
        return {n: [{"name": n, **exporting.describe(checkpoint.read(n))}] for n in wanted}
    with parameter_files.open_parameters(source, wanted) as file:
        found = {
            name: {"name": name, **exporting.describe(array.read())}
            for name, array in file.source_arrays.items()
        }
        return {name: [found[part] for part in file.sources[name]] for name in wanted}


def _embed_source(
    source: str, loaded: stage_handover.Loaded, model: models.ClipModel, batch: parity.Probe
) -> tuple[parity.Embeddings, str]:
    """(embeddings of what is imported, whose they are): OpenCLIP's where it can make them.

    Several processes embed together: each has some of the parameters.
    """
    ours = "this package, before the checkpoint"
    config_file = open_clip_options.config_beside(source)
    is_loadable = jax.process_count() == 1 and open_clip_peer.is_folder(source)
    peer = open_clip_peer.version() if is_loadable else None
    if peer and config_file and not loaded.notes:  # What was resized is another model's.
        config = open_clip_options.read(config_file)
        there = open_clip_options.sizes(config)
        here = (batch.images.shape[1], batch.ids.shape[1])
        if there == here:
            config, added = open_clip_options.completed(config, model)
            unsaid = f" with {', '.join(added)}, which {config_file} does not say" if added else ""
            return open_clip_peer.embed(source, batch, config), peer + unsaid
        ours += (
            f" (not {peer}: {config_file} is for {there[0]} px and {there[1]} tokens, and these "
            f"have {here[0]} and {here[1]})"
        )
    return parity.embed(model, loaded.params, batch), ours


def _summary(
    source: str,
    model_dir: str,
    loaded: stage_handover.Loaded,
    num_params: int,
    warnings: Sequence[str],
) -> str:
    file = loaded.file
    layout = f"{file.layout} layout, {file.num_arrays} arrays" if file else "a checkpoint"
    lines = [f"{source}: {layout}, {num_params:,} parameters"]
    lines += [f"resized {note}" for note in loaded.notes]
    arrays = file.source_arrays.values() if file else ()
    dtypes = collections.Counter(array.dtype.name for array in arrays)
    lines += [
        f"{count} arrays of {dtype} became float32"
        for dtype, count in sorted(dtypes.items())
        if dtype != "float32"
    ]
    if file and file.ignored:
        lines.append(f"left out {_by_top(file.ignored)}")
    lines += [f"warning: {each}" for each in (*(file.warnings if file else ()), *warnings)]
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
