"""Gin files and command-line bindings as bindings that know where they were written.

Gin's own parser reads the text; what is added here is what gin forgets or says in several lines:
the file and line of every binding, the names its file imported, and errors that name the nearest
existing thing.
"""

import dataclasses
import difflib
import importlib
import inspect
import os
import pkgutil
import re
import tokenize
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import gin
from etils import epath
from gin import config, config_parser

from clipa_t5x import errors

MACRO = "gin.macro"
CONSTANT = "gin.constant"
_BUILT_IN = (MACRO, CONSTANT, "gin.singleton")


class Where(NamedTuple):
    """The place of a statement: `gin/shapes_stage1.gin:7`, or `--gin.LEARNING_RATE`."""

    text: str
    on_command_line: bool = False

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/selector` or, evaluated, `@scope/selector()`, as it was spelled."""

    scope: str
    selector: str
    evaluate: bool


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%name`, as it was spelled; constants such as `%gin.REQUIRED` look the same."""

    name: str


class Source(NamedTuple):
    """A configurable, and how a gin file can reach it: import `module`, then `attributes`."""

    target: Any
    module: str
    attributes: str


class Statement(NamedTuple):
    """One import or binding as it was read."""

    content: config_parser.ImportStatement | config_parser.BindingStatement
    where: Where
    imports: "ImportTable"


class Binding(NamedTuple):
    """`scope/configurable.parameter = value`; a macro is the parameter `value` of its own scope.

    Attributes:
        scope: outer to inner, joined by `/`.
        selector: the configurable's full name in gin's registry.
        parameter: of that configurable.
        value: a literal, with gin's `ConfigurableReference` where the text held `@` or `%`.
        where: the place.
        spelling: the configurable or macro as the user wrote it.
    """

    scope: str
    selector: str
    parameter: str
    value: Any
    where: Where
    spelling: str


def user_error(where: Where | str, fact: str) -> errors.UserError:
    """Returns an error of one line, led by the place when there is one."""
    text = f"{where}: {fact}" if where else fact
    return errors.UserError(" ".join(text.split()))


def leaves(value: Any) -> Iterator[Any]:
    """Yields what is no container at any depth of `value`, dictionary keys included."""
    if isinstance(value, dict | list | tuple):
        for item in value.items() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def references(value: Any) -> Iterator[config.ConfigurableReference]:
    """Yields the references at any depth of `value`, dictionary keys included."""
    return (leaf for leaf in leaves(value) if isinstance(leaf, config.ConfigurableReference))


def unreferred(spelling: str, hint: str) -> str:
    """What is to be said of a configurable that nothing calls."""
    if spelling == "schedule.Schedule":
        return (
            "this is a schedule of several stages, for `clipa_t5x schedule`: give the file of one "
            "stage, such as gin/digits_stage1.gin, or the config.gin in its MODEL_DIR."
        )
    return f"{spelling} is configured but nothing refers to it.{hint}"


def macros_read(values: Iterable[Any]) -> set[str]:
    """Returns the names of the macros that values read, at any depth."""
    keys = (reference.config_key for value in values for reference in references(value))
    return {name for name, selector in keys if selector == MACRO}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean X?` for the known name nearest to `name`, or nothing."""
    candidates = sorted(set(known) - {name})
    by_lower_case = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name, candidates, n=1) or [
        by_lower_case[match]
        for match in difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    ]
    return f" Did you mean {close[0]}?" if close else ""


