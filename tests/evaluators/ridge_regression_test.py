import numpy as np
import pytest

from clipa_t5x.evaluators import ridge_regression

CLASSES = 4


def data(count, features, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    centres = rng.normal(size=(CLASSES, features))
    x = centres[labels] + rng.normal(size=(count, features)) * np.linspace(0.5, 3, features)
    return x.astype(np.float32), labels


def solve(x, labels, l2):
    """Weights and intercept by the normal equations, the intercept's column not penalised."""
    x = np.hstack([x.astype(np.float64), np.ones((len(x), 1))])
    targets = np.where(labels[:, None] == np.arange(CLASSES), 1.0, -1.0)
    penalty = l2 * np.eye(x.shape[1])
    penalty[-1, -1] = 0
    return np.linalg.solve(x.T @ x + penalty, x.T @ targets)


@pytest.mark.parametrize("count, features", [(40, 6), (12, 30)])
@pytest.mark.parametrize("l2", [1e-2, 3.0, 1e3])
def test_weights_solve_the_normal_equations(count, features, l2):
    x, labels = data(count, features)
    found = ridge_regression.fit(x, labels, CLASSES, [l2], standardize=False)
    expected = solve(x, labels, l2)
    np.testing.assert_allclose(found.weights, expected[:-1], rtol=1e-6, atol=1e-9)
    intercept = found.intercept - found.mean @ found.weights
    np.testing.assert_allclose(intercept, expected[-1], rtol=1e-6, atol=1e-9)
    scores = np.hstack([x, np.ones((count, 1))]) @ expected
    np.testing.assert_array_equal(found.predict(x), scores.argmax(axis=1))


def test_standardized_features_are_scaled_beforehand():
    x, labels = data(40, 6)
    scaled = (x - x.mean(axis=0)) / (x.astype(np.float64).std(axis=0) + 1e-5)
    found = ridge_regression.fit(x, labels, CLASSES, [2.0], standardize=True)
    expected = ridge_regression.fit(scaled, labels, CLASSES, [2.0], standardize=False)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-5)
    np.testing.assert_array_equal(found.predict(x), expected.predict(scaled))


@pytest.mark.parametrize("count, features", [(40, 6), (12, 30)])
def test_the_penalty_is_chosen_by_leaving_out_one_at_a_time(count, features):
    x, labels = data(count, features, 1)
    penalties = [2.0**i for i in range(-6, 12, 2)]
    errors = []
    for l2 in penalties:
        squares = []
        for i in range(count):
            others = np.arange(count) != i
            scores = np.append(x[i], 1) @ solve(x[others], labels[others], l2)
            squares.append((scores - np.where(np.arange(CLASSES) == labels[i], 1, -1)) ** 2)
        errors.append(np.mean(squares))
    best = penalties[int(np.argmin(errors))]
    assert best not in (penalties[0], penalties[-1])
    found = ridge_regression.fit(x, labels, CLASSES, penalties, standardize=False)
    assert found.l2 == best
    expected = ridge_regression.fit(x, labels, CLASSES, [best], standardize=False)
    np.testing.assert_array_equal(found.weights, expected.weights)
