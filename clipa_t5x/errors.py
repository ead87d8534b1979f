"""The error that a user can mend."""

import sys

# Of a line: files of strangers are quoted, and a terminal is to be spared what they may hold.
_MOST_CHARACTERS = 1400
_FIRST_CHARACTERS, _LAST_CHARACTERS = 900, 450


class UserError(ValueError):
    """A mistake in what the user gave: configuration, paths, data, a checkpoint of another model.

    The message is one line: the fact, the value, where it came from, the remedy. The command-line
    doors print it without a traceback and exit with status 2; anything else that is raised is a bug
    and keeps its traceback.

    What it quotes may come from anybody's files: characters that cannot be printed are escaped, and
    of a very long line the middle is left out.
    """

    def __init__(self, message: str):
        super().__init__("\n".join(map(_printable, message.split("\n"))))


def _printable(line: str) -> str:
    if len(line) > _MOST_CHARACTERS:
        line = f"{line[:_FIRST_CHARACTERS]} ... {line[-_LAST_CHARACTERS:]}"
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class UnsavableError(UserError):
    """A mistake, or misfortune, after which the run's state must not be saved, or cannot be."""


def storage_errors() -> tuple[type[Exception], ...]:
    """What reading and writing files raises, local or remote.

    Paths in buckets are read through TensorFlow where it is there; its errors are no OSErrors.
    """
    tensorflow = sys.modules.get("tensorflow")
    return (OSError,) if tensorflow is None else (OSError, tensorflow.errors.OpError)


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