class ImportTable:
    """The names that the import statements of one gin file bind.

    Attributes:
        dynamic: whether the file asked for gin's dynamic registration.
        statements: the import statement behind each bound name.
    """

    def __init__(self):
        self.dynamic = False
        self.statements: dict[str, config_parser.ImportStatement] = {}
        self._modules: dict[str, types.ModuleType] = {}

    def add(self, statement: config_parser.ImportStatement, where: Where) -> None:
        """Executes an import statement.

        Raises:
            UserError: the module does not exist, or something it imports does not.
        """
        if statement.is_from and statement.module.startswith("__gin__."):
            feature = statement.module.removeprefix("__gin__.")
            if feature != "dynamic_registration":
                hint = did_you_mean(feature, ["dynamic_registration"])
                raise user_error(where, f"gin has no feature {feature}.{hint}")
            if self.statements:
                raise user_error(where, "dynamic_registration must come before other imports")
            self.dynamic = True
            return
        name = statement.bound_name()
        if name == "gin":
            raise user_error(where, f"`{statement.format()}` hides gin itself: add `as NAME`")
        try:
            module = importlib.import_module(statement.module)
        except ImportError as error:
            raise user_error(where, _explain_import(statement.module, error)) from error
        if not (statement.is_from or statement.alias):
            module = importlib.import_module(name)
        self.statements[name] = statement
        self._modules[name] = module

    def resolve(self, selector: str, where: Where) -> Source:
        """Returns what the dotted `selector` names under these imports.

        Raises:
            UserError: its first part was not imported, or an attribute does not exist.
        """
        first, *rest = selector.split(".")
        if first not in self._modules:
            hint = did_you_mean(first, self._modules)
            raise user_error(where, f"{first} (in {selector}) is not imported in this file.{hint}")
        owner_class, target = False, self._modules[first]
        for depth, attribute in enumerate(rest):
            if not hasattr(target, attribute):
                owner = ".".join([first, *rest[:depth]])
                names = [name for name in dir(target) if not name.startswith("_")]
                hint = did_you_mean(attribute, names)
                raise user_error(where, f"{owner} has no attribute {attribute}.{hint}")
            owner_class, target = inspect.isclass(target), getattr(target, attribute)
        if not callable(target):
            raise user_error(where, f"{selector} is not a function or a class")
        if owner_class and inspect.isfunction(target):
            raise user_error(where, f"{selector} is a method: only a class or function will do")
        return Source(target, *self._anchor(first, rest))

    def _anchor(self, first: str, rest: Sequence[str]) -> tuple[str, str]:
        """Returns the module to import and the attributes below it."""
        statement = self.statements[first]
        if statement.is_from or statement.alias:
            return statement.module, ".".join(rest)
        module = [first]
        for part, attribute in zip(statement.module.split(".")[1:], rest[:-1], strict=False):
            if part != attribute:
                break
            module.append(part)
        return ".".join(module), ".".join(rest[len(module) - 1 :])


def _explain_import(module: str, error: ImportError) -> str:
    """Returns why `module` cannot be imported: a name that is wrong, or a failure inside."""
    missing = error.name or ""
    if not isinstance(error, ModuleNotFoundError) or not f"{module}.".startswith(f"{missing}."):
        return f"importing {module} failed: {error}"
    parent, _, leaf = missing.rpartition(".")
    if not parent:
        return f"there is no module {missing}.{did_you_mean(leaf, _top_level_modules())}"
    # The parent was imported on the way to the missing module, so its path is known.
    paths = getattr(importlib.import_module(parent), "__path__", [])
    names = [info.name for info in pkgutil.iter_modules(paths)]
    return f"there is no module {leaf} in {parent}.{did_you_mean(leaf, names)}"


def _top_level_modules() -> list[str]:
    return [info.name for info in pkgutil.iter_modules()]


def read(
    gin_files: Sequence[str], gin_bindings: Sequence[str], search_paths: Sequence[str]
) -> Iterator[Statement]:
    """Yields every statement of the files, includes followed, and then of the bindings.

    A relative file or include is looked for in the current directory first and then in each search
    path in turn, never beside the including file: gin's rule.

    Args:
        gin_files: paths, local or of any file system that `etils.epath` knows.
        gin_bindings: `NAME = VALUE`, one statement each.
        search_paths: directories.

    Raises:
        UserError: a file does not exist or includes itself, or a statement cannot be read.
    """
    for gin_file in gin_files:
        yield from _read_file(gin_file, search_paths, f"gin file {gin_file}", ())
    imports = ImportTable()
    for binding in gin_bindings:
        where = Where(f"--gin.{binding.partition('=')[0].strip()}", on_command_line=True)
        try:
            for statement in config_parser.ConfigParser(binding, _Delegate()):
                if isinstance(statement, config_parser.IncludeStatement):
                    yield from _read_file(statement.filename, search_paths, str(where), ())
                elif not isinstance(statement, config_parser.BlockDeclaration):
                    yield Statement(statement, where, imports)
        except (SyntaxError, tokenize.TokenError) as error:
            raise _explain_binding(binding, where) from error


