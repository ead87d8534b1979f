"""The runs of a sweep over model size and tokens: what each was, and how good it became.

Models are told apart by their towers' sizes, which `config.gin` resolves; where that is missing,
by the parameters that `stage.json` counts. The tokens of a run are those of its first stage: a
schedule that begins with few and finishes with all is one run.
"""

import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from clipa_t5x import published, recipe_changes, report_plots, run_history, run_summary
from clipa_t5x.errors import UserError

# How far below a named folder runs are looked for.
_DEPTH = 4

# What a model's size is, what the tokens are, and what is to be the same of all runs, by the last
# part of a parameter's name.
_SIZES = ("width", "depth", "mlp_dim", "num_heads", "out_dim", "patch_size")
_TOKENS = ("task_feature_lengths", "mask_ratio")
_SEEDS = ("random_seed", "seed")
_DATA = ("image_text_task.name", "image_text_task.splits", "DatasetConfig.split")


@dataclasses.dataclass(frozen=True)
class Size:
    """A model's: what names it, and what tells it from others.

    Attributes:
        name: a published model's, or width x depth / patch of the image tower.
        key: every size that the towers have.
        params: number of parameters; None where no run tells it.
    """

    name: str
    key: tuple[Any, ...]
    params: int | None = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, or a schedule of runs, as a point of a sweep.

    Attributes:
        name: its directory's.
        size: of its model.
        pixels: side of the images in the first stage.
        image_tokens: patches of an image that masks leave there; None for towers without patches.
        image_area: what part of the image these show, as if it had the sweep's greatest side: the
            share of image tokens, comparable where patches differ.
        text_tokens: of a text, in the first stage.
        seed: None where the run does not tell.
        samples: seen in all stages.
        training_flops: of all stages; NaN where the run does not tell.
        accuracy: the metric at the end, in 0..1; NaN where there is none.
        examples: on how many it was measured; None where the run does not tell.
        missing: why it counts for nothing ('step 20 of 300'); empty for a completed run.
        data: what it was trained on, as far as told.
        recipe: what else it was trained with.
    """

    name: str
    size: Size
    pixels: float
    image_tokens: float | None
    image_area: float
    text_tokens: float
    seed: int | None
    samples: float
    training_flops: float
    accuracy: float
    examples: int | None
    missing: str = ""
    data: tuple[tuple[str, str], ...] = ()
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs that can be compared, by size and tokens.

    Attributes:
        runs: completed ones and others; by parameters, then falling tokens, then seed and name.
        evaluator: whose metric it is.
        metric: a share of right answers.
        others: (evaluator, metric) that the runs have, too.
        notes: what a reader should know, one sentence each.
    """

    runs: tuple[Run, ...]
    evaluator: str
    metric: str
    others: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def completed(self) -> tuple[Run, ...]:
        """Those that count."""
        return tuple(run for run in self.runs if not run.missing)


def load(
    folders: Sequence[str | os.PathLike[str]],
    metric: str = "accuracy",
    evaluator: str | None = None,
) -> Sweep:
    """Reads the runs of a sweep.

    Args:
        folders: MODEL_DIRs of runs or schedules, or folders with such at any of four depths.
        metric: of an evaluation, a share in 0..1: 'accuracy', 'recall_at_1'.
        evaluator: whose; the first that any run has the metric of where None.

    Raises:
        UserError: there are no runs, none has the metric, it is no share, they were trained on or
            measured with different data, or differ within a size in more than tokens and seed.
    """
    histories, notes = _histories(folders)
    if not histories:
        named = ", ".join(f"'{os.fspath(folder)}'" for folder in folders)
        raise UserError(
            f"no run in {named}: name MODEL_DIRs ({run_history.METRICS_FILE} or "
            f"{run_history.SCHEDULE_FILE} in them), or folders of them"
            + "".join(f"; {note.rstrip('.')}" for note in notes[:3])
        )
    found = _evaluations(histories)
    evaluator, others = _choose(found, metric, evaluator)
    greatest = max(_tokens(history)[0] for history in histories)
    runs = [_run(history, evaluator, metric, greatest) for history in histories]
    _check_shares(runs, metric)
    _check_same(runs, lambda run: run.data, "trained on different data")
    completed = [run for run in runs if not run.missing]
    _check_same(completed, lambda run: run.examples, "evaluated on different numbers of examples")
    notes += _recipe_notes(runs)
    notes += [f"{h.name}: {text}." for h in histories for s in h.stages for text in s.problems]
    return sweep(runs, evaluator, metric, others, notes)


