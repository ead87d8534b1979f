"""Macros of a configuration that another engine has parsed by gin itself."""

from collections.abc import Sequence, Set

from gin import config, config_parser

from clipa_t5x import gin_statements
from clipa_t5x.errors import UserError


def refuse_unread(
    bindings: Sequence[str], files: Sequence[str] = (), search_paths: Sequence[str] = ()
) -> None:
    """Refuses macros that nothing reads: gin accepts them, without effect.

    Of the command line's, those that what is in force does not read; of files', those that no
    statement reads, so that one file may override what another's reader was.

    Args:
      bindings: of the command line, 'NAME = VALUE'.
      files: gin files that were parsed before them.
      search_paths: in which they and what they include were looked for.

    Raises:
      UserError: names one, and the nearest that is read.
    """
    names = {binding.partition("=")[0].strip() for binding in bindings}
    known = {scope for scope, selector in config._CONFIG if selector == gin_statements.MACRO}
    read = gin_statements.macros_read(config._CONFIG.values())
    for name in sorted(names & known - read):
        raise _unread(f"--gin.{name}", name, read)
    _refuse_unread_of_files(bindings, files, search_paths)


def _refuse_unread_of_files(
    bindings: Sequence[str], files: Sequence[str], search_paths: Sequence[str]
) -> None:
    try:
        statements = list(gin_statements.read(files, bindings, search_paths))
    except UserError:
        return  # gin has read them all, some of them in Python packages, where only it looks.
    read, assigned = set(), []
    for content, where, _ in statements:
        if isinstance(content, config_parser.BindingStatement):
            leaves = gin_statements.leaves(content.value)
            read |= {leaf.name for leaf in leaves if isinstance(leaf, gin_statements.Macro)}
            if not (content.arg_name or where.on_command_line):
                assigned.append(("/".join(filter(None, content[:2])), where))
    for name, where in assigned:
        if name not in read:
            raise _unread(where, name, read)


def _unread(where: gin_statements.Where | str, name: str, read: Set[str]) -> UserError:
    hint = gin_statements.did_you_mean(name, read)
    return gin_statements.user_error(where, f"macro {name} is set but nothing reads it.{hint}")
