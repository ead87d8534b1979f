"""What a run wrote about itself: metrics, stage facts, configuration, retrieval gallery.

A *run* is a model directory with a `metrics.jsonl`; a *schedule* is a model directory whose
`schedule.json` lists the sub-directories of its stages, each of them a run. `load` reads either. A
run may still be going on, and may have been killed in the middle of a line and resumed from an
earlier step, so nothing but the directory and one `metrics.jsonl` is taken for granted. Standard
library only: a history can be read where JAX is not installed.
"""

import base64
import bisect
import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from clipa_t5x import errors, evaluation_records, run_tables, wall_time

METRICS_FILE = "metrics.jsonl"
STAGE_FILE = "stage.json"
SCHEDULE_FILE = "schedule.json"
CONFIG_FILE = "config.gin"
MODEL_INFO_FILE = "model-info.txt"
GALLERY_FILE = "gallery.json"

TRAIN_GROUP = "train"
TRAINING_EVAL = "training_eval/"
INFERENCE_EVAL = "inference_eval/"

# What curves run over, as pages name it.
SAMPLES = "samples"
FLOPS = "training FLOPs"
STEPS = "steps"


@dataclasses.dataclass(frozen=True)
class Record:
    """One line of `metrics.jsonl`: the values of one group at one step.

    Attributes:
        step: Step within the stage.
        time: Unix time in seconds, NaN when the line had none.
        values: Metric name to value; NaN and infinities are kept.
    """

    step: int
    time: float
    values: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class GalleryImage:
    """One retrieved image: its data URI if PNG or JPEG, similarity, caption, correctness."""

    source: str | None
    score: float | None
    caption: str
    match: bool


@dataclasses.dataclass(frozen=True)
class GalleryItem:
    """A test caption and the images that it retrieved, best first."""

    caption: str
    results: tuple[GalleryImage, ...]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run: its records by group, and the files beside them.

    Attributes:
        name: Its directory's.
        directory: Where it was read from.
        info: `stage.json` as it stands; read it by `number` and `text`, which bear missing fields.
        records: Group to its records, by ascending step, one for each step.
        config: Text of `config.gin`, empty when absent.
        model_info: Text of `model-info.txt`, empty when absent.
        gallery: Retrieval examples, empty when absent.
        sharding: How its parameters lay on the devices; None when absent.
        confusions: The worst classes of its evaluations.
        time_spent: Where its time went, over all its starts; None when it was not recorded.
        problems: What could not be read, one sentence each.
    """

    name: str
    directory: pathlib.Path
    info: Mapping[str, Any]
    records: Mapping[str, tuple[Record, ...]]
    config: str = ""
    model_info: str = ""
    gallery: tuple[GalleryItem, ...] = ()
    sharding: run_tables.Sharding | None = None
    confusions: tuple[run_tables.Confusion, ...] = ()
    time_spent: wall_time.Summary | None = None
    problems: tuple[str, ...] = ()

    def number(self, field: str) -> float | None:
        """Returns a finite number of `stage.json`, or None when it is missing or something else."""
        value = self.info.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        # An integer may be too large for a float.
        number = _to_float(value)
        return value if number is not None and math.isfinite(number) else None

    def text(self, field: str) -> str | None:
        """Returns a non-empty string of `stage.json`, or None."""
        value = self.info.get(field)
        return value if isinstance(value, str) and value else None

    def points(self, group: str, value: str) -> list[tuple[int, float]]:
        """Returns (step, value) for every record of the group that has the value."""
        records = self.records.get(group, ())
        return [(r.step, r.values[value]) for r in records if value in r.values]

    @property
    def flops_per_example(self) -> float | None:
        """Training FLOPs of one example, None when the run does not tell."""
        value = self.number("train_flops_per_example")
        return value if value is not None and value > 0 else None

    def position(self, step: int, axis: str) -> float:
        """Where a step lies from the beginning of this stage, on one of a history's `axes`."""
        if axis == STEPS:
            return float(step)
        samples = float(self.samples_at(step) or 0)
        return samples * (self.flops_per_example or 0) if axis == FLOPS else samples

    @functools.cached_property
    def last_step(self) -> int | None:
        """The greatest step of any record, or None before the first."""
        return max((r[-1].step for r in self.records.values() if r), default=None)

    @functools.cached_property
    def _logged_samples(self) -> list[tuple[int, float]]:
        points = self.points(TRAIN_GROUP, "samples")
        return [(step, samples) for step, samples in points if math.isfinite(samples)]

    def samples_at(self, step: int) -> float | None:
        """Returns the samples that this stage had seen at a step, None when nothing tells it.

        Evaluations do not log samples: theirs lie on the line through the neighbouring train
        records, or on steps x batch size where there are none.
        """
        logged, batch_size = self._logged_samples, self.number("batch_size")
        if not logged:
            return None if batch_size is None else step * batch_size
        at = bisect.bisect_left(logged, (step, -math.inf))
        if at < len(logged) and logged[at][0] == step:
            return logged[at][1]
        if 0 < at < len(logged):
            (step0, samples0), (step1, samples1) = logged[at - 1], logged[at]
            return samples0 + (samples1 - samples0) * (step - step0) / (step1 - step0)
        near_step, near_samples = logged[0] if at == 0 else logged[-1]
        slope = batch_size if batch_size is not None else logged[-1][1] / max(logged[-1][0], 1)
        return max(near_samples + (step - near_step) * slope, 0)


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """All stages of a model directory, in order; a lone run is a history of one stage."""

    name: str
    directory: pathlib.Path
    stages: tuple[Stage, ...]

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """What curves can run over, the usual one first.

        `SAMPLES`, and `FLOPS` where every stage tells those of an example; `STEPS` alone when a
        stage does not tell its samples.
        """
        begun = [stage for stage in self.stages if stage.last_step is not None]
        if any(stage.samples_at(stage.last_step or 0) is None for stage in begun):
            return (STEPS,)
        has_flops = all(stage.flops_per_example is not None for stage in begun)
        return (SAMPLES, FLOPS) if begun and has_flops else (SAMPLES,)

    def spans(self, axis: str) -> tuple[tuple[float, float], ...]:
        """(start, end) of every stage on a cumulative axis; a stage not begun is empty."""
        spans, start = [], 0.0
        for stage in self.stages:
            end = start + stage.position(stage.last_step or 0, axis)
            spans.append((start, end))
            start = end
        return tuple(spans)

    def curve(self, group: str, value: str, axis: str) -> list[list[tuple[float, float]]]:
        """Returns, for every stage, (position on the cumulative axis, value) by ascending step."""
        return [
            [(start + stage.position(step, axis), y) for step, y in stage.points(group, value)]
            for stage, (start, _) in zip(self.stages, self.spans(axis), strict=True)
        ]

    def groups(self, kind: str) -> list[str]:
        """Returns names of the groups that begin with `kind`, in order of appearance."""
        found = (group for stage in self.stages for group in stage.records)
        return list(dict.fromkeys(group for group in found if group.startswith(kind)))

    def value_names(self, group: str) -> list[str]:
        """Returns names of the values of a group, in order of appearance."""
        records = (record for stage in self.stages for record in stage.records.get(group, ()))
        return list(dict.fromkeys(name for record in records for name in record.values))

    def group_names(self, prefix: str, value: str) -> list[str]:
        """Returns names of groups with this prefix (cut off) and value, in order of appearance."""
        return list(
            dict.fromkeys(
                group.removeprefix(prefix)
                for stage in self.stages
                for group in stage.records
                if group.startswith(prefix) and stage.points(group, value)
            )
        )


