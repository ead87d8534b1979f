"""Sweeps over a job: grids, zips and lists of gin overrides, each of them a work unit of its own.

    LEARNING_RATE=[1e-3, 2e-3] x TEXT_TOKENS=[8, 16, 32]       a grid: 6 work units
    EMBED_DIM=[32, 64] & BATCH_SIZE=[256, 128]                 a zip: 2 work units, in step
    {LEARNING_RATE=1e-3, WARMUP_STEPS=10} | {LEARNING_RATE=2e-3}   a list: 2 work units
    GIN_FILE=['gin/a.gin', ['gin/a.gin', 'gin/more.gin']]      over the recipe itself

`|` binds closest, then `&`, then `x`. Values are gin's: literals, and references by @ and %.
"""

import ast
import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from clipa_t5x.errors import UserError
from launch import recipe_check
from launch.job import JobSpec

# Stands for the recipe where a macro's name stands otherwise.
GIN_FILE = "GIN_FILE"

# Of a work unit without overrides.
_BASE = "base"

_NAME = re.compile(r"[A-Za-z_]\w*(?:[./][A-Za-z_]\w*)*")
_STRING = r"'''.*?'''|\"\"\".*?\"\"\"|'(?:\\.|[^'\\\n])*'|\"(?:\\.|[^\"\\\n])*\""
_QUOTED = re.compile(_STRING, re.DOTALL)
_REFERENCE = re.compile(rf"({_STRING})|@[\w./]+(?:\(\))?|%[\w./]+", re.DOTALL)
_CLOSING = {"[": "]", "(": ")", "{": "}"}

# What a folder's name may hold anywhere; a value's other characters become '-'.
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_IDENTIFIER = re.compile(r"(?!(?:True|False|None)$)[A-Za-z_][A-Za-z0-9_.]*")
_MOST_CHARACTERS = 100
_HASH_CHARACTERS = 8

# More than anybody means; a typing error makes a million of them soon.
MAX_WORK_UNITS = 1000

# Names to texts of values, in the order in which they are given.
Overrides = dict[str, str]


@dataclasses.dataclass(frozen=True)
class WorkUnit:
    """One job of a sweep.

    Attributes:
      name: of its folder under the experiment's; the same whatever else the sweep holds.
      overrides: gin names, or GIN_FILE, to values as they were written.
      spec: the job, with these overrides and a MODEL_DIR of its own.
    """

    name: str
    overrides: Overrides
    spec: JobSpec


def work_units(spec: JobSpec, sweeps: Sequence[str]) -> list[WorkUnit]:
    """The jobs of an experiment.

    Args:
      spec: what all have in common; its MODEL_DIR is the folder of theirs.
      sweeps: as the module describes them; the work units of one follow those of the other.

    Raises:
      UserError: a sweep cannot be read, sets MODEL_DIR or a name twice, or makes a work unit twice
        or too many of them.
    """
    overrides = [each for text in sweeps for each in parse(text)] or [{}]
    if len(overrides) > MAX_WORK_UNITS:
        raise UserError(
            f"--sweep makes {len(overrides)} work units: {MAX_WORK_UNITS} are the most."
        )
    units: dict[str, WorkUnit] = {}
    for each in overrides:
        unit = _work_unit(spec, each)
        if unit.name in units:
            raise UserError(f"--sweep makes the work unit {unit.name} twice: take one of them out.")
        units[unit.name] = unit
    return list(units.values())


def check(units: Sequence[WorkUnit]) -> None:
    """Refuses recipes that would not train.

    Raises:
      UserError: which work unit's, and what the trainer would refuse it for, such as a macro that
        nothing reads.
    """
    for unit in units:
        try:
            recipe_check.check_recipe(unit.spec)
        except UserError as error:
            raise UserError(f"work unit {unit.name}: {error}") from error


