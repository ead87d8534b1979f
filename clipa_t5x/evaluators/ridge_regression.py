"""Linear classifiers in closed form: ridge regression on one-hot targets, in float64 NumPy.

As big_vision's few-shot evaluation, with an intercept that is not penalised.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

_LEAST_DEVIATION = 1e-5


@dataclasses.dataclass(frozen=True)
class Classifier:
    """scores = (x - mean) / scale @ weights + intercept.

    Attributes:
      mean: [features].
      scale: [features].
      weights: [features, classes].
      intercept: [classes].
      l2: the penalty that was chosen.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    intercept: np.ndarray
    l2: float

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The class of highest score, int [n], of float [n, features]."""
        scores = ((x - self.mean) / self.scale) @ self.weights + self.intercept
        return np.argmax(scores, axis=1)


def fit(
    x: np.ndarray, labels: np.ndarray, num_classes: int, l2: Sequence[float], standardize: bool
) -> Classifier:
    """The weights that minimise |targets - scores|^2 + l2 |weights|^2 for the best l2 of a list.

    Targets are 1 for an example's class and -1 for the others. The best l2 is the one of the least
    squared error on each example by the weights that all others give, which has a closed form
    (Allen, 1974); no other data are looked at. Of equal errors the greatest l2 is taken.

    Args:
      x: float [n, features].
      labels: int [n].
      num_classes: more than every label.
      l2: penalties to choose from.
      standardize: whether features are scaled to a standard deviation of 1 beforehand.
    """
    x = x.astype(np.float64)
    mean = x.mean(axis=0)
    # As big_vision's: a feature that hardly varies is not blown up.
    scale = x.std(axis=0) + _LEAST_DEVIATION if standardize else np.ones(x.shape[1])
    x = (x - mean) / scale
    targets = 2.0 * np.eye(num_classes)[labels] - 1.0
    intercept = targets.mean(axis=0)
    left, singular, right = np.linalg.svd(x, full_matrices=False)
    projected = left.T @ (targets - intercept)

    def error(penalty: float) -> float:
        shrunk = singular**2 / (singular**2 + penalty)
        residuals = targets - intercept - left @ (shrunk[:, None] * projected)
        # The share of its own target in an example's prediction, the intercept's part included.
        leverage = (left**2) @ shrunk + 1 / len(x)
        return float(np.mean((residuals / (1 - leverage)[:, None]) ** 2))

    best = min(sorted(l2, reverse=True), key=error)
    weights = right.T @ ((singular / (singular**2 + best))[:, None] * projected)
    return Classifier(mean, scale, weights, intercept, best)
