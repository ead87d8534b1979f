"""What a sweep says of the inverse scaling law: do larger models lose less by fewer tokens?

A *cell* is all runs of one size with the same tokens; its accuracy is their mean. A *curve* is the
cells of one size along one axis: image tokens with all text tokens, or text tokens with all image
tokens. What is lost is reckoned against the size's cell with all tokens.

Standard deviations have two parts. The sampling error of the evaluation is binomial. All
runs are evaluated on the same images, so it does not shrink with the number of seeds; for the same
reason it overstates that of differences between cells. The spread over seeds is pooled over all
cells that have several, and shrinks with their number; where none has, it is unknown and left
out.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

from clipa_t5x import accuracy_curves, scaling_fit, sweep_runs

IMAGE, TEXT = "image", "text"


@dataclasses.dataclass(frozen=True)
class Cell:
    """Runs of one size and one number of tokens.

    Attributes:
        runs: one or several seeds.
        share: of all tokens along the curve's axis, in (0, 1].
        accuracy: their mean, and `std` its standard deviation.
        drop: accuracy lost against all tokens, in 0..1, and `relative` of that accuracy; NaN where
            the size has no completed run with all.
    """

    runs: tuple[sweep_runs.Run, ...]
    share: float
    accuracy: float
    std: float
    drop: float = math.nan
    drop_std: float = math.nan
    relative: float = math.nan
    relative_std: float = math.nan

    def tokens(self, axis: str) -> float | None:
        """Of an image or a text."""
        run = self.runs[0]
        return run.image_tokens if axis == IMAGE else run.text_tokens


@dataclasses.dataclass(frozen=True)
class Curve:
    """Cells of one size along an axis, all tokens first, and the fit through them.

    Attributes:
        size: of the models.
        cells: by falling share.
        fit: None where there are too few points; `problem` says so.
    """

    size: sweep_runs.Size
    cells: tuple[Cell, ...]
    fit: scaling_fit.PowerLaw | None
    problem: str = ""

    def at(self, share: float) -> Cell | None:
        """The cell at a share."""
        return next((cell for cell in self.cells if math.isclose(cell.share, share)), None)


@dataclasses.dataclass(frozen=True)
class Loss:
    """What one size loses at an axis' reference share: value and standard deviation."""

    size: sweep_runs.Size
    value: float
    std: float


@dataclasses.dataclass(frozen=True)
class LossTrend:
    """Losses of all sizes at one share, and the line through them over log parameters.

    Attributes:
        kind: 'fitted' or 'measured'.
        relative: whether of the accuracy with all tokens, and not in absolute accuracy.
        losses: by parameters.
        line: None where fewer than two sizes tell.
    """

    kind: str
    relative: bool
    losses: tuple[Loss, ...]
    line: scaling_fit.Trend | None


@dataclasses.dataclass(frozen=True)
class AxisLaw:
    """Everything about one axis.

    Attributes:
        axis: `IMAGE` or `TEXT`.
        curves: one for each size, by parameters.
        reference: the smallest share that all sizes with a full cell have; None without any.
        trends: fitted and measured, absolute and relative; those with any loss.
    """

    axis: str
    curves: tuple[Curve, ...]
    reference: float | None
    trends: tuple[LossTrend, ...]

    @property
    def chief(self) -> LossTrend | None:
        """The absolute trend that the verdict is about: of fits where every size has one."""
        absolute = [t for t in self.trends if not t.relative and t.line is not None]
        return max(absolute, key=lambda t: (len(t.losses), t.kind == "fitted"), default=None)


@dataclasses.dataclass(frozen=True)
class Law:
    """A sweep and what it says.

    Attributes:
        sweep: the runs.
        axes: those along which some size has several cells.
        seed_std: spread of accuracy over seeds, pooled; None where no cell has several.
        front: completed runs that no cheaper or equally dear one equals or beats, cheapest first.
    """

    sweep: sweep_runs.Sweep
    axes: tuple[AxisLaw, ...]
    seed_std: float | None
    front: tuple[sweep_runs.Run, ...]


def analyse(sweep: sweep_runs.Sweep) -> Law:
    """Reckons everything; equal sets of runs give equal laws, whatever their order."""
    seed_std = _seed_std(sweep.completed)
    axes = (_axis_law(axis, sweep, seed_std) for axis in (IMAGE, TEXT))
    costed = [run for run in sweep.completed if run.training_flops > 0]
    return Law(
        sweep,
        tuple(law for law in axes if any(len(curve.cells) > 1 for curve in law.curves)),
        seed_std,
        accuracy_curves.undominated(costed),
    )


def _cells(runs: Iterable[sweep_runs.Run]) -> list[list[sweep_runs.Run]]:
    found: dict[tuple[sweep_runs.Size, float, float], list[sweep_runs.Run]] = {}
    for run in runs:
        found.setdefault((run.size, run.image_area, run.text_tokens), []).append(run)
    return list(found.values())


def _seed_std(runs: Iterable[sweep_runs.Run]) -> float | None:
    several = [[run.accuracy for run in cell] for cell in _cells(runs) if len(cell) > 1]
    degrees = sum(len(values) - 1 for values in several)
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in several)
    return math.sqrt(squares / degrees) if degrees else None