class _Delegate(config_parser.ParserDelegate):
    """Keeps references as they were spelled: what they mean depends on the import table."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        scope, _, selector = scoped_configurable_name.rpartition("/")
        return Reference(scope, selector, evaluate)

    def macro(self, macro_name):
        return Macro(macro_name)


def sets_macro(name: str, files: Sequence[str], search_paths: Sequence[str]) -> bool:
    """Whether a file, or one that it includes, sets a macro.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    contents = (statement.content for statement in read(files, [], search_paths))
    return any(getattr(content, "selector", None) == name for content in contents)


def _read_file(
    name: str, search_paths: Sequence[str], asked_by: str, including: tuple[str, ...]
) -> Iterator[Statement]:
    path = _find(name, search_paths, asked_by)
    if path in including:
        raise user_error(asked_by, f"{path} includes itself, by way of {including[-1]}")
    try:
        text = epath.Path(path).read_text()
    except UnicodeDecodeError as error:
        raise user_error(asked_by, f"{path} is not a text file") from error
    imports = ImportTable()
    try:
        for statement in config_parser.ConfigParser(text, _Delegate()):
            where = Where(f"{path}:{statement.location.line_num}")
            if isinstance(statement, config_parser.IncludeStatement):
                include = f"{where}: include '{statement.filename}'"
                yield from _read_file(statement.filename, search_paths, include, (*including, path))
            elif not isinstance(statement, config_parser.BlockDeclaration):
                yield Statement(statement, where, imports)
    except (SyntaxError, tokenize.TokenError) as error:
        raise _explain_syntax(path, error) from error


def _find(name: str, search_paths: Sequence[str], asked_by: str) -> str:
    """Returns the first existing file of that name, the current directory before all others."""
    anchored = os.path.isabs(name) or "://" in name
    prefixes = [""] if anchored else ["", *search_paths]
    for prefix in prefixes:
        path = os.path.join(prefix, name)
        if epath.Path(path).is_file():
            return path
    if anchored:
        raise user_error("", f"{asked_by} does not exist")
    siblings = {}
    for prefix in prefixes:
        folder = epath.Path(os.path.join(prefix, os.path.dirname(name)) or ".")
        for path in folder.glob("*.gin"):
            siblings[os.path.join(os.path.dirname(name), path.name)] = path
    looked = ", ".join(prefix or "the current directory" for prefix in prefixes)
    raise user_error("", f"{asked_by} does not exist in {looked}.{did_you_mean(name, siblings)}")


def _explain_syntax(path: str, error: SyntaxError | tokenize.TokenError) -> errors.UserError:
    """Returns gin's or the tokenizer's complaint as one line."""
    if isinstance(error, SyntaxError):
        line, text = error.lineno, f" `{error.text.strip()}`" if error.text else ""
        fact = str(error.msg).splitlines()[-1].strip(" .")
    else:
        fact, (line, _) = error.args
        text = ""
    hint = ": a string needs quotes" if "parse token" in fact else ""
    return user_error(f"{path}:{line}", f"cannot read{text} as gin ({fact}{hint})")


def _explain_binding(binding: str, where: Where) -> errors.UserError:
    """Returns what is wrong with one command-line binding, most often the quotes of a string."""
    name, equals, value = (part.strip() for part in binding.partition("="))
    if not equals or not value:
        return user_error(where, f"a value is missing: --gin.{name or 'NAME'}=VALUE")
    if value.lower() in ("true", "false", "none"):
        return user_error(where, f"{value} is not a value: write --gin.{name}={value.capitalize()}")
    if re.match(r"[\w/.~$-]", value) and not _is_value(value):
        remedy = f"strings need inner quotes: --gin.{name}=\"'{value}'\""
        return user_error(where, f"{value} is not a value; {remedy}")
    return user_error(where, f"cannot read `{binding}` as gin")


def _is_value(text: str) -> bool:
    try:
        list(config_parser.ConfigParser(f"X = {text}", _Delegate()))
    except (SyntaxError, tokenize.TokenError):
        return False
    return True


