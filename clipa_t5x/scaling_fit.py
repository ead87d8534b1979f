"""Curves through a sweep: error against the share of tokens, and a loss of accuracy against size.

The curve of one model is a power law with a constant,

    error(s) = full + scale * (s ** -exponent - 1),    s: the share of the tokens, in (0, 1],

the form by which errors and losses of deep networks are described over data, compute and size
(Hestness et al. 2017, "Deep Learning Scaling is Predictable, Empirically"; Henighan et al. 2020,
"Scaling Laws for Autoregressive Generative Modeling"), here over tokens. `full` is the error with
all of them, `full - scale` the error that no number of tokens would go below, and what is lost at a
share is `scale * (s ** -exponent - 1)`. CLIPA's papers draw points and fit no curve: the form is
chosen here, and residuals tell how well it does. As the exponent goes to 0 it becomes a straight
line over log tokens.

For a given exponent the rest is linear, so one number is searched for, and equal points give equal
curves whatever their order.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# Three parameters pass through three points, whatever these are.
PARAMETERS = 3
MIN_SHARES = PARAMETERS + 1

# Between a straight line over log tokens and a cliff; a best exponent at an end is none.
_EXPONENTS = np.geomspace(0.02, 20, 200)

# How many standard deviations tell a slope from none: two-sided, 95 % where these are normal.
SIGNIFICANT = 2.0


def sampling_std(share: float, count: int) -> float:
    """Standard deviation of a share of right answers, of so many questions: binomial.

    One right and one wrong answer are added to the count, lest 0 and 1 look certain.
    """
    smoothed = (share * count + 1) / (count + 2)
    return math.sqrt(smoothed * (1 - smoothed) / count)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """A fitted curve of errors over shares of tokens; see the module.

    Attributes:
        full, scale, exponent: its parameters.
        stds: their standard deviations; infinite for an exponent that the points do not determine.
        residuals: measured errors less the curve's, in the order of the points given.
        chi2: sum of their squares over the squares of the points' standard deviations.
        degrees: of freedom: points less parameters.
        covariance: of the parameters, float64 [3, 3]; an undetermined exponent counts as fixed.
    """

    full: float
    scale: float
    exponent: float
    stds: tuple[float, float, float]
    residuals: tuple[float, ...]
    chi2: float
    degrees: int
    covariance: np.ndarray = dataclasses.field(compare=False)

    def error(self, share: float) -> float:
        """The curve's error at a share of the tokens."""
        return self.full + self.drop(share)

    def drop(self, share: float) -> float:
        """What the curve loses at a share of the tokens, in accuracy."""
        return self.scale * (share**-self.exponent - 1)

    def drop_std(self, share: float) -> float:
        """Its standard deviation, to first order in the parameters'."""
        return self._std(np.array([0.0, *self._slopes(share)]))

    def relative_drop(self, share: float) -> float:
        """What the curve loses at a share, of the accuracy with all tokens."""
        return self.drop(share) / (1 - self.full)

    def relative_drop_std(self, share: float) -> float:
        """Its standard deviation, to first order."""
        of_full = self.drop(share) / (1 - self.full)
        return self._std(np.array([of_full, *self._slopes(share)]) / (1 - self.full))

    def _slopes(self, share: float) -> tuple[float, float]:
        power = share**-self.exponent
        return power - 1, -self.scale * math.log(share) * power

    def _std(self, gradient: np.ndarray) -> float:
        return math.sqrt(max(float(gradient @ self.covariance @ gradient), 0.0))


def fit(shares: Sequence[float], errors: Sequence[float], stds: Sequence[float]) -> PowerLaw | None:
    """Fits a curve by weighted least squares.

    Args:
        shares: of the tokens, in (0, 1].
        errors: measured there.
        stds: their standard deviations, above 0. Where the points lie further from the curve than
            these explain, the parameters' are widened by the square root of chi2 / degrees.

    Returns:
        The curve, or None where there are fewer than `MIN_SHARES` different shares.
    """
    if len(set(shares)) < MIN_SHARES:
        return None
    x, y, sigma = (np.asarray(values, np.float64) for values in (shares, errors, stds))
    exponent = _best_exponent(x, y, sigma)
    linear, chi2 = _linear(exponent, x, y, sigma)
    full, scale = float(linear[0]), float(linear[1])
    residuals = y - (full + scale * (x**-exponent - 1))
    degrees = len(x) - PARAMETERS
    is_free = _EXPONENTS[0] * 1.01 < exponent < _EXPONENTS[-1] / 1.01
    covariance = _covariance(full, scale, exponent, x, sigma, is_free)
    covariance *= max(1.0, chi2 / degrees)
    stds_found = [float(std) for std in np.sqrt(np.diag(covariance))]
    if stds_found[2] == 0:
        stds_found[2] = math.inf
    return PowerLaw(
        full=full,
        scale=scale,
        exponent=exponent,
        stds=(stds_found[0], stds_found[1], stds_found[2]),
        residuals=tuple(float(r) for r in residuals),
        chi2=chi2,
        degrees=degrees,
        covariance=covariance,
    )


