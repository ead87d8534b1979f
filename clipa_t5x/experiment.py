"""An experiment's gin files, put in force as each command needs them."""

import contextlib
from collections.abc import Sequence

from clipa_t5x import checkpoints, gin_utils, stage_info
from clipa_t5x.errors import UserError

ROOT = "clipa_t5x.train.train"

# What a command that begins no run has to say of where a run would begin.
NO_BEGINNING = "INITIAL_CHECKPOINT_PATH = None"


def parse(gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]) -> None:
    """Parses and checks an experiment, see `gin_utils.parse`; builds nothing."""
    from clipa_t5x.data import input_pipeline

    input_pipeline.keep_accelerators_for_jax()
    gin_utils.parse(gin_files, bindings, search_paths, root=ROOT)


def parse_to_go_on(
    gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> None:
    """As `parse`; a MODEL_DIR that has a checkpoint asks for no INITIAL_CHECKPOINT_PATH.

    It is what the run began with, if anything, so that the report goes on showing that.
    """
    try:
        parse(gin_files, bindings, search_paths)
    except UserError:
        with contextlib.suppress(UserError):
            parse(gin_files, [NO_BEGINNING, *bindings], search_paths)
            model_dir = gin_utils.query("MODEL_DIR")
            if checkpoints.all_steps(model_dir):
                began = stage_info.initial_checkpoint(model_dir)
                bindings = [f"INITIAL_CHECKPOINT_PATH = {began!r}", *bindings]
                parse(gin_files, bindings, search_paths)
                return
        raise  # Whatever else is wrong was so before.
