"""What `eval --watch` found: a file for every checkpoint, `MODEL_DIR/evaluations/<step>.json`.

    {"step": 20, "time": 1.7e9, "results": {"inference_eval/digit": {"accuracy": 0.9}}}

`results` has the values of every group, as lines of `metrics.jsonl` have them. Training writes
those lines, and object stores know no appending: what another process finds goes into files of its
own, each written when all evaluations of its checkpoint are done, and again where more evaluators
are asked for. Half a file is none.

Standard library only, as `run_history` is.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping

FOLDER = "evaluations"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All evaluations of one checkpoint.

    Attributes:
      step: of the checkpoint.
      time: Unix time at which they were done.
      results: by group, the values by name.
    """

    step: int
    time: float
    results: Mapping[str, Mapping[str, float]]

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def value(self, name: str) -> float | None:
        """A value by its flat name, 'inference_eval/digit/accuracy'; None where there is none."""
        for group, values in self.results.items():
            for key, value in values.items():
                if f"{group}/{key}" == name:
                    return value
        return None


def groups_in_metrics(text: str) -> dict[int, set[str]]:
    """The groups of evaluation that the lines of a `metrics.jsonl` have, by step."""
    found: dict[int, set[str]] = {}
    for line in text.splitlines():
        if "eval/" not in line:
            continue
        # A resumed run appends its first line to one that a kill tore.
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            record = json.loads(line[line.rfind('{"step"') :])
            if record["group"].startswith(("training_eval/", "inference_eval/")):
                found.setdefault(int(record["step"]), set()).add(record["group"])
    return found


def file_name(step: int) -> str:
    """Of a checkpoint's record, relative to MODEL_DIR."""
    return f"{FOLDER}/{step}.json"


def step_of(name: str) -> int | None:
    """The step that a file of the folder is named for; None of another file."""
    match = re.fullmatch(r"(0|[1-9]\d{0,17})\.json", name)
    return int(match[1]) if match else None


def parse(text: str) -> Evaluation | None:
    """Reads a file's text; None where it is no whole record."""
    try:
        record = json.loads(text)
        step, results = record["step"], record["results"]
        if isinstance(step, bool) or not isinstance(step, int):
            return None
        read = {
            str(group): {str(name): float(value) for name, value in values.items()}
            for group, values in results.items()
        }
        return Evaluation(step, float(record["time"]), read)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
