"""Whether texts become the ids that weights were trained with: vocabularies and token tables."""

import os
from typing import Any

from etils import epath

from clipa_t5x.data import input_pipeline, tasks, vocabularies
from clipa_t5x.errors import UserError
from clipa_t5x.weights import open_clip_options

FILE = "vocab.txt"
# Rows of the token table of OpenAI's byte-pair encoding.
BPE_ROWS = 49_408


def configured(cfg: input_pipeline.DatasetConfig) -> Any:
    """What a data set's texts are tokenised by; its file is not read yet.

    Raises:
      UserError: it has no texts.
    """
    feature: Any = tasks.get_task(cfg.mixture_or_task_name).output_features.get("text")
    if feature is None:
        raise UserError(f"{cfg.mixture_or_task_name} has no texts: set VOCABULARY.")
    return feature.vocabulary


def for_export(cfg: input_pipeline.DatasetConfig, rows: int) -> Any:
    """The vocabulary of a data set's texts, known to be that of a token table.

    Args:
      cfg: of the data set.
      rows: of the table.

    Raises:
      UserError: there are no texts, the vocabulary's file is missing or none, or the table is
        another vocabulary's.
    """
    vocabulary = configured(cfg)
    size = len(vocabulary.pieces)
    if size > rows:
        raise UserError(
            f"the vocabulary has {size} pieces and TextTransformer.vocab_size is {rows}: set "
            "VOCABULARY_PATH to the one that the model was trained with."
        )
    if rows == BPE_ROWS != size:
        raise UserError(
            f"TextTransformer.vocab_size is {rows}, that of OpenAI's byte-pair encoding, and "
            f"VOCABULARY_PATH is a WordPiece vocabulary of {size} pieces: with it, texts would "
            "become other ids than in training. Export with --format=clipa or stablehlo, which "
            "need none."
        )
    return vocabulary


def check_import(source: str, rows: int, cfg: input_pipeline.DatasetConfig) -> list[str]:
    """Compares what weights were trained with, as far as it is known, with a configuration's.

    Args:
      source: of the weights.
      rows: of their token table.
      cfg: of a data set.

    Returns:
      Warnings, a line each, that texts here may become other ids.

    Raises:
      UserError: beside the weights is a vocabulary that is not the configured one.
    """
    config_file = open_clip_options.config_beside(source)
    named = open_clip_options.tokenizer(config_file) if config_file else None
    if named is None and (config_file or rows == BPE_ROWS):
        return [
            f"{config_file or source} is of a model whose texts OpenCLIP tokenises by OpenAI's "
            "byte-pair encoding (no hf_tokenizer_name), and here there is BERT's WordPiece only: "
            "its image tower is of use as it is, its text tower for ids that are made elsewhere, "
            "and what zero-shot and retrieval say here means nothing."
        ]
    own = configured(cfg)
    try:
        pieces = own.pieces
    except UserError as error:
        return [str(error)]
    beside = epath.Path(config_file).parent / FILE if config_file else None
    if beside is not None and beside.exists():
        _refuse_another(os.fspath(beside), own.path, pieces)
    if len(pieces) > rows:
        return [
            f"VOCABULARY_PATH {own.path} has {len(pieces)} pieces and the token table {rows} rows: "
            "it is not the vocabulary that these weights were trained with."
        ]
    return []


def _refuse_another(beside: str, path: str, pieces: list[str]) -> None:
    there = vocabularies.BertVocabulary(beside).pieces
    if there == pieces:
        return
    both = zip(there, pieces, strict=False)
    same = next((i for i, (a, b) in enumerate(both) if a != b), min(len(there), len(pieces)))
    raise UserError(
        f"{beside} ({len(there)} pieces) and VOCABULARY_PATH {path} ({len(pieces)} pieces) differ "
        f"from line {same + 1} on, so that texts would become other ids than in training: set "
        f"--gin.VOCABULARY_PATH=\"'{beside}'\"."
    )
