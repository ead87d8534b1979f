"""Weights for others: `python -m clipa_t5x.export --gin_file=MODEL_DIR/config.gin ...`."""

import contextlib
import dataclasses
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util

from clipa_t5x import checkpoints, folders, models, stage_handover, trainer
from clipa_t5x.data import input_pipeline, tasks
from clipa_t5x.errors import UserError
from clipa_t5x.weights import (
    array_files,
    array_sources,
    exporting,
    layouts,
    open_clip_config,
    open_clip_options,
    open_clip_peer,
    parameter_files,
    parity,
    serving,
)

OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
CLIPA_WEIGHTS = "model.npz"
# Of each format, where the arrays are.
_FILES = {
    "open_clip": OPEN_CLIP_WEIGHTS,
    "clipa": CLIPA_WEIGHTS,
    "stablehlo": serving.PARAMETERS,
}
# What Hugging Face's tokenizer needs to be told besides the vocabulary.
_TOKENIZER_CONFIG = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}


def export(
    *,
    model: models.ClipModel,
    train_dataset_cfg: input_pipeline.DatasetConfig,
    train_eval_dataset_cfg: input_pipeline.DatasetConfig | None,
    model_dir: str,
    output_dir: str,
    export_format: str = "open_clip",
    checkpoint: str | None = None,
    probe_rows: int = 4,
    verify: bool = False,
    tolerance: float = parity.TOLERANCE,
    **_: Any,
) -> dict[str, Any]:
    """Writes a run's parameters in another project's layout, with `parity.json` beside them.

    Parameters are read, laid out and written one by one; only the comparison of embeddings has all
    of them in memory.

    Args:
      model: as for `train.train`.
      train_dataset_cfg: as for `train.train`; its feature lengths are the export's image size and
        text length.
      train_eval_dataset_cfg: as for `train.train`; how evaluation resizes images is exported.
      model_dir: of the run.
      output_dir: where to; local or remote.
      export_format: 'open_clip' (a folder for `local-dir:` and Hugging Face), 'clipa' (`.npz`) or
        'stablehlo' (both towers, for jax alone).
      checkpoint: as for `eval.evaluate`; None takes the newest in `model_dir`.
      probe_rows: images and texts that are embedded before and after; 0 compares checksums only.
      verify: whether embeddings that differ are an error.
      tolerance: see `parity.certificate`.
      **_: the other arguments of `train.train`, which are not used.

    Returns:
      What `parity.json` holds.

    Raises:
      UserError: there is no such checkpoint, the format has no place for the model, or embeddings
        differ and `verify` is set.
    """
    lengths = train_dataset_cfg.task_feature_lengths
    abstract_params = _abstract_params(model, train_dataset_cfg)
    eval_cfg = train_eval_dataset_cfg or train_dataset_cfg
    job = _Export(
        model, checkpoints.flatten(abstract_params), lengths["images"], lengths["text"], eval_cfg,
        output_dir,
    )  # fmt: skip
    write = {
        "open_clip": job.open_clip, "clipa": job.clipa, "stablehlo": job.stablehlo,
    }[export_format]  # fmt: skip
    with _reading(checkpoint or model_dir, job.shapes) as (read, source):
        remedy = "name a folder, existing or not, that can be written"
        folders.make(output_dir, "--output_dir", remedy)
        parameters, target = write(read)
        compared = _compare(job, read, export_format, target, probe_rows) if probe_rows else {}
    found = parity.certificate(
        source=source, target=target, layout=export_format, parameters=parameters,
        tolerance=tolerance, **compared,
    )  # fmt: skip
    if not probe_rows:
        found |= _read_again(output_dir, export_format, parameters)
    logging.info("Exported %s to %s: %s.", source, target, parity.write(output_dir, found))
    if verify and not found["passed"]:
        raise UserError(
            f"{target} is not what it comes from, {source}: {parity.summary(found)} "
            f"(--tolerance). See {os.path.join(output_dir, parity.FILE)}."
        )
    return found


