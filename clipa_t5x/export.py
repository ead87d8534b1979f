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
    array_sources,
    exporting,
    layouts,
    open_clip_config,
    open_clip_options,
    open_clip_peer,
    parameter_files,
    parity,
    serving,
    text_vocabularies,
)

OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
CLIPA_WEIGHTS = "model.npz"
_WEIGHTS = {
    "open_clip": OPEN_CLIP_WEIGHTS, "clipa": CLIPA_WEIGHTS, "stablehlo": serving.PARAMETERS,
}  # fmt: skip
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
      probe_rows: images and texts that are embedded before and after; 0 embeds none.
      verify: whether embeddings that differ are an error; where none are made, whether the written
        arrays are read back, and checksums that differ are one.
      tolerance: see `parity.certificate`.
      **_: the other arguments of `train.train`, which are not used.

    Returns:
      What `parity.json` holds.

    Raises:
      UserError: there is no such checkpoint, it holds NaN, Inf or integers, the format has no place
        for the model, the folder cannot be written or holds another format's export, or what is
        compared differs and `verify` is set.
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
        _make_folder(output_dir, export_format)
        parameters, target = write(read)
        compared: dict[str, Any] = (
            _compare(job, read, export_format, target, probe_rows) if probe_rows else {}
        )
    if verify and not probe_rows:
        path = os.path.join(output_dir, _WEIGHTS[export_format])
        compared = {"differing_arrays": exporting.differing(path, parameters)}
    found = parity.certificate(
        source=source, target=target, layout=export_format, parameters=parameters,
        tolerance=tolerance, **compared,
    )  # fmt: skip
    logging.info("Exported %s to %s: %s.", source, target, parity.write(output_dir, found))
    if verify and not found["passed"]:
        raise UserError(
            f"{target} is not what it comes from, {source}: {parity.summary(found)} "
            f"(--tolerance). See {os.path.join(output_dir, parity.FILE)}."
        )
    return found


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
        pieces = self._vocabulary().pieces
        config = open_clip_config.config(
            self.model, self.image_size, self.text_length, self._resize_mode(known_only=True)
        )
        tables = exporting.fixed_tables(self.model, self.image_size, self.text_length)
        tensors = layouts.open_clip(self._unstacked(tables))
        folder = epath.Path(self.output_dir)
        parameters = self._write(OPEN_CLIP_WEIGHTS, tensors, read, tables)
        (folder / open_clip_options.CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        self._write_vocabulary(pieces)
        (folder / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG) + "\n")
        return parameters, self.output_dir

    def clipa(self, read: exporting.Read) -> tuple[dict[str, Any], str]:
        tensors = layouts.clipa(self._unstacked({}))
        parameters = self._write(CLIPA_WEIGHTS, tensors, read, {}, parameter_files.PREFIX)
        return parameters, os.path.join(self.output_dir, CLIPA_WEIGHTS)

    def stablehlo(self, read: exporting.Read) -> tuple[dict[str, Any], str]:
        vocabulary = self._vocabulary_if_any()
        parameters = serving.write(
            self.output_dir, self.model, self.shapes, read, self.image_size, self.text_length,
            {
                "images": self._image_preprocessing(),
                "texts": self._text_preprocessing(vocabulary),
            },
        )  # fmt: skip
        if vocabulary is not None:
            self._write_vocabulary(vocabulary.pieces)
        return parameters, self.output_dir

    def _image_preprocessing(self) -> dict[str, Any]:
        """How images become what the image tower takes, which scales pixels itself."""
        return {
            "size": [self.image_size, self.image_size],
            "resize_mode": self._resize_mode(known_only=False),
            "interpolation": "bilinear",
            "mean": list(self.model.image_mean),
            "std": list(self.model.image_std),
            "scaled_by": "image_tower",
        }

    def _text_preprocessing(self, vocabulary: Any) -> dict[str, Any]:
        """How texts become ids."""
        if vocabulary is None:
            return {"length": self.text_length, "vocabulary": None}
        return {
            "length": self.text_length,
            "vocabulary": text_vocabularies.FILE,
            "tokenization": vocabulary.tokenization,
            "lower_case": True,
            "first_id": vocabulary.cls_id,
            "unknown_id": vocabulary.unk_id,
            "padding_id": 0,
        }

    def _vocabulary_if_any(self) -> Any:
        try:
            return self._vocabulary()
        except UserError as error:
            logging.warning("The export has no vocabulary: %s", error)
            return None

    def _vocabulary(self) -> Any:
        rows = self.model.text_tower.vocab_size
        return text_vocabularies.for_export(self.eval_cfg, rows)

    def _write_vocabulary(self, pieces: Sequence[str]) -> None:
        path = epath.Path(self.output_dir) / text_vocabularies.FILE
        path.write_text("".join(f"{piece}\n" for piece in pieces))

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

    def _resize_mode(self, known_only: bool) -> str:
        preprocessor: Any = tasks.image_preprocessor(self.eval_cfg.mixture_or_task_name)
        name = getattr(inspect.unwrap(preprocessor), "__name__", type(preprocessor).__name__)
        if name not in open_clip_config.RESIZE_MODES:
            if not known_only:
                return name
            raise UserError(
                f"images are evaluated by {name}, and OpenCLIP's preprocessing is "
                f"{' or '.join(open_clip_config.RESIZE_MODES)}: set "
                "--gin.EVAL_IMAGE_PREPROCESSOR=@preprocessors.squash and TRAIN_EVAL_DATASET."
            )
        return open_clip_config.RESIZE_MODES[name]


def _make_folder(path: str, export_format: str) -> None:
    folders.make(path, "--output_dir", "name a folder, existing or not, that can be written")
    there = parity.layout_of(path)
    if there not in (None, export_format):
        raise UserError(
            f"--output_dir {path} has the {parity.FILE} of weights in another layout, {there}: "
            f"name another folder for --format={export_format}."
        )


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
            yield _finite(path, file.saved, lambda name: file.saved[name].read()), path
            return
        checkpoint = stage_handover.open_checkpoint(*checkpoints.locate(path))
        checkpoints.check_same_parameters(checkpoint.saved, wanted, checkpoint.path, remedy)
        yield _finite(checkpoint.path, checkpoint.saved, checkpoint.read), checkpoint.path


def _finite(path: str, saved: Mapping[str, Any], read: exporting.Read) -> exporting.Read:
    """Reads what a model can have, in float32, as every format holds it."""

    def read_finite(name: str) -> np.ndarray:
        return parameter_files.finite(path, name, saved[name].dtype, lambda: read(name), np.float32)

    return read_finite


def _compare(
    job: _Export, read: exporting.Read, export_format: str, target: str, rows: int
) -> dict[str, Any]:
    """Embeddings of a probe by the parameters before, and by whoever reads the export."""
    batch = parity.probe(rows, job.image_size, job.text_length, job.model.text_tower.vocab_size)
    params = traverse_util.unflatten_dict({n: read(n) for n in job.shapes}, sep="/")
    if export_format == "stablehlo":  # Which dtype it computes in is fixed in it.
        towers = (job.model.image_tower, job.model.text_tower)
        return {
            "batch": batch,
            "before": parity.embed(job.model, params, batch, exact=False),
            "after": serving.embed(target, batch),
            "compared_with": f"jax.export, jax {jax.__version__}",
            "computed_in": [np.dtype(tower.dtype).name for tower in towers],
        }
    before = parity.embed(job.model, params, batch)
    peer = open_clip_peer.version() if export_format == "open_clip" else None
    if peer and "://" not in target:
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
