"""From gin files to constructed objects, and back to the one file that repeats the run.

The language is gin's, with dynamic registration. The statements are checked and bound here because
gin accepts what nobody reads: a misspelt macro or scope would silently train with the default.
"""

import contextlib
import functools
import importlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

import gin
import jax
from absl import logging
from etils import epath
from gin import config

from clipa_t5x import errors, gin_statements
from clipa_t5x.gin_statements import CONSTANT, MACRO, Binding

_LINE_LENGTH = 100
_GIN_CONTEXT = "\n  In call to configurable"

# What one call is: the scope it runs in, and the selector of what it calls.
_Call = tuple[str, str]
_Lookup = Callable[[str, str], Iterable[Binding]]


class _Parsed:
    """The configuration in force.

    Attributes:
        root: selector of the entry function.
        configurables: names and imports of all that the statements mention.
        bindings: in order, overridden ones too.
        final: the last binding of each (scope, selector, parameter): what gin holds.
        entries: the calls that start everything: of the root, and of the macros Python queries.
    """

    def __init__(self, root: str, queried_macros: Sequence[str]):
        self.configurables = gin_statements.Configurables()
        self.root = self.configurables.register(_root_source(root), root)
        self.bindings: list[Binding] = []
        self.final: dict[tuple[str, str, str], Binding] = {}
        self.entries: list[_Call] = [("", self.root), *((name, MACRO) for name in queried_macros)]

    def add(self, binding: Binding) -> None:
        """Appends a binding, which overrides an earlier one of the same parameter."""
        self.bindings.append(binding)
        self.final[binding.scope, binding.selector, binding.parameter] = binding


_parsed: _Parsed | None = None


def parse(
    gin_files: Sequence[str],
    gin_bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    *,
    root: str,
    queried_macros: Sequence[str] = (),
) -> None:
    """Replaces the configuration in force by that of these files and bindings, and locks it.

    Nothing is built. A file or include is looked for in the current directory first, then in the
    search paths in order: a file of the same name in the current directory wins. Bindings follow
    the files; outside dynamic registration, so on the command line too, a configurable is named as
    any file spells it or by any unambiguous end of its name.

    Known, and therefore accepted, is each binding that the root can reach through the references
    of all statements, those that later ones override included. A command-line binding must also be
    in reach once everything is overridden: it would have no effect otherwise.

    Args:
        gin_files: paths.
        gin_bindings: `NAME = VALUE`, as `rewrite_gin_args` makes them.
        search_paths: directories.
        root: the entry function, such as `clipa_t5x.train.train`, whatever the files call it.
        queried_macros: macros that the caller reads with `query`, so that setting them is no
            mistake even where no file reads them.

    Raises:
        UserError: a file is missing, or a statement cannot be read, names what does not exist,
            reads a macro that nothing sets, sets what nothing reads, or is still `%gin.REQUIRED`.
    """
    global _parsed
    _parsed = None
    gin.clear_config()
    parsed = _Parsed(root, queried_macros)
    for statement in gin_statements.read(gin_files, gin_bindings, search_paths):
        binding = parsed.configurables.execute(statement)
        if binding is not None:
            parsed.add(binding)
    _refuse_undefined_macros(parsed)
    _refuse_dead_bindings(parsed)
    _refuse_missing_values(parsed)
    for (scope, selector, parameter), binding in parsed.final.items():
        gin.bind_parameter((scope, selector, parameter), binding.value)
    gin.finalize()
    _parsed = parsed


def get_root(root: str) -> Callable[..., Any]:
    """Returns the entry function with its gin bindings applied.

    Args:
        root: as it was given to `parse`.

    Returns:
        The configured function. An `errors.UserError` raised while it runs arrives as it was
        raised, without the lines that gin appends.
    """
    configured = gin.get_configurable(_root_source(root).target)

    @functools.wraps(configured)
    def call(*args, **kwargs):
        with errors_as_raised():
            return configured(*args, **kwargs)

    return call


@contextlib.contextmanager
def errors_as_raised() -> Iterator[None]:
    """Takes off a `UserError` what gin appends."""
    try:
        yield
    except errors.UserError as error:
        raise errors.UserError(message(error)) from error


def message(error: Exception) -> str:
    """The error as it was raised, without the lines that gin appends."""
    return str(error).partition(_GIN_CONTEXT)[0]


