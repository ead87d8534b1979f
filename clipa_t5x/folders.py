"""Folders that a user names: refused where they can be none, made before there is work to lose."""

from etils import epath

from clipa_t5x.errors import UserError, storage_errors


def check_model_dir(path: str, remedy: str) -> None:
    """Refuses what can be no MODEL_DIR, existing or not.

    Args:
      path: of it.
      remedy: what to do where there is none.

    Raises:
      UserError: it is empty, or a file.
    """
    if not path:
        raise UserError(f"MODEL_DIR is empty: {remedy}.")
    if epath.Path(path).is_file():
        raise UserError(f"MODEL_DIR {path} is a file: name a folder, existing or not.")


def make(path: str, name: str, remedy: str) -> None:
    """Makes a folder, and those above it, where it is missing.

    Args:
      path: of it, local or remote.
      name: what it was given as, such as 'MODEL_DIR'.
      remedy: what to do where it cannot be.

    Raises:
      UserError: it cannot be.
    """
    try:
        epath.Path(path).mkdir(parents=True, exist_ok=True)
    except storage_errors() as error:
        raise UserError(f"{name} {path} cannot be made ({error}): {remedy}.") from error