def parse(text: str) -> list[Overrides]:
    """The overrides of every work unit of a sweep, the last axis changing fastest.

    Raises:
      UserError: one line with the place of the mistake.
    """
    parser = _Parser(text)
    combined = parser.chain("x", lambda: parser.chain("&", parser.factor, _zip), _grid)
    if parser.peek():
        parser.refuse("'x', '&' or the end is expected")
    return combined


_Combine = Callable[["_Parser", list[Overrides], list[Overrides]], list[Overrides]]


class _Parser:
    """Reads one sweep, from left to right."""

    def __init__(self, text: str):
        self._text, self._at = text, 0

    def refuse(self, fact: str, at: int | None = None) -> NoReturn:
        """Raises a UserError about a place."""
        at = self._at if at is None else at
        rest = self._text[at : at + 24] or "the end"
        raise UserError(f"--sweep, character {at + 1} ({rest!r}): {fact}; it is {self._text!r}.")

    def peek(self) -> str:
        """The next character that is no space; '' at the end."""
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1
        return self._text[self._at : self._at + 1]

    def take(self, character: str) -> bool:
        """Whether it came next; then it is behind."""
        found = self.peek() == character
        self._at += found
        return found

    def chain(
        self, operator: str, operand: Callable[[], list[Overrides]], combine: _Combine
    ) -> list[Overrides]:
        """Operands with an operator between any two of them."""
        result = operand()
        while self.take(operator):
            result = combine(self, result, operand())
        return result

    def factor(self) -> list[Overrides]:
        """An axis, or a list of alternatives in braces."""
        if self.peek() != "{":
            name = self._name()
            return [{name: value} for value in self._axis(name)]
        alternatives = [self._alternative()]
        while self.take("|"):
            alternatives.append(self._alternative())
        return alternatives

    def _axis(self, name: str) -> list[str]:
        opening = self._at if self.peek() == "[" else None
        if not self.take("["):
            self.refuse(f"{name} needs a list of values: {name}=[1, 2]")
        values = []
        while not self.take("]"):
            values.append(self._value(name, "]", opening))
            if self.peek() != "]" and not self.take(","):
                self.refuse("',' or ']' is expected")
        if not values:
            self.refuse(f"{name} has no values", opening)
        return values

    def _alternative(self) -> Overrides:
        opening = self._at if self.peek() == "{" else None
        if not self.take("{"):
            self.refuse("'{' is expected: {A=1, B=2} | {A=3}")
        overrides: Overrides = {}
        while not self.take("}"):
            start = self._at
            name = self._name()
            if name in overrides:
                self.refuse(f"{name} is set twice", start)
            overrides[name] = self._value(name, "}", opening)
            if self.peek() != "}" and not self.take(","):
                self.refuse("',' or '}' is expected")
        if not overrides:
            self.refuse("no overrides are in the braces", opening)
        return overrides

    def _name(self) -> str:
        self.peek()
        start = self._at
        match = _NAME.match(self._text, start)
        if match is None:
            self.refuse("the name of a macro is expected: LEARNING_RATE=[1e-3, 2e-3]")
        self._at = match.end()
        if match[0] == "MODEL_DIR":
            self.refuse("MODEL_DIR is given to each work unit, and not swept over", start)
        if not self.take("="):
            self.refuse(f"'=' is expected after {match[0]}")
        return match[0]

    def _value(self, name: str, end: str, opening: int | None) -> str:
        """The text of a value, up to ',' or `end` outside of all brackets and quotes."""
        self.peek()
        start, awaited = self._at, []
        while awaited or self._text[self._at : self._at + 1] not in (",", end):
            character = self._text[self._at : self._at + 1]
            if not character:
                self.refuse("a bracket is never closed", awaited[-1][1] if awaited else opening)
            if character in "'\"":
                self._skip_string()
                continue
            if character in _CLOSING:
                awaited.append((_CLOSING[character], self._at))
            elif character in _CLOSING.values() and (not awaited or awaited.pop()[0] != character):
                self.refuse("this bracket closes none")
            self._at += 1
        value = self._text[start : self._at].strip()
        problem = _problem(name, value)
        if problem:
            self.refuse(problem, start)
        return value

    def _skip_string(self) -> None:
        match = _QUOTED.match(self._text, self._at)
        if match is None:
            self.refuse("a quote is never closed")
        self._at = match.end()


