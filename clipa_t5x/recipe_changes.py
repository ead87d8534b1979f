"""Whether a run goes on with the recipe that has trained it so far.

Every start of a run leaves its resolved configuration in MODEL_DIR, as `config.gin`. Two of them
are compared by what they set of all that shapes the trained parameters, so that places, periods,
evaluations, meshes and the like may change, and so may the way in which the same thing is said.
"""

import ast
import inspect
import itertools
import re
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath

from clipa_t5x import checkpoints, run_history
from clipa_t5x.errors import UserError

# What a recipe is, of all that the training loop takes. The rest says where, when and how fast.
ROOT = "clipa_t5x.train.train"
_PARAMETERS = (
    "model",
    "optimizer",
    "train_dataset_cfg",
    "total_steps",
    "random_seed",
    "trainer_cls",
)

# Parameters of any function that change speed, memory, places or refusals, and nothing else. Where
# data lie is free since the checkpoint knows which shards it was trained on.
FREE = frozenset(
    {
        "num_microbatches",
        "num_chunks",
        "remat_policy",
        "mesh",
        "data_dir",
        "index_dir",
        "accept_changes",
        "max_bad_fraction",
    }
)

# How many differing lines an error shows.
_SHOWN = 30

_MISSING = object()

# (scope, function, parameter), with the scope that its call is made in.
_Key = tuple[str, str, str]


class _Recipe:
    """A resolved configuration's text, read without running it.

    Attributes:
      macros: those that the recipe reads, by name.
      values: of the parameters of every call that the recipe reaches, as text.
    """

    def __init__(self, text: str):
        self._modules = _imports(text)
        self._all_macros, self._blocks = _statements(text)
        self._visited: set[tuple[str, str]] = set()
        self.macros: dict[str, str] = {}
        self.values: dict[_Key, str] = {}
        for name, parameters in self._blocks.items():
            if self._full_name(name) == ROOT:
                self._add("", name, {k: parameters[k] for k in _PARAMETERS if k in parameters})

    def _add(self, scope: str, function: str, parameters: Mapping[str, str]) -> None:
        for parameter, value in parameters.items():
            self.values[scope, function, parameter] = value
            self._follow(scope, value)

    def _follow(self, scope: str, value: str) -> None:
        """Reads the macros of a value and the calls that it refers to, which inherit `scope`."""
        for macro in re.findall(r"%([\w./]+)", value):
            if macro in self._all_macros and self._is_new(scope, f"%{macro}"):
                self.macros[macro] = self._all_macros[macro]
                self._follow(scope, self.macros[macro])
        for reference in re.findall(r"@([\w./]+)", value):
            inner, _, function = reference.rpartition("/")
            if self._is_new(inner or scope, function):
                self._add(inner or scope, function, self._parameters(inner or scope, function))

    def _is_new(self, scope: str, name: str) -> bool:
        is_new = (scope, name) not in self._visited
        self._visited.add((scope, name))
        return is_new

    def _parameters(self, scope: str, function: str) -> dict[str, str]:
        """What a call in a scope gets, the innermost of its scopes winning, but what is free."""
        scopes = itertools.accumulate(scope.split("/"), "{}/{}".format) if scope else ()
        merged: dict[str, str] = {}
        for name in (function, *(f"{each}/{function}" for each in scopes)):
            merged |= self._blocks.get(name, {})
        return {name: value for name, value in merged.items() if name not in FREE}

    def expanded(self, value: str) -> str:
        """A value with its macros replaced by theirs."""
        return re.sub(
            r"%([\w./]+)",
            lambda m: self.expanded(self.macros[m[1]]) if m[1] in self.macros else m[0],
            value,
        )

    def value(self, key: _Key) -> Any:
        """What a parameter is set to, or else its function's default; `_MISSING`: neither."""
        if key in self.values:
            return _literal(self.expanded(self.values[key]))
        is_called = any(each[:2] == key[:2] for each in self.values)
        return self._default(*key[1:]) if is_called else _MISSING

    def _default(self, function: str, parameter: str) -> Any:
        """Of modules that are loaded: a text must not make others run."""
        module, _, attribute = self._full_name(function).rpartition(".")
        found = getattr(sys.modules.get(module), attribute, None)
        try:
            default = inspect.signature(found).parameters[parameter].default  # pyright: ignore
        except (TypeError, ValueError, KeyError):
            return _MISSING
        return _MISSING if default is inspect.Parameter.empty else default

    def _full_name(self, name: str) -> str:
        module, _, attribute = name.rpartition("/")[2].partition(".")
        return f"{self._modules.get(module, module)}.{attribute}"


