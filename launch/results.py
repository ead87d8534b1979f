"""A table of what came of an experiment: `python -m launch.results EXPERIMENT_DIR`.

A row for every work unit: its overrides, state, steps, restarts, and the last value of every metric
that it logged. Printed, and written to the experiment's folder as `results.csv` and `results.json`.
At any time: it reads the MODEL_DIRs.
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from clipa_t5x import run_history, run_summary, wall_time
from clipa_t5x.errors import UserError
from clipa_t5x.preemption import RESTART_STATUS
from launch import job, sweep

RECORD_FILE = "experiment.json"
CSV_FILE, JSON_FILE = "results.csv", "results.json"

# Before a work unit's own columns.
_FIRST = ("work_unit",)
_THEN = ("state", "step", "total_steps", "restarts")

# What the printed table has of all metrics: more fit into no line. In files are all.
_PRINTED = {(run_history.TRAIN_GROUP, "loss"): "train loss"}
_ACCURACY = "accuracy"


@dataclasses.dataclass
class Unit:
    """What is recorded of one work unit.

    Attributes:
      name: of the work unit.
      overrides: gin names to values as they were written.
      model_dir: its MODEL_DIR.
      status: that its job ended with; None of one that runs, waits or was submitted elsewhere.
    """

    name: str
    overrides: Mapping[str, str]
    model_dir: str
    status: int | None = None


class Record:
    """An experiment's work units, in a file of its folder that is whole at any time.

    Work units of earlier sweeps in the same folder stay in it.
    """

    def __init__(self, folder: pathlib.Path, units: Sequence[Unit]):
        """Of work units by order; `write` keeps it."""
        self.folder = folder
        self._units = {unit.name: unit for unit in units}

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Record":
        """The record in a folder.

        Raises:
          UserError: there is none that can be read.
        """
        path = folder / RECORD_FILE
        try:
            units = [Unit(**each) for each in json.loads(path.read_text("utf-8"))["work_units"]]
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error.strerror}; give the folder of an experiment of "
                "launch.xm."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no record of an experiment: {error}.") from error
        return cls(folder, units)

    @classmethod
    def begin(cls, folder: pathlib.Path, units: Sequence[sweep.WorkUnit]) -> "Record":
        """Writes the work units that are to be submitted, besides those that are recorded."""
        known = cls.read(folder).units if (folder / RECORD_FILE).exists() else []
        new = [Unit(unit.name, unit.overrides, unit.spec.model_dir) for unit in units]
        record = cls(folder, [*known, *new])
        record.write()
        return record

    @property
    def units(self) -> list[Unit]:
        """All work units, the earliest first."""
        return list(self._units.values())

    def ended(self, name: str, status: int) -> None:
        """Writes that a work unit ended."""
        self._units[name].status = status
        self.write()

    def write(self) -> None:
        """Replaces the file.

        Raises:
          UserError: the folder cannot be written.
        """
        content = {"work_units": [dataclasses.asdict(unit) for unit in self.units]}
        _replace(self.folder / RECORD_FILE, json.dumps(content, indent=2) + "\n")


def _replace(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", newline="")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def row(unit: Unit) -> dict[str, Any]:
    """What came of a work unit, as plain values.

    Returns:
      `work_unit`, `overrides` (by name), `state`, `step` and `total_steps` (of the latest stage;
      None before the first), `restarts` (starts after the first that trained, over all stages),
      `metrics` ('group/name' to the last value) and `model_dir`.
    """
    try:
        history = run_history.load(unit.model_dir)
    except UserError:  # Nothing has been logged, or it is not on this machine.
        history = None
    begun = [s for s in history.stages if s.last_step is not None] if history else []
    times = [stage.time_spent for stage in begun if stage.time_spent]
    finals = run_summary.final_values(history) if history else {}
    is_done = bool(history) and all(s.info.get("completed") is True for s in history.stages)
    return {
        "work_unit": unit.name,
        "overrides": dict(unit.overrides),
        "state": _state(unit, is_done, bool(begun)),
        "step": begun[-1].last_step if begun else None,
        "total_steps": begun[-1].number("total_steps") if begun else None,
        "restarts": wall_time.total(times).restarts if times else 0,
        "metrics": {f"{group.rstrip('/')}/{name}": v for (group, name), v in finals.items()},
        "model_dir": unit.model_dir,
    }


def _state(unit: Unit, is_done: bool, is_begun: bool) -> str:
    if is_done and not unit.status:
        return "done"
    if unit.status == RESTART_STATUS:
        return "stopped"
    if unit.status:
        return f"failed ({unit.status})"
    if "://" in unit.model_dir:
        return "remote, not read"
    return "not done" if is_begun else "not begun"


def rows(record: Record) -> list[dict[str, Any]]:
    """A row of every work unit."""
    return [row(unit) for unit in record.units]


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """All columns of all rows; a column for every override and every metric that any has."""
    overrides, metrics = _names(table, "overrides"), _names(table, "metrics")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_FIRST, *overrides, *_THEN, *metrics, "model_dir"])
    for each in table:
        writer.writerow(
            [
                *(each[name] for name in _FIRST),
                *(each["overrides"].get(name, "") for name in overrides),
                *("" if each[name] is None else each[name] for name in _THEN),
                *(each["metrics"].get(name, "") for name in metrics),
                each["model_dir"],
            ]
        )
    return text.getvalue()


def as_json(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows; a value that is no finite number is null."""
    plain = [
        {
            **each,
            "metrics": {k: v if math.isfinite(v) else None for k, v in each["metrics"].items()},
        }
        for each in table
    ]
    return json.dumps({"work_units": plain}, indent=2, allow_nan=False) + "\n"


