"""Macros of a configuration that another engine has parsed by gin itself."""

from gin import config

from clipa_t5x import gin_statements
from clipa_t5x.errors import UserError


def refuse_unread() -> None:
    """Refuses macros that nothing reads, which gin accepts: a misspelt one would have no effect.

    Raises:
      UserError: names one, and the nearest that is read.
    """
    known: set[str] = set()
    read: set[str] = set()
    for (scope, selector), parameters in config._CONFIG.items():
        known |= {scope} if selector == gin_statements.MACRO else set()
        keys = (reference.config_key for reference in gin_statements.references(parameters))
        read |= {name for name, called in keys if called == gin_statements.MACRO}
    for name in sorted(known - read - {""}):
        hint = gin_statements.did_you_mean(name, read)
        raise UserError(f"macro {name} is set but nothing reads it.{hint}")
