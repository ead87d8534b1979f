"""Tables that a run left beside its metrics: how parameters are sharded, what classes are confused.

Either may have been written by a stranger: what is not as described here is left out, and sizes are
bounded. Standard library only, as `run_history` is.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

SHARDING_FILE = "sharding.json"
CONFUSION_FILES = "confusion_*.json"

# What a page has room for.
MAX_PARAMETERS = 5000
MAX_CLASSES = 50
MAX_CONFUSED_WITH = 5
MAX_CONFUSIONS = 20


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the sharding table; `shape` and `sharding` are text, as 'data, -'."""

    name: str
    shape: str
    dtype: str
    sharding: str
    bytes_per_device: int


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The mesh, as 'data=4, model=2', and what it does to every parameter."""

    mesh: str
    parameters: tuple[Parameter, ...]


@dataclasses.dataclass(frozen=True)
class ConfusedClass:
    """A class, how many of its examples were right, and what the others were taken for."""

    name: str
    examples: int
    correct: int
    confused_with: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """The worst classes of one evaluation, the worst first."""

    name: str
    num_examples: int | None
    num_classes: int | None
    accuracy: float | None
    worst: tuple[ConfusedClass, ...]


def sharding(record: Mapping[str, Any]) -> Sharding | None:
    """Reads what `model_info.sharding_record` makes; None where no row can be read."""
    rows = tuple(_parameters(record.get("parameters")))
    mesh = record.get("mesh")
    sizes = mesh.items() if isinstance(mesh, dict) else ()
    text = ", ".join(f"{axis}={size}" for axis, size in sizes if _count(size) is not None)
    return Sharding(text, rows) if rows else None


def _parameters(rows: Any) -> Iterator[Parameter]:
    for row in _objects(rows, MAX_PARAMETERS):
        shape, axes = row.get("shape"), row.get("sharding")
        name, dtype, count = row.get("parameter"), row.get("dtype"), _count(row.get("bytes"))
        if not (isinstance(name, str) and isinstance(dtype, str) and count is not None):
            continue
        if isinstance(shape, list) and isinstance(axes, list):
            sizes = " x ".join(str(size) for size in shape if _count(size) is not None)
            yield Parameter(name, sizes or "scalar", dtype, ", ".join(map(_axis, axes)), count)


def _axis(names: Any) -> str:
    """Mesh axes of one dimension: a name, several, or none."""
    if isinstance(names, list):
        return "+".join(name for name in names if isinstance(name, str)) or "-"
    return names if isinstance(names, str) else "-"


def confusion(record: Mapping[str, Any]) -> Confusion | None:
    """Reads a `confusion_<name>.json`; None where it names no evaluation or no class.

    Its form is {"name", "num_examples", "num_classes", "accuracy", "worst": [{"class", "examples",
    "correct", "confused_with": [{"class", "examples"}]}]}.
    """
    name, accuracy = record.get("name"), record.get("accuracy")
    worst = tuple(_classes(record.get("worst")))
    if not (isinstance(name, str) and worst):
        return None
    return Confusion(
        name=name,
        num_examples=_count(record.get("num_examples")),
        num_classes=_count(record.get("num_classes")),
        accuracy=_share(accuracy),
        worst=worst,
    )


def _classes(rows: Any) -> Iterator[ConfusedClass]:
    for row in _objects(rows, MAX_CLASSES):
        name, examples, correct = (row.get("class"), _count(row.get("examples")),
                                   _count(row.get("correct")))  # fmt: skip
        if isinstance(name, str) and examples and correct is not None and correct <= examples:
            others = tuple(_taken_for(row.get("confused_with")))
            yield ConfusedClass(name, examples, correct, others)


def _taken_for(rows: Any) -> Iterator[tuple[str, int]]:
    for row in _objects(rows, MAX_CONFUSED_WITH):
        name, examples = row.get("class"), _count(row.get("examples"))
        if isinstance(name, str) and examples is not None:
            yield name, examples


def _share(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= 1 else None


def _count(value: Any) -> int | None:
    """A number of things, of a size that can be one."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if is_count else None


def _objects(value: Any, limit: int) -> list[dict[str, Any]]:
    entries = value if isinstance(value, list) else []
    return [entry for entry in entries[:limit] if isinstance(entry, dict)]
