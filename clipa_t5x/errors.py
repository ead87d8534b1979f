"""The error that a user can mend."""


class UserError(ValueError):
    """A mistake in what the user gave: configuration, paths, data, a checkpoint of another model.

    The message is one line: the fact, the value, where it came from, the remedy. The command-line
    doors print it without a traceback and exit with status 2; anything else that is raised is a bug
    and keeps its traceback.
    """


class UnsavableError(UserError):
    """A mistake, or misfortune, after which the run's state must not be saved, or cannot be."""


def check_number(name: str, value: object, *, minimum: float, whole: bool = False) -> None:
    """Refuses what is no number, or too small.

    Args:
      name: as the user would set it, such as 'BATCH_SIZE'.
      value: what was given.
      minimum: the smallest that will do.
      whole: whether only integers will do.

    Raises:
      UserError: names all of these.
    """
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not value >= minimum:
        kind = "an integer" if whole else "a number"
        raise UserError(f"{name} is {value!r}; it must be {kind} of at least {minimum}.")