def _problem(name: str, value: str) -> str:
    """Why a text is no value for a name, or ''."""
    # A reference is a value wherever a literal is one.
    literal = _REFERENCE.sub(lambda match: match[1] or "None", value)
    try:
        parsed = ast.literal_eval(literal)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return (
            f"{value[:60]!r} is no value that gin reads: numbers, quoted text, True, False, None, "
            "lists, tuples, dicts, @references and %MACROS are"
        )
    files = parsed if isinstance(parsed, list | tuple) and parsed else [parsed]
    if name == GIN_FILE and not all(isinstance(path, str) for path in files):
        return f"{GIN_FILE} takes quoted paths, or lists of them"
    return ""


def _grid(parser: _Parser, first: list[Overrides], second: list[Overrides]) -> list[Overrides]:
    if len(first) * len(second) > MAX_WORK_UNITS:
        parser.refuse(f"it makes {len(first) * len(second)} work units: {MAX_WORK_UNITS} at most")
    return [_joined(parser, a, b) for a in first for b in second]


def _zip(parser: _Parser, first: list[Overrides], second: list[Overrides]) -> list[Overrides]:
    if len(first) != len(second):
        names = f"{', '.join(first[0])} has {len(first)} values and {', '.join(second[0])}"
        parser.refuse(f"{names} {len(second)}: '&' takes them in step, 'x' makes a grid")
    return [_joined(parser, a, b) for a, b in zip(first, second, strict=True)]


def _joined(parser: _Parser, first: Overrides, second: Overrides) -> Overrides:
    for name in first.keys() & second.keys():
        parser.refuse(f"{name} is set twice")
    return first | second


def _work_unit(spec: JobSpec, overrides: Overrides) -> WorkUnit:
    name = _folder_name(overrides)
    files = ast.literal_eval(overrides.get(GIN_FILE, repr(spec.gin_file)))
    bindings = [f"{key} = {value}" for key, value in overrides.items() if key != GIN_FILE]
    unit_spec = dataclasses.replace(
        spec,
        gin_file=(files,) if isinstance(files, str) else tuple(files),
        gin_bindings=(*spec.gin_bindings, *bindings),
        model_dir=f"{spec.model_dir.rstrip('/')}/{name}",
    )
    return WorkUnit(name, overrides, unit_spec)


def _folder_name(overrides: Overrides) -> str:
    """'LEARNING_RATE=1e-3,TEXT_TOKENS=8'; what that cannot say of values is in a hash at its end.

    The same overrides have the same name in whatever sweep, so that a longer one goes on with what
    a shorter one began.
    """
    if not overrides:
        return _BASE
    shown = {name: _shown(value) for name, value in overrides.items()}
    text = ",".join(f"{_UNSAFE.sub('-', n)}={_UNSAFE.sub('-', v)}" for n, v in shown.items())
    exact = text == ",".join(
        f"{name}={shown[name] if _is_exact(value) else ''}" for name, value in overrides.items()
    )
    if exact and len(text) <= _MOST_CHARACTERS:
        return text
    digest = hashlib.sha256(repr(list(overrides.items())).encode()).hexdigest()[:_HASH_CHARACTERS]
    return f"{text[: _MOST_CHARACTERS - _HASH_CHARACTERS - 1]}-{digest}"


def _shown(value: str) -> str:
    """A value as a name has it: a text without its quotes."""
    return value[1:-1] if _QUOTED.fullmatch(value) else value


def _is_exact(value: str) -> bool:
    """Whether no other value is shown so: 8 is, as '8' is; without its quotes 'a' is no value."""
    return not _QUOTED.fullmatch(value) or bool(_IDENTIFIER.fullmatch(value[1:-1]))