def common_axes(histories: Iterable[RunHistory]) -> tuple[str, ...]:
    """Returns what curves of all these runs can run over, the usual one first; never nothing."""
    shared = [set(history.axes) for history in histories]
    axes = tuple(axis for axis in (SAMPLES, FLOPS) if all(axis in each for each in shared))
    return axes or (STEPS,)


def load(model_dir: str | os.PathLike[str]) -> RunHistory:
    """Reads a run or a schedule of runs.

    Args:
        model_dir: A local directory with `metrics.jsonl`, or with `schedule.json` and its stages.

    Returns:
        The history; stages that have not begun are in it, without records.

    Raises:
        errors.UserError: There is no such directory, no `metrics.jsonl` in it or its stages, or
            its `schedule.json` is not a list of sub-directories.
    """
    where = os.fspath(model_dir)
    if "://" in where:
        raise errors.UserError(
            f"model directory '{where}' is not a local path: copy its small files (*.json, "
            "*.jsonl, *.gin, *.txt) here and name that copy"
        )
    directory = pathlib.Path(where)
    if not directory.is_dir():
        raise errors.UserError(f"model directory '{where}' does not exist: name the MODEL_DIR")
    is_schedule = (directory / SCHEDULE_FILE).is_file()
    folders = stage_folders(directory) if is_schedule else [directory]
    if not any((folder / METRICS_FILE).is_file() for folder in folders):
        raise errors.UserError(
            f"no {METRICS_FILE} in '{where}' nor in stages of a {SCHEDULE_FILE} there: it is not "
            "the MODEL_DIR of a run, or its training has not logged yet"
        )
    stages = tuple(load_stage(folder) for folder in folders)
    return RunHistory(name=directory.resolve().name, directory=directory, stages=stages)


def stage_folders(directory: pathlib.Path) -> list[pathlib.Path]:
    """The model directories of a schedule's stages, whether they are there or not.

    Raises:
        errors.UserError: its `schedule.json` is not a list of sub-directories.
    """
    return [directory / name for name in _stage_names(directory / SCHEDULE_FILE)]


def _stage_names(path: pathlib.Path) -> list[str]:
    try:
        schedule = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        raise errors.UserError(f"'{path}' is not JSON ({error}): write it anew") from error
    names = schedule.get("stages") if isinstance(schedule, dict) else None
    # A name is one path component, lest a report quote files from outside its own run.
    if not (
        isinstance(names, list)
        and names
        and all(isinstance(name, str) and _is_component(name) for name in names)
    ):
        raise errors.UserError(
            f"'{path}' has stages {names!r}: write {{\"stages\": [names of sub-directories]}}"
        )
    return names