def query(name: str) -> Any:
    """Returns the value of the macro `name`: references and macros within are evaluated.

    Raises:
        UserError: nothing sets the macro.
    """
    macros = [scope for scope, selector, _ in _in_force().final if selector == MACRO]
    if name not in macros:
        raise errors.UserError(f"{name} is not set.{gin_statements.did_you_mean(name, macros)}")
    return config.ConfigurableReference(f"{name}/{MACRO}", True).scoped_configurable_fn()


def rewrite_gin_args(argv: Sequence[str]) -> list[str]:
    """Rewrites T5X's `--gin.NAME=VALUE` to `--gin_bindings=NAME = VALUE`; leaves the rest alone.

    Raises:
        UserError: a `--gin.NAME` has no `=VALUE`.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    rewritten = []
    for argument in argv[:end]:
        if argument.startswith("--gin."):
            name, equals, value = argument.removeprefix("--gin.").partition("=")
            if not equals:
                raise errors.UserError(f"{argument} has no value: write {argument}=VALUE")
            argument = f"--gin_bindings={name} = {value}"
        rewritten.append(argument)
    return [*rewritten, *argv[end:]]


def summarize_gin_config(model_dir: str, writer: Any = None, step: int = 0) -> None:
    """Host 0 logs the operative configuration and writes it to `model_dir/config.gin`.

    The file appears whole or not at all. Call this from within the root function, when everything
    has been built: gin knows the defaults of what has been called by then.

    Args:
        model_dir: local or remote directory; made if absent.
        writer: a clu `MetricWriter` that gets the text as `gin_config`, or None.
        step: of that text summary.
    """
    if jax.process_index() != 0:
        return
    text = operative_config()
    logging.info("Operative gin configuration:\n%s", text)
    directory = epath.Path(model_dir)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"config.gin.partial-{os.getpid()}"
    partial.write_text(text)
    partial.replace(directory / "config.gin")
    if writer is not None:
        # Markdown shows indented text as it is.
        lines = "\n".join(f"    {line}" for line in text.splitlines())
        writer.write_texts(step, {"gin_config": lines})


def operative_config() -> str:
    """Returns the configuration in force as the text of one gin file that repeats the run.

    It holds what was bound or defaulted in every call so far, what is bound for calls still to
    come (functions passed as objects), and every import. A default that gin cannot write, such as
    a function, is left to the code. Parsing the text, running and asking again gives the same text.
    """
    parsed = _in_force()
    with config._OPERATIVE_CONFIG_LOCK:
        recorded = {call: dict(values) for call, values in config._OPERATIVE_CONFIG.items()}
    calls = _reach(parsed.entries, _winning(parsed.final.values()))
    values = {call: values for call, values in recorded.items() if call[1] != CONSTANT}
    for call, bindings in calls.items():
        if call not in recorded:
            for binding in bindings:
                key = (binding.scope, binding.selector)
                values.setdefault(key, {}).setdefault(binding.parameter, binding.value)
    nowhere = gin_statements.Where("")
    # A caller's own argument hides a binding from gin's record, but not the macro that it read.
    text = [
        Binding(call[0], call[1], parameter, value, nowhere, "")
        for call, parameters in values.items()
        for parameter, value in parameters.items()
    ]
    kept = _bindings_in(_reach(parsed.entries, _possible(text)))
    uncalled = {selector for scope, selector in calls if (scope, selector) not in recorded}
    return _Writer(parsed).write([b for b in text if id(b) in kept], keep_scopes=uncalled)


def _root_source(root: str) -> gin_statements.Source:
    module, _, name = root.rpartition(".")
    return gin_statements.Source(getattr(importlib.import_module(module), name), module, name)


def _in_force() -> _Parsed:
    if _parsed is None:
        raise RuntimeError("no gin configuration is in force: call gin_utils.parse first")
    return _parsed


def _reach(entries: Sequence[_Call], lookup: _Lookup) -> dict[_Call, list[Binding]]:
    """Follows references from the entries; returns every call reached and the bindings it sees.

    A scoped reference replaces the scope and a bare one inherits it; a macro is a scope, too. A
    bare function passed as an object runs in the scope of whoever calls it: any that is opened.
    """
    calls: dict[_Call, list[Binding]] = {}
    scopes, passed = {""}, set()
    to_visit = list(entries)
    while to_visit:
        scope, selector = call = to_visit.pop()
        if call in calls:
            continue
        calls[call] = list(lookup(scope, selector))
        for binding in calls[call]:
            for reference in gin_statements.references(binding.value):
                inner, called = reference.config_key
                inner = inner or scope
                to_visit.append((inner, called))
                if inner not in scopes:
                    scopes.add(inner)
                    to_visit += [(inner, function) for function in passed]
                if not (reference.evaluate or reference.scopes or called in passed):
                    passed.add(called)
                    to_visit += [(opened, called) for opened in scopes]
    return calls


def _bindings_in(calls: dict[_Call, list[Binding]]) -> set[int]:
    """Returns the identities of the bindings that any of the calls sees."""
    return {id(binding) for bindings in calls.values() for binding in bindings}


def _outer_scopes(scope: str) -> list[str]:
    parts = scope.split("/") if scope else []
    return ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _by_call(bindings: Iterable[Binding]) -> dict[_Call, list[Binding]]:
    index: dict[_Call, list[Binding]] = {}
    for binding in bindings:
        index.setdefault((binding.scope, binding.selector), []).append(binding)
    return index


def _possible(bindings: Iterable[Binding]) -> _Lookup:
    """Returns the lookup of all bindings that a call could see, were others not in the way."""
    index = _by_call(bindings)

    def lookup(scope: str, selector: str) -> Iterable[Binding]:
        return [
            binding
            for outer in _outer_scopes(scope)
            for binding in index.get((outer, selector), ())
        ]

    return lookup


def _winning(bindings: Iterable[Binding]) -> _Lookup:
    """Returns the lookup of the bindings whose values a call gets: the innermost scope wins."""
    possible = _possible(bindings)

    def lookup(scope: str, selector: str) -> Iterable[Binding]:
        return {binding.parameter: binding for binding in possible(scope, selector)}.values()

    return lookup


def _refuse_undefined_macros(parsed: _Parsed) -> None:
    defined = {scope for scope, selector, _ in parsed.final if selector == MACRO}
    for binding in parsed.final.values():
        for name in sorted(gin_statements.macros_read([binding.value]) - defined):
            hint = gin_statements.did_you_mean(name, {*defined, "gin.REQUIRED"})
            raise gin_statements.user_error(
                binding.where, f"macro {name} is read but nothing sets it.{hint}"
            )


def _refuse_dead_bindings(parsed: _Parsed) -> None:
    """Refuses what the root cannot reach, and command-line bindings without effect."""
    calls = _reach(parsed.entries, _possible(parsed.bindings))
    reached = _bindings_in(calls)
    dead = [binding for binding in parsed.bindings if id(binding) not in reached]
    if dead:
        # What another dead binding refers to is dead because of that other one.
        causes = [binding for binding in dead if not _mentioned(binding, dead)]
        culprit = (causes or dead)[0]
        raise gin_statements.user_error(culprit.where, _explain_dead(culprit, calls, parsed))
    effective = _bindings_in(_reach(parsed.entries, _winning(parsed.final.values())))
    for binding in parsed.final.values():
        if binding.where.on_command_line and id(binding) not in effective:
            raise gin_statements.user_error(
                binding.where, "this has no effect: other settings replace all that would read it"
            )


def _mentioned(binding: Binding, others: Iterable[Binding]) -> bool:
    return any(
        selector == binding.selector and (selector != MACRO or scope == binding.scope)
        for other in others
        if other is not binding
        for scope, selector in (ref.config_key for ref in gin_statements.references(other.value))
    )


def _explain_dead(binding: Binding, calls: Iterable[_Call], parsed: _Parsed) -> str:
    if binding.selector == MACRO:
        read = gin_statements.macros_read(b.value for b in parsed.bindings) | {
            scope for scope, _ in parsed.entries[1:]
        }
        hint = gin_statements.did_you_mean(binding.scope, read)
        return f"macro {binding.scope} is set but nothing reads it.{hint}"
    if binding.selector not in {selector for _, selector in calls}:
        used = [
            other.spelling.split(".")[-1]
            for other in parsed.bindings
            if (other.scope, other.selector) in calls and other.selector != MACRO
        ]
        hint = gin_statements.did_you_mean(binding.spelling.split(".")[-1], used)
        return gin_statements.unreferred(binding.spelling, hint)
    opened = {outer for scope, _ in calls for outer in _outer_scopes(scope)} - {""}
    if binding.scope not in opened:
        hint = gin_statements.did_you_mean(binding.scope, opened)
        return f"no reference @{binding.scope}/... opens scope {binding.scope}.{hint}"
    return f"nothing calls {binding.spelling} in scope {binding.scope}"


def _refuse_missing_values(parsed: _Parsed) -> None:
    missing = []
    for binding in parsed.final.values():
        constants = (ref for ref in gin_statements.references(binding.value) if ref.evaluate)
        if any(ref.config_key == ("gin.REQUIRED", CONSTANT) for ref in constants):
            missing.append(binding)
    if missing:
        raise errors.UserError("; ".join(_explain_missing(binding) for binding in missing))


def _explain_missing(binding: Binding) -> str:
    name = binding.spelling
    if binding.selector != MACRO:
        scoped = f"{binding.scope}/{name}" if binding.scope else name
        name = f"{scoped}.{binding.parameter}"
    is_text = re.search(r"(?i)(dir|path|file|name)$", name)
    value = "\"'...'\"" if is_text else "..."
    return f"{name} must be set: add --gin.{name}={value} (required by {binding.where})"


class _Writer:
    """Writes bindings as the text of a gin file: imports, macros, then a block per configurable."""

    def __init__(self, parsed: _Parsed):
        self._sources = parsed.configurables.sources
        self._root = parsed.root
        modules = dict(parsed.configurables.modules)
        for source in self._sources.values():
            modules.setdefault(source.module, source.module.split(".")[-1])
        self._names: dict[str, str] = {}
        taken = {"gin"}
        for module, name in modules.items():
            unique, count = name, 1
            while unique in taken:
                count += 1
                unique = f"{name}{count}"
            taken.add(unique)
            self._names[module] = unique

    def write(self, bindings: Iterable[Binding], keep_scopes: Set[str]) -> str:
        """Returns the text, the root's block first.

        Args:
            bindings: all of them, none overridden.
            keep_scopes: selectors for which a scope must stand even where all their scopes agree.
        """
        macros, bodies = [], {}
        for (scope, selector), group in _by_call(bindings).items():
            if selector == MACRO:
                macros.append(self._assign(scope, group[0].value))
            else:
                lines = sorted(self._assign(b.parameter, b.value, "    ") for b in group)
                bodies.setdefault(selector, {})[scope] = "\n".join(lines)
        blocks = []
        for selector, by_scope in bodies.items():
            if selector not in keep_scopes and len(set(by_scope.values())) == 1:
                by_scope = {"": next(iter(by_scope.values()))}
            for scope, body in by_scope.items():
                name = f"{scope}/{self._name(selector)}" if scope else self._name(selector)
                blocks.append((selector != self._root, f"{name}:\n{body}"))
        imports = [self._import(module) for module in sorted(self._names)]
        header = "\n".join(["from __gin__ import dynamic_registration", *imports])
        sections = [header, "\n".join(sorted(macros)), *(text for _, text in sorted(blocks))]
        return "\n\n".join(section for section in sections if section) + "\n"

    def _import(self, module: str) -> str:
        parent, _, leaf = module.rpartition(".")
        statement = f"from {parent} import {leaf}" if parent else f"import {leaf}"
        name = self._names[module]
        return statement if name == leaf else f"{statement} as {name}"

    def _name(self, selector: str) -> str:
        source = self._sources.get(selector)
        return f"{self._names[source.module]}.{source.attributes}" if source else selector

    def _assign(self, name: str, value: Any, indent: str = "") -> str:
        start = f"{indent}{name} = "
        return start + self._value(value, indent, len(start))

    def _value(self, value: Any, indent: str, used: int) -> str:
        """Writes a literal or reference; what does not fit the line gets a line per item."""
        if isinstance(value, config.ConfigurableReference):
            return self._reference(value)
        opening, closing = {dict: "{}", list: "[]", tuple: "()"}.get(type(value), ("", ""))
        if not (opening and value):
            return repr(value)
        deeper = indent + "    "
        if isinstance(value, dict):
            keys = [self._value(key, deeper, 0) for key in value]
            items = [
                f"{key}: {self._value(item, deeper, len(deeper) + len(key) + 2)}"
                for key, item in zip(keys, value.values(), strict=True)
            ]
        else:
            items = [self._value(item, deeper, len(deeper)) for item in value]
        comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
        line = f"{opening}{', '.join(items)}{comma}{closing}"
        if "\n" not in line and used + len(line) <= _LINE_LENGTH:
            return line
        return "\n".join([opening, *(f"{deeper}{item}," for item in items), indent + closing])

    def _reference(self, reference: config.ConfigurableReference) -> str:
        scope, selector = reference.config_key
        if selector in (MACRO, CONSTANT) and reference.evaluate:
            return f"%{scope}"
        name = "/".join([*reference.scopes, self._name(selector)])
        return f"@{name}()" if reference.evaluate else f"@{name}"


def build_arguments(root: str) -> dict[str, Any]:
    """Builds what `root` would be called with, without calling it.

    Doors other than training use the objects that a training configuration describes.
    """
    with errors_as_raised():
        return gin.get_bindings(_root_source(root).target, resolve_references=True)
