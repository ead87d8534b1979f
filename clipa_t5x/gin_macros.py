"""Macros of a configuration that another engine has parsed by gin itself."""

from collections.abc import Sequence

from gin import config

from clipa_t5x import gin_statements
from clipa_t5x.errors import UserError


def refuse_unread(bindings: Sequence[str]) -> None:
    """Refuses overrides of macros that nothing reads: gin accepts them, without effect.

    Those of files cannot be told from what other files' overrides have left without a reader.

    Args:
      bindings: of the command line, 'NAME = VALUE'.

    Raises:
      UserError: names one, and the nearest that is read.
    """
    names = {binding.partition("=")[0].strip() for binding in bindings}
    known = {scope for scope, selector in config._CONFIG if selector == gin_statements.MACRO}
    read = gin_statements.macros_read(config._CONFIG.values())
    for name in sorted(names & known - read):
        hint = gin_statements.did_you_mean(name, read)
        raise UserError(f"macro {name} is set but nothing reads it.{hint}")