def _imports(text: str) -> dict[str, str]:
    """Local name -> module."""
    found = re.findall(r"^(?:from (\S+) )?import (\S+)(?: as (\S+))?$", text, flags=re.MULTILINE)
    return {name or leaf: f"{parent}.{leaf}" if parent else leaf for parent, leaf, name in found}


def _statements(text: str) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """(macros, parameters of every block); what spans several lines is joined."""
    lines: list[str] = []
    for line in text.splitlines():
        if re.match(r"(    )?[\w./]+( = |:$)", line):
            lines.append(line)
        elif lines and line.strip():
            lines[-1] += " " + line.strip()
    macros, blocks, block = {}, {}, ""
    for line in lines:
        name, equals, value = line.partition(" = ")
        if not equals:
            block = line.rstrip(":")
        elif line.startswith(" "):
            blocks.setdefault(block, {})[name.strip()] = value
        else:
            macros[name] = value
    return macros, blocks


def _literal(text: str) -> Any:
    """The value of a text; the text itself where it refers to something."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return _Text(text)


class _Text(str):
    """Something that is no literal: shown as it is."""

    __repr__ = str.__str__


def differences(before: str, after: str) -> list[str]:
    """Lines that say what two resolved configurations would train differently.

    Args:
      before: text of one, see `gin_utils.operative_config`.
      after: of the other.

    Returns:
      '- NAME = as it was' and '+ NAME = as it is', of what `changes` finds.
    """
    return [
        f"{sign} {name} = {value}"
        for name, *values in changes(before, after)
        for sign, value in zip("-+", values, strict=True)
        if value is not None
    ]


def changes(before: str, after: str) -> list[tuple[str, str | None, str | None]]:
    """What two resolved configurations would train differently.

    Returns:
      (name, as it was, as it is) of macros and of parameters of functions; None is for what one
      does not have. What one says and the other leaves to the function's default is no difference.
    """
    old, new = _Recipe(before), _Recipe(after)
    found: dict[str, tuple[Any, Any]] = {}
    for name in old.macros.keys() & new.macros.keys():
        found[name] = tuple(_literal(each.expanded(each.macros[name])) for each in (old, new))
    for key in old.values.keys() | new.values.keys():
        # Where both read the same macro, that was compared.
        if old.values.get(key) != new.values.get(key):
            scope, function, parameter = key
            name = f"{scope}/{function}.{parameter}" if scope else f"{function}.{parameter}"
            found[name] = old.value(key), new.value(key)

    def text(value: Any) -> str | None:
        return None if value is _MISSING else repr(value)

    return [
        (name, text(found[name][0]), text(found[name][1]))
        for name in sorted(found, key=lambda name: ("." in name, name))
        if found[name][0] != found[name][1]
    ]


def parameters(text: str) -> dict[str, Any]:
    """What a resolved configuration trains with, macros replaced by their values.

    Args:
      text: see `gin_utils.operative_config`.

    Returns:
      'function.parameter', after 'scope/' where it has one, to a value; what refers to something
      stays text. Empty where the text configures no training.
    """
    recipe = _Recipe(text)
    return {
        f"{scope}/{function}.{parameter}" if scope else f"{function}.{parameter}": _literal(
            recipe.expanded(value)
        )
        for (scope, function, parameter), value in recipe.values.items()
    }


def refuse(model_dir: str, recipe: str) -> None:
    """Compares a resolved configuration with the one that trained what is in `model_dir`.

    A folder without checkpoints, or without a recorded configuration, refuses nothing.

    Raises:
      UserError: they differ; the message ends with the lines that do.
    """
    recorded = epath.Path(model_dir) / run_history.CONFIG_FILE
    if not recorded.exists() or not _has_checkpoints(model_dir):
        return
    if lines := differences(recorded.read_text(), recipe):
        more = len(lines) - _SHOWN
        lines[_SHOWN:] = [f"... and {more} more"] if more > 0 else []
        text = "\n  ".join(lines)
        raise UserError(
            f"the recipe of {model_dir} has changed since it trained there (- then, + now): undo "
            f"the change, take another MODEL_DIR, or go on all the same with "
            f"--accept_recipe_changes.\n  {text}"
        )


def _has_checkpoints(model_dir: str) -> bool:
    # Complete or not: asking orbax would be a meeting of processes that may not all come here.
    name = re.compile(rf"{checkpoints.PREFIX}_\d+")
    return any(name.fullmatch(path.name) for path in epath.Path(model_dir).iterdir())
