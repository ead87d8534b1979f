"""An experiment's gin files, put in force as each command needs them."""

import contextlib
from collections.abc import Sequence
from typing import Any

from clipa_t5x import gin_statements, gin_utils

ROOT = "clipa_t5x.train.train"

_BEGINNING = "INITIAL_CHECKPOINT_PATH"
# Of a command that begins no run, and of one that writes and restores nothing.
NO_BEGINNING = f"{_BEGINNING} = None"
NO_MODEL_DIR = "MODEL_DIR = 'unused'"
NO_PLACES = (NO_MODEL_DIR, NO_BEGINNING)


def parse(gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]) -> None:
    """Parses and checks an experiment, see `gin_utils.parse`; builds nothing."""
    from clipa_t5x.data import input_pipeline

    input_pipeline.keep_accelerators_for_jax()
    gin_utils.parse(gin_files, bindings, search_paths, root=ROOT)


def parse_without_beginning(
    gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> None:
    """As `parse`, for what has no use of an earlier stage, which a recipe may demand."""
    demands = gin_statements.sets_macro(_BEGINNING, gin_files, search_paths)
    parse(gin_files, [*([NO_BEGINNING] if demands else []), *bindings], search_paths)


def parse_to_go_on(
    gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> None:
    """As `parse`; a MODEL_DIR that has a checkpoint asks for no earlier stage.

    It is what the run began with, if anything, so that the report goes on showing that.
    """
    from clipa_t5x import checkpoints, stage_info
    from clipa_t5x.errors import UserError

    try:
        parse(gin_files, bindings, search_paths)
    except UserError:
        with contextlib.suppress(UserError):
            parse_without_beginning(gin_files, bindings, search_paths)
            model_dir = arguments()["model_dir"]
            if checkpoints.all_steps(model_dir):
                began = stage_info.initial_checkpoint(model_dir)
                parse(gin_files, [f"{_BEGINNING} = {began!r}", *bindings], search_paths)
                return
        raise  # Whatever else is wrong was so before.


def arguments() -> dict[str, Any]:
    """The arguments of `train.train` that the experiment in force gives, built.

    Raises:
      UserError: one cannot be built.
    """
    return gin_utils.build_arguments(ROOT)