def _linear(
    exponent: float, x: np.ndarray, y: np.ndarray, sigma: np.ndarray
) -> tuple[np.ndarray, float]:
    """(full and scale, chi2) that are best with an exponent."""
    design = np.stack([np.ones_like(x), x**-exponent - 1], axis=1) / sigma[:, None]
    # Columns of like size, so that none counts as nothing.
    sizes = np.linalg.norm(design, axis=0)
    scaled = np.linalg.lstsq(design / sizes, y / sigma, rcond=None)[0] / sizes
    return scaled, float(np.sum((y / sigma - design @ scaled) ** 2))


def _best_exponent(x: np.ndarray, y: np.ndarray, sigma: np.ndarray) -> float:
    """By a grid, then by golden sections between the neighbours of its best."""

    def chi2(log_exponent: float) -> float:
        return _linear(math.exp(log_exponent), x, y, sigma)[1]

    logs = np.log(_EXPONENTS)
    best = int(np.argmin([chi2(log) for log in logs]))
    low, high = float(logs[max(best - 1, 0)]), float(logs[min(best + 1, len(logs) - 1)])
    golden = (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = chi2(left), chi2(right)
    while high - low > 1e-10:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = chi2(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = chi2(right)
    return math.exp((low + high) / 2)


def _covariance(
    full: float, scale: float, exponent: float, x: np.ndarray, sigma: np.ndarray, is_free: bool
) -> np.ndarray:
    power = x**-exponent
    jacobian = np.stack([np.ones_like(x), power - 1, -scale * np.log(x) * power], axis=1)
    jacobian /= sigma[:, None]
    sizes = np.linalg.norm(jacobian, axis=0)
    # A curve that loses nothing says nothing of its exponent, nor does one at the grid's end.
    is_free = is_free and sizes[2] > 0 and np.linalg.cond(jacobian / sizes) < 1e6
    kept = PARAMETERS if is_free else PARAMETERS - 1
    scaled = jacobian[:, :kept] / sizes[:kept]
    found = np.zeros((PARAMETERS, PARAMETERS))
    found[:kept, :kept] = np.linalg.inv(scaled.T @ scaled) / np.outer(sizes[:kept], sizes[:kept])
    return found


@dataclasses.dataclass(frozen=True)
class Trend:
    """A straight line of values over the logarithm of models' sizes.

    Attributes:
        slope: change for each doubling of the parameters.
        std: its standard deviation.
        at_first: the line's value at the smallest model.
        first: that model's parameters.
        chi2: sum of squared residuals over the values' variances.
        degrees: of freedom: models less two.
    """

    slope: float
    std: float
    at_first: float
    first: float
    chi2: float
    degrees: int

    @property
    def direction(self) -> int:
        """-1: falls as models grow, 1: rises, 0: the values do not tell."""
        if abs(self.slope) <= SIGNIFICANT * self.std:
            return 0
        return -1 if self.slope < 0 else 1

    def at(self, size: float) -> float:
        """The line's value for a model of so many parameters."""
        return self.at_first + self.slope * math.log2(size / self.first)


def trend(sizes: Sequence[float], values: Sequence[float], stds: Sequence[float]) -> Trend | None:
    """Fits a line by weighted least squares; None where there are fewer than two sizes.

    Args:
        sizes: parameters of the models.
        values: one for each.
        stds: their standard deviations, above 0; as for `fit`, the slope's is widened where the
            values lie further from the line than these explain.
    """
    if len(set(sizes)) < 2:
        return None
    first = min(sizes)
    x = np.log2(np.asarray(sizes, np.float64) / first)
    y, weights = np.asarray(values, np.float64), 1 / np.asarray(stds, np.float64) ** 2
    mean_x, mean_y = np.average(x, weights=weights), np.average(y, weights=weights)
    spread = float(np.sum(weights * (x - mean_x) ** 2))
    slope = float(np.sum(weights * (x - mean_x) * (y - mean_y))) / spread
    chi2 = float(np.sum(weights * (y - mean_y - slope * (x - mean_x)) ** 2))
    degrees = len(x) - 2
    widening = max(1.0, chi2 / degrees) if degrees else 1.0
    at_first = float(mean_y - slope * mean_x)
    return Trend(slope, math.sqrt(widening / spread), at_first, float(first), chi2, degrees)