def sweep(
    runs: Iterable[Run],
    evaluator: str,
    metric: str,
    others: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> Sweep:
    """Puts runs in order, whatever theirs was."""
    return Sweep(
        tuple(sorted(_sized(runs), key=_order)), evaluator, metric, tuple(others), tuple(notes)
    )


def from_published() -> Sweep:
    """The points of CLIPA's figure of accuracy against compute, LAION-400M, as a sweep.

    The accuracies are of ImageNet-1k's 50,000 validation images.
    """
    points = [point for point in published.POINTS if point.source == "v1 figure"]
    greatest = max(point.stages[0].pixels for point in points)
    return sweep(
        [_published_run(point, greatest) for point in points], "ImageNet-1k", "accuracy",
        notes=["Points read off the figure of accuracy against compute in: An Inverse Scaling Law "
               "for CLIP Training (Li et al., 2023)."],
    )  # fmt: skip


def _published_run(point: published.Point, greatest: int) -> Run:
    stage = point.stages[0]
    patch = published.clip_model(point.model).image_tower.patch_size
    return Run(
        name=f"{point.model} {point.recipe}",
        size=Size(point.model, (point.model,), published.num_params(point.model)),
        pixels=stage.pixels,
        image_tokens=(stage.pixels // patch) ** 2,
        image_area=(stage.pixels / greatest) ** 2,
        text_tokens=stage.text_length,
        seed=None,
        samples=sum(each.samples for each in point.stages),
        training_flops=float(point.training_flops),
        accuracy=point.accuracy / 100,
        examples=50_000,
    )


def _order(run: Run) -> tuple[Any, ...]:
    seed = -1 if run.seed is None else run.seed
    tokens = (-run.text_tokens, -run.image_area)
    return (run.size.params or 0, str(run.size.key), *tokens, seed, run.name, run.accuracy)


def _sized(runs: Iterable[Run]) -> list[Run]:
    """Runs of one size with the same parameters, and of different sizes with different names.

    Tables of positions belong to tokens: a size's parameters are those of its largest run.
    """
    runs = list(runs)
    params: dict[tuple[Any, ...], int] = {}
    keys: dict[str, set[tuple[Any, ...]]] = {}
    for run in runs:
        params[run.size.key] = max(params.get(run.size.key, 0), run.size.params or 0)
        keys.setdefault(run.size.name, set()).add(run.size.key)
    sized = []
    for run in runs:
        count, name = params[run.size.key] or None, run.size.name
        if len(keys[name]) > 1:
            rank = sorted(keys[name], key=lambda key: (params[key], str(key))).index(run.size.key)
            name += f" ({run_summary.format_compact(count)})" if count else f" ({rank + 1})"
        sized.append(dataclasses.replace(run, size=Size(name, run.size.key, count)))
    return sized


def _histories(
    folders: Sequence[str | os.PathLike[str]],
) -> tuple[list[run_history.RunHistory], list[str]]:
    """Runs that tell their tokens, each once, and notes of those that do not."""
    found: dict[pathlib.Path, run_history.RunHistory] = {}
    for folder in folders:
        path = pathlib.Path(folder)
        if not path.is_dir():
            run_history.load(folder)  # says what is wrong with it
        for each in _model_dirs(path, _DEPTH):
            found.setdefault(each.resolve(), _history(each))
    told, notes = [], []
    for history in found.values():
        if min(_tokens(history)) > 0:
            told.append(history)
        else:
            name, file = report_plots.label(history.name, 60), run_history.STAGE_FILE
            notes.append(f"{name} does not tell its tokens, in a {file}, and was left out.")
    return told, notes


def _model_dirs(folder: pathlib.Path, depth: int) -> Iterator[pathlib.Path]:
    marks = (run_history.SCHEDULE_FILE, run_history.METRICS_FILE, run_history.STAGE_FILE)
    if any((folder / name).is_file() for name in marks):
        yield folder
    elif depth:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.name.startswith((".", "checkpoint_")):
                yield from _model_dirs(child, depth - 1)


def _history(folder: pathlib.Path) -> run_history.RunHistory:
    is_schedule = (folder / run_history.SCHEDULE_FILE).is_file()
    stages = run_history.stage_folders(folder) if is_schedule else [folder]
    # Some may have been set up and have not logged yet.
    found = tuple(run_history.load_stage(stage) for stage in stages)
    return run_history.RunHistory(folder.resolve().name, folder, found)


def _evaluations(histories: Iterable[run_history.RunHistory]) -> list[tuple[str, str]]:
    """(evaluator, metric) of all runs, in order of appearance."""
    found: dict[tuple[str, str], None] = {}
    for history in histories:
        for group in history.groups(run_history.INFERENCE_EVAL):
            for name in history.value_names(group):
                if name not in run_summary.NO_METRICS:
                    found[group.removeprefix(run_history.INFERENCE_EVAL), name] = None
    return list(found)


def _choose(
    found: Sequence[tuple[str, str]], metric: str, evaluator: str | None
) -> tuple[str, tuple[tuple[str, str], ...]]:
    fitting = [e for e, m in found if m == metric and evaluator in (None, e)]
    if not fitting:
        wanted = f"--metric={metric}" + (f" of --evaluator={evaluator}" if evaluator else "")
        have = ", ".join(f"{e} {m}" for e, m in found) or "no evaluation at all"
        raise UserError(f"no run has {wanted}: they have {have}")
    return fitting[0], tuple(pair for pair in found if pair != (fitting[0], metric))


def _tokens(history: run_history.RunHistory) -> tuple[float, float, float]:
    """(pixels, share of patches kept, text tokens) of the first stage; 0 for what is not told."""
    first = history.stages[0]
    pixels, text = first.number("image_size"), first.number("text_length")
    total, kept = first.number("num_image_tokens"), first.number("num_image_tokens_kept")
    share = 1.0 if total is None or kept is None else kept / total if 0 < kept <= total else 0.0
    return max(pixels or 0, 0), share, max(text or 0, 0)


def _run(history: run_history.RunHistory, evaluator: str, metric: str, greatest: float) -> Run:
    first, last = history.stages[0], history.stages[-1]
    group = run_history.INFERENCE_EVAL + evaluator
    records = [r for r in last.records.get(group, ()) if metric in r.values]
    missing = _missing(history, records[-1].step if records else None, f"{evaluator} {metric}")
    values = records[-1].values if records else {}
    examples = values.get("num_examples", math.nan)
    settings = [recipe_changes.parameters(stage.config) for stage in history.stages]
    pixels, share, text_tokens = _tokens(history)
    has_flops = all(stage.flops_per_example is not None for stage in history.stages)
    return Run(
        name=history.name,
        size=_size(first, settings[0]),
        pixels=pixels,
        image_tokens=first.number("num_image_tokens_kept"),
        image_area=share * (pixels / greatest) ** 2,
        text_tokens=text_tokens,
        seed=_seed(settings[0]),
        samples=history.spans(run_history.SAMPLES)[-1][1],
        training_flops=history.spans(run_history.FLOPS)[-1][1] if has_flops else math.nan,
        accuracy=values.get(metric, math.nan),
        examples=int(examples) if math.isfinite(examples) and examples > 0 else None,
        missing=missing,
        data=_data(settings),
        recipe=_recipe(settings),
    )


def _missing(history: run_history.RunHistory, evaluated: int | None, what: str) -> str:
    """Why a run counts for nothing; '' where it does."""
    for stage in history.stages:
        if stage.info.get("completed") is not True:
            where = f"{stage.name}: " if len(history.stages) > 1 else ""
            if stage.last_step is None:
                return f"{where}not begun"
            total = stage.number("total_steps")
            return where + run_summary.format_progress(stage.last_step, total)
    last = history.stages[-1]
    total = last.number("total_steps")
    if evaluated is None:
        return f"no {what}"
    return f"{what} of step {evaluated:,} only" if total is not None and evaluated < total else ""


def _size(stage: run_history.Stage, settings: Mapping[str, Any]) -> Size:
    params = stage.number("num_params")
    count = int(params) if params is not None and params >= 1 else None
    sizes = {name: value for name, value in settings.items() if _last(name) in _SIZES}
    if not sizes:
        key = (stage.text("model"), stage.number("patch_size"), count)
        compact = "unknown size" if count is None else run_summary.format_compact(count)
        return Size(report_plots.label(f"{stage.text('model') or 'model'} {compact}"), key, count)
    key = tuple(sorted((name, str(value)) for name, value in sizes.items()))
    return Size(published.name_by_sizes(sizes) or _describe(sizes), key, count)


def _describe(sizes: Mapping[str, Any]) -> str:
    """'64x4/8': width, depth and patch of the image tower, or of the one that there is."""
    towers = {name.rpartition(".")[0] for name in sizes}
    tower = next((each for each in sorted(towers) if f"{each}.patch_size" in sizes), min(towers))
    width, depth, patch = (sizes.get(f"{tower}.{x}") for x in ("width", "depth", "patch_size"))
    return report_plots.label(f"{width}x{depth}" + (f"/{patch}" if patch else ""))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _seed(settings: Mapping[str, Any]) -> int | None:
    seeds = [v for name, v in settings.items() if _last(name) == "random_seed"]
    return seeds[0] if seeds and isinstance(seeds[0], int) else None


def _data(settings: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    found = {
        (name, str(value))
        for stage in settings
        for name, value in stage.items()
        if name.endswith(_DATA)
    }
    return tuple(sorted(found))


def _recipe(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is to be the same within a size: all but size, seed and the first stage's tokens."""
    free = (*_SIZES, *_SEEDS)
    return {
        name if index == 0 else f"stage {index + 1}: {name}": value
        for index, stage in enumerate(settings)
        for name, value in stage.items()
        if _last(name) not in (free if index else (*free, *_TOKENS))
    }


def _check_shares(runs: Iterable[Run], metric: str) -> None:
    for run in runs:
        if not run.missing and not 0 <= run.accuracy <= 1:
            raise UserError(
                f"{metric} of '{run.name}' is {run.accuracy:g}, which is no share in 0..1: name a "
                "metric that is one by --metric, such as accuracy"
            )


def _check_same(runs: Sequence[Run], of: Callable[[Run], Any], fact: str) -> None:
    """Refuses runs that differ in what makes them comparable; those that do not tell pass."""
    told: dict[Any, list[str]] = {}
    for run in runs:
        if of(run):
            told.setdefault(of(run), []).append(run.name)
    if len(told) > 1:
        parts = [f"{_short(value)} ({len(n)}, '{n[0]}' first)" for value, n in told.items()]
        raise UserError(f"the runs were {fact}: {'; '.join(parts[:4])}: name runs of one")


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{name.rpartition('/')[2]} = {text}" for name, text in value)
    return f"{value:,}"


def _recipe_notes(runs: Sequence[Run]) -> list[str]:
    """Refuses differences within a size; says what sizes differ in.

    Raises:
        UserError: runs of one size differ in more than tokens and seed.
    """
    of_sizes: dict[Size, Run] = {}
    for run in runs:
        if not run.recipe:
            continue
        other = of_sizes.setdefault(run.size, run)
        if differing := _differing(run, other):
            name = differing[0]
            raise UserError(
                f"runs of {run.size.name} differ in more than tokens and seed: {name} is "
                f"{other.recipe.get(name)!r} in '{other.name}' and {run.recipe.get(name)!r} in "
                f"'{run.name}': name runs of one value"
            )
    pairs = itertools.combinations(of_sizes.values(), 2)
    names = dict.fromkeys(name for pair in pairs for name in _differing(*pair))
    return [f"Sizes differ in {', '.join(names)}, too."] if names else []


def _differing(first: Run, second: Run) -> list[str]:
    names = sorted(first.recipe.keys() | second.recipe.keys())
    return [name for name in names if first.recipe.get(name) != second.recipe.get(name)]
