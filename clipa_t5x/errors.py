"""The error that a user can mend."""


class UserError(ValueError):
    """A mistake in what the user gave: configuration, paths, data, a checkpoint of another model.

    The message is one line: the fact, the value, where it came from, the remedy. The command-line
    doors print it without a traceback and exit with status 2; anything else that is raised is a bug
    and keeps its traceback.
    """