class Configurables:
    """What the statements of one configuration mention: registers it, and knows its names.

    Attributes:
        sources: how each registered selector is reached by import.
        modules: every imported module and the name it was first bound to, in order.
    """

    def __init__(self):
        self.sources: dict[str, Source] = {}
        self.modules: dict[str, str] = {}
        self._spellings: dict[str, set[str]] = {}
        self._tables: list[ImportTable] = []

    def register(self, source: Source, spelling: str) -> str:
        """Makes `source` known to gin, once per Python object, and returns its selector."""
        *path, name = source.attributes.split(".")
        module = ".".join([source.module, *path])
        known = config._inverse_lookup(source.target)
        if known is None:
            # Interactive mode lets a reloaded module take the place of its former self.
            with config.interactive_mode():
                gin.external_configurable(source.target, name=name, module=module)
        selector = known.selector if known else f"{module}.{name}"
        self.sources.setdefault(selector, source)
        for known_as in (spelling, f"{module}.{name}"):
            self._spellings.setdefault(known_as, set()).add(selector)
        return selector

    def execute(self, statement: Statement) -> Binding | None:
        """Executes an import, or registers what a binding mentions and returns the binding.

        Raises:
            UserError: a module, a configurable or a parameter does not exist.
        """
        content, where, imports = statement
        if isinstance(content, config_parser.ImportStatement):
            self._import(content, where, imports)
            return None
        value = self._with_references(content.value, imports, where)
        scope, selector, parameter = content.scope, content.selector, content.arg_name
        if not parameter:
            name = f"{scope}/{selector}" if scope else selector
            return Binding(name, MACRO, "value", value, where, name)
        registered = self._find(selector, imports, where)
        known = _parameters(registered)
        if known is not None and parameter not in known:
            hint = did_you_mean(parameter, known)
            raise user_error(where, f"{selector} has no parameter {parameter}.{hint}")
        return Binding(scope, registered, parameter, value, where, selector)

    def _import(
        self, content: config_parser.ImportStatement, where: Where, imports: ImportTable
    ) -> None:
        imports.add(content, where)
        if content.module.startswith("__gin__."):
            return
        if imports not in self._tables:
            self._tables.append(imports)
        dotted = not (content.is_from or content.alias)
        name = content.module.split(".")[-1] if dotted else content.bound_name()
        self.modules.setdefault(content.module, name)

    def _with_references(self, value: Any, imports: ImportTable, where: Where) -> Any:
        if isinstance(value, dict):
            items = [self._with_references(item, imports, where) for item in value.items()]
            return dict(items)
        if isinstance(value, list | tuple):
            return type(value)(self._with_references(item, imports, where) for item in value)
        if isinstance(value, Macro):
            return config.ParserDelegate().macro(value.name)
        if isinstance(value, Reference):
            selector = self._find(value.selector, imports, where)
            scoped = f"{value.scope}/{selector}" if value.scope else selector
            return config.ConfigurableReference(scoped, value.evaluate)
        return value

    def _find(self, selector: str, imports: ImportTable, where: Where) -> str:
        """Returns the registered selector of what is spelled `selector` at this place."""
        if selector in _BUILT_IN:
            return selector
        if imports.dynamic:
            return self.register(imports.resolve(selector, where), selector)
        matches = self._mentioned(selector) or self._importable(selector, where)
        if not matches:
            names = {*self._spellings, *(name.split(".")[-1] for name in self._spellings)}
            raise user_error(
                where, f"no gin file mentions {selector}.{did_you_mean(selector, names)}"
            )
        if len(matches) > 1:
            raise user_error(
                where, f"{selector} is ambiguous: write {' or '.join(sorted(matches))}"
            )
        return matches.pop()

    def _mentioned(self, selector: str) -> set[str]:
        """Returns what some statement mentioned under this name or one that it ends."""
        if selector in self._spellings:
            return set(self._spellings[selector])
        ends = [spelling for spelling in self._spellings if spelling.endswith(f".{selector}")]
        return {registered for spelling in ends for registered in self._spellings[spelling]}

    def _importable(self, selector: str, where: Where) -> set[str]:
        """Returns what the names that any file imported give access to."""
        first = selector.split(".")[0]
        tables = [table for table in self._tables if first in table.statements]
        distinct = {table.statements[first].module: table for table in tables}
        return {
            self.register(table.resolve(selector, where), selector) for table in distinct.values()
        }


def _parameters(selector: str) -> list[str] | None:
    """Returns the parameter names of a registered configurable, or None if it takes any."""
    try:
        signature = inspect.signature(config._REGISTRY[selector].wrapped)
    except (TypeError, ValueError):
        return None
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    return None if inspect.Parameter.VAR_KEYWORD in kinds else list(signature.parameters)