def _read_again(
    output_dir: str, export_format: str, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Whether every array that was written, read again one by one, has the checksum it should."""
    with array_files.open_arrays(os.path.join(output_dir, _FILES[export_format])) as arrays:
        bad = [
            name
            for name, entry in parameters.items()
            if exporting.describe(arrays[name].read())["crc32c"] != entry["crc32c"]
        ]
    return {"compared_with": "checksums of the files, read again", "differing": bad,
            "passed": not bad}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Export:
    """What is exported, and where to; a method for each format returns (parameters, target)."""

    model: models.ClipModel
    shapes: Mapping[str, Any]
    image_size: int
    text_length: int
    eval_cfg: input_pipeline.DatasetConfig
    output_dir: str

    def open_clip(self, read: exporting.Read) -> tuple[dict[str, Any], str]:
        config = open_clip_config.config(
            self.model, self.image_size, self.text_length, self._resize_mode()
        )
        tables = exporting.fixed_tables(self.model, self.image_size, self.text_length)
        tensors = layouts.open_clip(self._unstacked(tables))
        vocabulary = tasks.get_task(self.eval_cfg.mixture_or_task_name).output_features["text"]
        vocab: Any = vocabulary.vocabulary
        pieces = vocab.pieces
        if len(pieces) > self.model.text_tower.vocab_size:
            raise UserError(
                f"the vocabulary has {len(pieces)} pieces and the text tower's table "
                f"{self.model.text_tower.vocab_size} rows: set VOCABULARY_PATH to that which the "
                "model was trained with."
            )
        folder = epath.Path(self.output_dir)
        parameters = self._write(OPEN_CLIP_WEIGHTS, tensors, read, tables)
        (folder / open_clip_options.CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
        (folder / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG) + "\n")
        return parameters, self.output_dir

    def clipa(self, read: exporting.Read) -> tuple[dict[str, Any], str]:
        tensors = layouts.clipa(self._unstacked({}))
        parameters = self._write(CLIPA_WEIGHTS, tensors, read, {}, parameter_files.PREFIX)
        return parameters, os.path.join(self.output_dir, CLIPA_WEIGHTS)

    def stablehlo(self, read: exporting.Read) -> tuple[dict[str, Any], str]:
        parameters = serving.write(
            self.output_dir, self.model, self.shapes, read, self.image_size, self.text_length
        )
        return parameters, self.output_dir

    def _unstacked(self, tables: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
        shapes = layouts.unstacked({name: leaf.shape for name, leaf in self.shapes.items()})
        return {**shapes, **{name: table.shape for name, table in tables.items()}}

    def _write(
        self,
        name: str,
        tensors: Sequence[layouts.Tensor],
        read: exporting.Read,
        tables: Mapping[str, np.ndarray],
        prefix: str = "",
    ) -> dict[str, Any]:
        shapes = {name: leaf.shape for name, leaf in self.shapes.items()}
        path = os.path.join(self.output_dir, name)
        return exporting.write(path, tensors, read, shapes, tables, prefix)

    def _resize_mode(self) -> str:
        preprocessor: Any = tasks.image_preprocessor(self.eval_cfg.mixture_or_task_name)
        name = getattr(inspect.unwrap(preprocessor), "__name__", type(preprocessor).__name__)
        if name not in open_clip_config.RESIZE_MODES:
            raise UserError(
                f"images are evaluated by {name}, and OpenCLIP's preprocessing is "
                f"{' or '.join(open_clip_config.RESIZE_MODES)}: set "
                "--gin.EVAL_IMAGE_PREPROCESSOR=@preprocessors.squash and TRAIN_EVAL_DATASET."
            )
        return open_clip_config.RESIZE_MODES[name]


def _abstract_params(model: models.ClipModel, cfg: input_pipeline.DatasetConfig) -> Any:
    batch = trainer.one_example(cfg.batch_spec())
    return nn.unbox(jax.eval_shape(lambda: models.init_params(model, jax.random.key(0), batch)))


@contextlib.contextmanager
def _reading(path: str, wanted: Mapping[str, Any]) -> Iterator[tuple[exporting.Read, str]]:
    """(function that reads a parameter by name, where they come from)."""
    remedy = "Give a checkpoint of this model (--checkpoint)."
    with contextlib.ExitStack() as stack:
        if array_sources.is_source(path):
            file = stack.enter_context(parameter_files.open_parameters(path, wanted))
            checkpoints.check_same_parameters(file.saved, wanted, path, remedy)
            yield lambda name: file.saved[name].read(), path
            return
        checkpoint = stage_handover.open_checkpoint(*checkpoints.locate(path))
        checkpoints.check_same_parameters(checkpoint.saved, wanted, checkpoint.path, remedy)
        yield checkpoint.read, checkpoint.path


def _compare(
    job: _Export, read: exporting.Read, export_format: str, target: str, rows: int
) -> dict[str, Any]:
    """Embeddings of a probe by the parameters before, and by whoever reads the export."""
    batch = parity.probe(rows, job.image_size, job.text_length, job.model.text_tower.vocab_size)
    exact = export_format != "stablehlo"  # Which computes in the model's own dtype.
    tree = traverse_util.unflatten_dict({n: read(n) for n in job.shapes}, sep="/")
    before = parity.embed(job.model, tree, batch, exact)
    peer = open_clip_peer.version() if export_format == "open_clip" else None
    if export_format == "stablehlo":
        after, compared_with = serving.embed(target, batch), f"jax.export, jax {jax.__version__}"
    elif peer and "://" not in target:
        after, compared_with = open_clip_peer.embed(target, batch), peer
    else:
        is_folder = export_format == "open_clip"
        path = os.path.join(target, OPEN_CLIP_WEIGHTS) if is_folder else target
        with parameter_files.open_parameters(path, job.shapes) as file:
            params = traverse_util.unflatten_dict(
                {n: file.saved[n].read() for n in job.shapes}, sep="/"
            )
        after, compared_with = parity.embed(job.model, params, batch), "this package, read again"
    return {"batch": batch, "before": before, "after": after, "compared_with": compared_with}


if __name__ == "__main__":
    from clipa_t5x import main

    main.run("export")
