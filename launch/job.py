"""One job, whatever starts it: what is trained, on what, from where, and when it is begun again.

Every launcher takes a `JobSpec`, from flags or from a YAML file with the same names.
"""

import argparse
import dataclasses
import difflib
import pathlib
import re
import shlex
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from clipa_t5x import gin_utils, topologies
from clipa_t5x.errors import UserError

VERBS = ("train", "schedule", "eval")

# A name becomes part of file names, of resources' names and of labels; so the strictest of them.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_MOST_SECONDS = 1e9


@dataclasses.dataclass(frozen=True)
class RestartPolicy:
    """When an ended job is begun again.

    Attributes:
      max_restarts: of a job, over its whole life.
      first_delay: seconds before a restart; doubled for each one that follows a short life.
      max_delay: seconds at most.
      healthy_seconds: a start that lived so long has the next delay begin anew.
    """

    max_restarts: int = 100
    first_delay: float = 10.0
    max_delay: float = 600.0
    healthy_seconds: float = 900.0

    def delay(self, short_lives: int) -> float:
        """Seconds to wait after so many short lives in a row."""
        # Beyond this many doublings any delay is the largest one.
        return min(self.first_delay * 2.0 ** min(short_lives, 64), self.max_delay)


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """A job.

    Attributes:
      gin_file: gin files of the recipe, as the trainer's flag of the same name.
      model_dir: MODEL_DIR, a path or a bucket's address.
      name: in resources' names: small letters, digits and dashes.
      verb: of the trainer, one of `VERBS`.
      gin_bindings: 'NAME = VALUE', after all files.
      gin_search_paths: where gin files are looked for.
      arguments: further flags of the verb, such as '--watch'.
      topology: accelerators as `topologies` names them: 'v5e-256', 'gpu-h100-8', 'cpu-8'. Of a
        multislice job, those of one slice.
      num_slices: TPU slices.
      package: folder of this project that is uploaded and run; or
      image: container image that has it.
      environment: variables that the job's processes get, names to values.
      restarts: when it is begun again.
    """

    gin_file: tuple[str, ...]
    model_dir: str
    name: str = "clipa"
    verb: str = "train"
    gin_bindings: tuple[str, ...] = ()
    gin_search_paths: tuple[str, ...] = ("gin",)
    arguments: tuple[str, ...] = ()
    topology: str = "cpu-1"
    num_slices: int = 1
    package: str | None = "."
    image: str | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    restarts: RestartPolicy = RestartPolicy()

    def command(self, python: str = "python3") -> list[str]:
        """The trainer's command as a list of arguments; quoting it is left to who sends it."""
        return [
            python,
            "-m",
            f"clipa_t5x.{self.verb}",
            *(f"--gin_file={path}" for path in self.gin_file),
            f"--gin_search_paths={','.join(self.gin_search_paths)}",
            *(f"--gin_bindings={binding}" for binding in self.gin_bindings),
            f"--gin_bindings=MODEL_DIR = {self.model_dir!r}",
            *self.arguments,
        ]

    def check(self) -> None:
        """Refuses what no launcher could start.

        Raises:
          UserError: which field, its value, and what it may be.
        """
        if not self.gin_file:
            raise UserError("a job needs a recipe: give --gin_file=FILE (in YAML: gin_file).")
        if not self.model_dir:
            raise UserError("a job needs a MODEL_DIR: give --model_dir=DIR (in YAML: model_dir).")
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"name is {self.name!r}: it may have up to 40 small letters, digits and dashes, "
                "begins with a letter and ends with no dash."
            )
        if self.verb not in VERBS:
            raise UserError(f"verb is {self.verb!r}: it is one of {', '.join(VERBS)}.")
        topologies.parse(self.topology)
        if self.num_slices < 1:
            raise UserError(f"num_slices is {self.num_slices}: there is at least one.")
        if (self.package is None) == (self.image is None):
            given = f"package is {self.package!r} and image is {self.image!r}"
            raise UserError(f"{given}: give one of the two.")
        self._check_texts()

    def _check_texts(self) -> None:
        for name in ("gin_file", "model_dir", "gin_bindings", "arguments", "package", "image"):
            if "\0" in "".join(getattr(self, name) or ""):
                fact = f"{name} is {getattr(self, name)!r}"
                raise UserError(f"{fact}: no command can take a character of code 0.")
        for name, value in self.environment.items():
            if not _VARIABLE.fullmatch(name) or "\0" in value or "\n" in value:
                raise UserError(
                    f"environment has {name}={value!r}: a name is letters, digits and '_', and a "
                    "value one line."
                )

    def as_yaml(self) -> str:
        """The job as a file that `--job` reads."""
        return yaml.safe_dump(_plain(self), sort_keys=False, allow_unicode=True, width=100)