def as_text(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people, with few metrics; no final newline."""
    overrides = _names(table, "overrides")
    shown = {f"{group}/{name}": title for (group, name), title in _PRINTED.items()}
    accuracies = [
        name
        for name in _names(table, "metrics")
        if name.startswith(run_history.INFERENCE_EVAL) and name.endswith(f"/{_ACCURACY}")
    ]
    if run_summary.in_line(accuracies):
        for name in accuracies:
            middle = name.removeprefix(run_history.INFERENCE_EVAL).removesuffix(f"/{_ACCURACY}")
            shown[name] = f"top-1 {middle}"
    # A name that is its overrides says nothing beside them.
    cells = [[*(overrides or _FIRST), "state", "step", *shown.values(), "restarts"]]
    for each in table:
        names = [each["overrides"].get(name, run_summary.MISSING) for name in overrides]
        cells.append(
            [
                *(names or [each["work_unit"]]),
                each["state"],
                _steps(each),
                *(_number(each["metrics"].get(name), title) for name, title in shown.items()),
                str(each["restarts"]),
            ]
        )
    return run_summary.format_cells(cells)


def _names(table: Sequence[Mapping[str, Any]], field: str) -> list[str]:
    return list(dict.fromkeys(name for each in table for name in each[field]))


def _steps(each: Mapping[str, Any]) -> str:
    if each["step"] is None:
        return run_summary.MISSING
    return f"{each['step']} of {run_summary.format_count(each['total_steps'])}"


def _number(value: float | None, title: str) -> str:
    if value is None:
        return run_summary.MISSING
    return run_summary.format_percent(value) if title.startswith("top-1") else f"{value:.4f}"


def report(record: Record) -> str:
    """Writes the table's files and returns it as text.

    Raises:
      UserError: they cannot be written.
    """
    table = rows(record)
    _replace(record.folder / CSV_FILE, as_csv(table))
    _replace(record.folder / JSON_FILE, as_json(table))
    return as_text(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the status to end with."""
    return job.exit_status(_run, argv)


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m launch.results", description=__doc__)
    parser.add_argument("experiment_dir", type=pathlib.Path)
    print(report(Record.read(parser.parse_args(argv).experiment_dir)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
