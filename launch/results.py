"""What became of an experiment's work units: `python -m launch.results EXPERIMENT_DIR`.

A row for each: overrides, state, steps, restarts, last metrics; printed, and written as
`results.csv` and `results.json`. All is read from the MODEL_DIRs, at any time.
"""

import argparse
import csv
import dataclasses
import io
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from clipa_t5x import errors, run_history, run_summary
from launch import job, sweep

EXPERIMENT_FILE = "experiment.json"


@dataclasses.dataclass(frozen=True)
class Result:
    """A work unit, as its MODEL_DIR tells.

    Attributes:
      name: of its folder.
      overrides: names to values.
      state: 'completed', 'step 20 of 300' or 'not begun'.
      step: of its last stage; None before it has begun.
      restarts: starts after the first, in all stages.
      metrics: last values of its evaluations and of its training's loss.
    """

    name: str
    overrides: Mapping[str, str]
    state: str
    step: int | None
    restarts: int
    metrics: Mapping[str, float]


def write_experiment(folder: str, units: Sequence[sweep.WorkUnit]) -> None:
    """Writes down an experiment's work units, those of an earlier sweep in the folder included."""
    path = pathlib.Path(folder) / EXPERIMENT_FILE
    known = _experiment(folder) if path.exists() else {}
    known |= {unit.name: unit.overrides for unit in units}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"work_units": known}, indent=1) + "\n")


def _experiment(folder: str) -> dict[str, Mapping[str, str]]:
    path = pathlib.Path(folder) / EXPERIMENT_FILE
    try:
        return dict(json.loads(path.read_text())["work_units"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise errors.UserError(
            f"{path} cannot be read ({error}): name the folder of an experiment, which launch.xm "
            "was given as --model_dir."
        ) from error


def collect(folder: str) -> list[Result]:
    """Reads all work units.

    Raises:
      UserError: it is no experiment's folder.
    """
    units = _experiment(folder)
    return [_result(pathlib.Path(folder) / name, units[name]) for name in units]


def _result(folder: pathlib.Path, overrides: Mapping[str, str]) -> Result:
    try:
        history = run_history.load(folder)
    except errors.UserError:
        return Result(folder.name, overrides, "not begun", None, 0, {})
    rows = run_summary.summary_rows(history)
    is_done = all(row["completed"] for row in rows)
    begun = [row for row in rows if row["step"] is not None]
    last = begun[-1] if begun else None
    progress = run_summary.format_progress
    state = progress(last["step"], last["total_steps"]) if last else "not begun"
    restarts = sum(stage.time_spent.restarts for stage in history.stages if stage.time_spent)
    metrics = {
        f"{group}/{name}".removeprefix(run_history.INFERENCE_EVAL): value
        for (group, name), value in run_summary.final_values(history).items()
        if group.startswith(run_history.INFERENCE_EVAL)
        or (group, name) == (run_history.TRAIN_GROUP, "loss")
    }
    step = last["step"] if last else None
    return Result(
        folder.name, overrides, "completed" if is_done else state, step, restarts, metrics
    )


def cells(results: Sequence[Result]) -> list[list[str]]:
    """The table as text, headings first."""
    names = list(dict.fromkeys(name for each in results for name in each.overrides))
    metrics = list(dict.fromkeys(name for each in results for name in each.metrics))
    header = ["work unit", *names, "state", "step", "restarts", *metrics]
    rows = []
    for each in results:
        step = "" if each.step is None else str(each.step)
        values = [f"{each.metrics[m]:.4g}" if m in each.metrics else "" for m in metrics]
        chosen = [each.overrides.get(name, "") for name in names]
        rows.append([each.name, *chosen, each.state, step, str(each.restarts), *values])
    return [header, *rows]


def write(folder: str) -> str:
    """Writes `results.csv` and `results.json` into an experiment's folder; the table as text.

    Raises:
      UserError: it is no experiment's folder.
    """
    results = collect(folder)
    table = cells(results)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    (pathlib.Path(folder) / "results.csv").write_text(text.getvalue())
    records: list[Any] = [dataclasses.asdict(each) for each in results]
    (pathlib.Path(folder) / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    return run_summary.format_cells(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table: the door `python -m launch.results`."""
    return job.exit_status(_run, argv)


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m launch.results", description=__doc__)
    parser.add_argument("folder", metavar="EXPERIMENT_DIR")
    print(write(parser.parse_args(argv).folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