def _axis_law(axis: str, sweep: sweep_runs.Sweep, seed_std: float | None) -> AxisLaw:
    # What all tokens are is told by all runs: a full one may be going on yet.
    most_image = max((run.image_area for run in sweep.runs), default=1.0)
    most_text = max((run.text_tokens for run in sweep.runs), default=1.0)

    def share(run: sweep_runs.Run) -> float:
        return run.image_area / most_image if axis == IMAGE else run.text_tokens / most_text

    def belongs(run: sweep_runs.Run) -> bool:
        other, most = (
            (run.text_tokens, most_text) if axis == IMAGE else (run.image_area, most_image)
        )
        return math.isclose(other, most)

    curves = []
    for size in dict.fromkeys(run.size for run in sweep.runs):
        runs = [run for run in sweep.completed if run.size == size and belongs(run)]
        if runs:
            curves.append(_curve(size, [_cell(c, share(c[0]), seed_std) for c in _cells(runs)]))
    reference = _reference(curves)
    trends = [] if reference is None else _trends(curves, reference)
    return AxisLaw(axis, tuple(curves), reference, tuple(trends))


def _cell(runs: Sequence[sweep_runs.Run], share: float, seed_std: float | None) -> Cell:
    accuracy = statistics.fmean(run.accuracy for run in runs)
    examples = runs[0].examples
    sampling = scaling_fit.sampling_std(accuracy, examples) if examples else 0.0
    std = math.hypot(sampling, (seed_std or 0.0) / math.sqrt(len(runs)))
    return Cell(tuple(runs), share, accuracy, std)


def _curve(size: sweep_runs.Size, cells: Sequence[Cell]) -> Curve:
    cells = sorted(cells, key=lambda cell: -cell.share)
    full = cells[0] if math.isclose(cells[0].share, 1) else None
    if full is not None:
        cells = [_with_drop(cell, full) for cell in cells]
    fit, problem = None, ""
    if len(cells) < scaling_fit.MIN_SHARES:
        counts = f"{len(cells)} token count{'s' * (len(cells) != 1)}"
        problem = (
            f"no curve through {counts}: it has {scaling_fit.PARAMETERS} parameters and takes "
            f"{scaling_fit.MIN_SHARES}"
        )
    elif min(cell.std for cell in cells) == 0:
        problem = (
            "no curve, as neither a number of examples nor several seeds tell how far to trust a "
            "point"
        )
    else:
        fit = scaling_fit.fit(
            [cell.share for cell in cells],
            [1 - cell.accuracy for cell in cells],
            [cell.std for cell in cells],
        )
    return Curve(size, tuple(cells), fit, problem)


def _with_drop(cell: Cell, full: Cell) -> Cell:
    if cell is full:
        return dataclasses.replace(cell, drop=0.0, drop_std=0.0, relative=0.0, relative_std=0.0)
    relative = relative_std = math.nan
    if full.accuracy > 0:
        kept = cell.accuracy / full.accuracy
        relative = 1 - kept
        relative_std = math.hypot(cell.std, kept * full.std) / full.accuracy
    return dataclasses.replace(
        cell,
        drop=full.accuracy - cell.accuracy,
        drop_std=math.hypot(cell.std, full.std),
        relative=relative,
        relative_std=relative_std,
    )


def _reference(curves: Iterable[Curve]) -> float | None:
    """The smallest share that all sizes have, of those that can say what they lost there."""
    shares = [
        {round(cell.share, 6) for cell in curve.cells if cell.share < 1 - 1e-9}
        for curve in curves
        if math.isfinite(curve.cells[0].drop)
    ]
    common = set.intersection(*filter(None, shares)) if any(shares) else set()
    if not common:
        return None
    # As it was before rounding.
    smallest = min(common)
    cells = (cell for curve in curves for cell in curve.cells)
    return next(cell.share for cell in cells if round(cell.share, 6) == smallest)


def _trends(curves: Sequence[Curve], reference: float) -> list[LossTrend]:
    trends = []
    for relative in (False, True):
        for kind, losses in (
            ("measured", [_measured(curve, reference, relative) for curve in curves]),
            ("fitted", [_fitted(curve, reference, relative) for curve in curves]),
        ):
            told = tuple(loss for loss in losses if loss is not None)
            if told:
                trends.append(LossTrend(kind, relative, told, _line(told)))
    return trends


def _measured(curve: Curve, share: float, relative: bool) -> Loss | None:
    cell = next((c for c in curve.cells if math.isclose(c.share, share, abs_tol=1e-6)), None)
    if cell is None:
        return None
    value, std = (cell.relative, cell.relative_std) if relative else (cell.drop, cell.drop_std)
    return Loss(curve.size, value, std) if math.isfinite(value) else None


def _fitted(curve: Curve, share: float, relative: bool) -> Loss | None:
    # Nothing is told beyond a curve's points: neither of fewer tokens nor of all.
    fit, last = curve.fit, curve.cells[-1]
    if fit is None or not math.isfinite(last.drop) or last.share > share + 1e-6:
        return None
    if relative:
        return Loss(curve.size, fit.relative_drop(share), fit.relative_drop_std(share))
    return Loss(curve.size, fit.drop(share), fit.drop_std(share))


def _line(losses: Sequence[Loss]) -> scaling_fit.Trend | None:
    known = [(loss.size.params, loss.value, loss.std) for loss in losses if loss.size.params]
    if not known or min(std for _, _, std in known) <= 0:
        return None
    sizes, values, stds = zip(*known, strict=True)
    return scaling_fit.trend(sizes, values, stds)