def _plain(value: Any) -> Any:
    """What YAML has words for."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def default(name: str) -> Any:
    """What a field of `JobSpec` is unless it is set."""
    return next(field.default for field in dataclasses.fields(JobSpec) if field.name == name)


def quoted(command: Sequence[str]) -> str:
    """A command as a line for a POSIX shell; the one place where anything is quoted."""
    return " ".join(map(shlex.quote, command))


def cpu_devices(count: int, given: Mapping[str, str]) -> dict[str, str]:
    """Variables by which a process sees so many virtual CPU devices, and nothing else.

    Args:
      count: of devices.
      given: variables that it gets otherwise; its XLA_FLAGS are kept.
    """
    flags = f"{given.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def exit_status(run: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """The status of a launcher: what it returns, or 2 after a user's mistake, told in one line.

    Args:
      run: is given the arguments without the program's name.
      argv: these; those of the process where None.
    """
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that a job is made of; `from_arguments` makes it."""
    add = parser.add_argument
    add("--job", metavar="FILE", help="YAML with the names of the flags; flags override it")
    add("--gin_file", action="append", help="repeatable")
    add("--gin_bindings", action="append", help="'NAME = VALUE'; --gin.NAME=VALUE is the same")
    add("--gin_search_paths", type=lambda text: text.split(","), help="comma-separated")
    add("--model_dir")
    add("--name", help="in names of resources")
    add("--verb", choices=VERBS)
    add("--arguments", action="append", help="a further flag of the verb: --arguments=--watch")
    add("--topology", help="v5e-256, gpu-h100-8, cpu-8; of a multislice job, of one slice")
    add("--num_slices", type=int)
    add("--package", help="folder of this project to upload and run")
    add("--image", help="container image that has it")
    add("--environment", action="append", metavar="NAME=VALUE", help="repeatable")
    add("--max_restarts", type=int)
    add("--dry_run", action="store_true", help="print what would be done, and do nothing")


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[JobSpec, argparse.Namespace]:
    """Parses a launcher's command line.

    Args:
      parser: to which `add_arguments` was applied.
      argv: without the program's name.

    Returns:
      The job, checked, and all arguments.

    Raises:
      UserError: the file cannot be read, or something in it or in a flag cannot be.
    """
    arguments = parser.parse_args(gin_utils.rewrite_gin_args(list(argv)))
    return from_arguments(arguments), arguments


def from_arguments(arguments: argparse.Namespace) -> JobSpec:
    """The job of parsed flags, checked; see `parse_arguments`."""
    fields = read(arguments.job) if arguments.job else {}
    for field in dataclasses.fields(JobSpec):
        value = getattr(arguments, field.name, None)
        if value is not None:
            fields[field.name] = value
    if arguments.environment is not None:
        fields["environment"] = dict(map(_variable, arguments.environment))
    if arguments.image is not None and arguments.package is None:
        fields["package"] = None
    restarts = fields.get("restarts", {})
    if arguments.max_restarts is not None and isinstance(restarts, Mapping):
        fields["restarts"] = {**restarts, "max_restarts": arguments.max_restarts}
    spec = make(fields, arguments.job or "the command line")
    spec.check()
    return spec


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--environment={text}: it takes NAME=VALUE.")
    return name, value


def read(path: str) -> dict[str, Any]:
    """The fields that a YAML file of a job sets.

    Raises:
      UserError: it cannot be read, or is no mapping.
    """
    try:
        fields = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        fact = " ".join(str(error).split())
        raise UserError(f"the job's file {path} cannot be read: {fact}.") from error
    if not isinstance(fields, dict):
        raise UserError(f"the job's file {path} is no mapping: it needs lines like 'name: value'.")
    return fields


def make(fields: Mapping[str, Any], where: str) -> JobSpec:
    """Builds a job of plain values, as YAML has them.

    Args:
      fields: by name; lists stand for tuples.
      where: they come from, for errors.

    Raises:
      UserError: a field that is none, or is not of its type.
    """
    restarts = fields.get("restarts", {})
    fields = {name: value for name, value in fields.items() if name != "restarts"}
    for name, needed in (("gin_file", ()), ("model_dir", "")):
        fields.setdefault(name, needed)
    if not isinstance(restarts, Mapping):
        raise UserError(f"restarts in {where} is {restarts!r}: it needs lines like 'name: value'.")
    policy = _build(RestartPolicy, restarts, f"restarts in {where}")
    return dataclasses.replace(_build(JobSpec, fields, where), restarts=policy)


def _build(kind: Any, fields: Mapping[str, Any], where: str) -> Any:
    known = {field.name: field.type for field in dataclasses.fields(kind)}
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}."
            raise UserError(f"{where} sets {name!r}, which is no field of a job: {hint}")
    return kind(**{name: _typed(name, known[name], value, where) for name, value in fields.items()})


def _typed(name: str, kind: Any, value: Any, where: str) -> Any:
    """A value as its field's type has it."""
    expected, convert = _KINDS.get(kind, ("a text", _text))
    converted = convert(value)
    if converted is None and not (value is None and type(None) in typing.get_args(kind)):
        raise UserError(f"{name} in {where} is {value!r}: it must be {expected}.")
    return converted


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _texts(value: Any) -> tuple[str, ...] | None:
    values = [value] if isinstance(value, str) else value
    if isinstance(values, list | tuple) and all(isinstance(each, str) for each in values):
        return tuple(values)
    return None


def _texts_by_name(value: Any) -> dict[str, str] | None:
    if isinstance(value, Mapping) and _texts([*value, *value.values()]) is not None:
        return dict(value)
    return None


def _whole(value: Any) -> int | None:
    is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if is_whole else None


def _seconds(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= _MOST_SECONDS else None


# Of a field's type: what it takes, and what makes a plain value one, or None of what is none.
_KINDS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    tuple[str, ...]: ("a text or a list of texts", _texts),
    Mapping[str, str]: ("texts by name (numbers in quotes)", _texts_by_name),
    int: ("a whole number, none below 0", _whole),
    float: (f"seconds, from 0 to {_MOST_SECONDS:g}", _seconds),
}