def _is_component(name: str) -> bool:
    return name not in ("", "..") and pathlib.Path(name).name == name


def load_stage(folder: pathlib.Path) -> Stage:
    """Reads what there is of a run in a directory, which may hold none of it."""
    problems: list[str] = []
    info = _read_object(folder / STAGE_FILE, problems)
    gallery = _read_object(folder / GALLERY_FILE, problems)
    return Stage(
        name=folder.resolve().name,
        directory=folder,
        info=info,
        records=_read_records(folder, problems),
        config=_read_text(folder / CONFIG_FILE),
        model_info=_read_text(folder / MODEL_INFO_FILE),
        gallery=tuple(_gallery_items(gallery)),
        sharding=run_tables.sharding(_read_object(folder / run_tables.SHARDING_FILE, problems)),
        confusions=tuple(_read_confusions(folder, problems)),
        time_spent=_read_wall_time(folder / wall_time.FILE),
        problems=tuple(problems),
    )


def _read_text(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_wall_time(path: pathlib.Path) -> wall_time.Summary | None:
    lines = wall_time.parse(_read_text(path))
    return wall_time.summarize(lines) if lines else None


def _read_confusions(folder: pathlib.Path, problems: list[str]) -> Iterator[run_tables.Confusion]:
    for path in sorted(folder.glob(run_tables.CONFUSION_FILES))[: run_tables.MAX_CONFUSIONS]:
        record = _read_object(path, problems)
        found = run_tables.confusion(record)
        if found is not None:
            yield found
        elif record:
            problems.append(f"{path.name} names no evaluation or no class and was left out")


def _read_object(path: pathlib.Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    problems.append(f"{path.name} is not a JSON object and was left out")
    return {}


def _read_records(folder: pathlib.Path, problems: list[str]) -> dict[str, tuple[Record, ...]]:
    groups: dict[str, dict[int, Record]] = {}
    _read_metrics(folder / METRICS_FILE, groups, problems)
    # Of a step that training evaluated, too, the values are the same.
    for evaluation in _evaluations(folder / evaluation_records.FOLDER):
        for group, values in evaluation.results.items():
            record = Record(evaluation.step, evaluation.time, values)
            groups.setdefault(group, {})[record.step] = record
    return {
        group: tuple(by_step[step] for step in sorted(by_step)) for group, by_step in groups.items()
    }


def _evaluations(folder: pathlib.Path) -> Iterator[evaluation_records.Evaluation]:
    paths = folder.iterdir() if folder.is_dir() else ()
    steps = {evaluation_records.step_of(path.name): path for path in paths if path.is_file()}
    for step in sorted(step for step in steps if step is not None):
        evaluation = evaluation_records.parse(_read_text(steps[step]))
        # What cannot be read is being written, or will be written anew.
        if evaluation is not None:
            yield evaluation


def _read_metrics(
    path: pathlib.Path, groups: dict[str, dict[int, Record]], problems: list[str]
) -> None:
    unreadable = 0
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    continue
                found = _parse_line(line)
                if found is not None:
                    group, record = found
                    groups.setdefault(group, {})[record.step] = record
                # A last line without its newline is a run caught in the act, not a defect.
                elif line.endswith("\n"):
                    unreadable += 1
    if unreadable:
        lines_were = "1 line was" if unreadable == 1 else f"{unreadable} lines were"
        problems.append(f"{lines_were} unreadable in {path.name} and left out")


def _parse_line(line: str) -> tuple[str, Record] | None:
    # A resumed run appends its first line to the torn one: the whole record at the end is good.
    start = line.find("{")
    while start >= 0:
        try:
            return _record(json.loads(line[start:]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            start = line.find("{", start + 1)
    return None


def _record(line: dict[str, Any]) -> tuple[str, Record]:
    group, step, values = line["group"], line["step"], line["values"]
    if not isinstance(group, str) or not isinstance(values, dict):
        raise TypeError
    numbers = {name: _to_float(value) for name, value in values.items()}
    kept = {name: number for name, number in numbers.items() if number is not None}
    time = _to_float(line.get("time"))
    return group, Record(int(step), math.nan if time is None else time, kept)


def _to_float(value: Any) -> float | None:
    if value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _gallery_items(gallery: Mapping[str, Any]) -> Iterator[GalleryItem]:
    for item in _objects(gallery.get("items")):
        results = tuple(
            GalleryImage(
                source=_data_uri(_string(result.get("image"))),
                score=_to_float(result["score"]) if "score" in result else None,
                caption=_string(result.get("caption")),
                match=result.get("match") is True,
            )
            for result in _objects(item.get("results"))
        )
        if results:
            yield GalleryItem(caption=_string(item.get("caption")), results=results)


def _data_uri(encoded: str) -> str | None:
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError:
        return None
    # The bytes tell what they are; the file's word for it would end up in an attribute.
    for kind, magic in (("png", b"\x89PNG\r\n\x1a\n"), ("jpeg", b"\xff\xd8\xff")):
        if content.startswith(magic):
            return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return None


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _objects(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
