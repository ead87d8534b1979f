"""Curves give back the laws that made their points."""

import math
import random

import numpy as np
import pytest

from clipa_t5x import scaling_fit

SHARES = (1.0, 0.5, 0.25, 1 / 9, 0.06)


def law(full, scale, exponent):
    return [full + scale * (share**-exponent - 1) for share in SHARES]


@pytest.mark.parametrize("parameters", [(0.3, 0.05, 0.8), (0.6, 0.01, 1.9), (0.5, 0.2, 0.1)])
def test_a_known_law_gives_back_its_parameters(parameters):
    fit = scaling_fit.fit(SHARES, law(*parameters), [0.01] * 5)
    assert (fit.full, fit.scale, fit.exponent) == pytest.approx(parameters, rel=1e-4)
    assert fit.chi2 < 1e-6 and fit.degrees == 2
    assert fit.error(0.25) == pytest.approx(law(*parameters)[2], abs=1e-6)
    assert fit.drop(1.0) == 0 and fit.relative_drop(0.5) == fit.drop(0.5) / (1 - fit.full)


def test_the_order_of_points_changes_nothing():
    points = list(zip(SHARES, law(0.3, 0.05, 0.8), (0.01, 0.02, 0.01, 0.03, 0.01), strict=True))
    fits = []
    for seed in range(3):
        random.Random(seed).shuffle(points)
        fits.append(scaling_fit.fit(*zip(*points, strict=True)))
    assert all(each.exponent == pytest.approx(fits[0].exponent, rel=1e-6) for each in fits)


def test_residuals_are_what_the_curve_leaves():
    noise = (0.01, -0.02, 0.01, 0.01, -0.01)
    errors = [e + d for e, d in zip(law(0.3, 0.05, 0.8), noise, strict=True)]
    fit = scaling_fit.fit(SHARES, errors, [0.01] * 5)
    left = [e - fit.error(share) for e, share in zip(errors, SHARES, strict=True)]
    np.testing.assert_allclose(fit.residuals, left, atol=1e-9)
    # The constant takes up the mean: with equal weights the rest sums to nothing.
    assert sum(fit.residuals) == pytest.approx(0, abs=1e-9)
    assert fit.chi2 == pytest.approx(sum(r**2 for r in left) / 0.01**2)


def test_residuals_sum_to_nothing_by_their_weights():
    stds = (0.01, 0.02, 0.005, 0.03, 0.01)
    errors = [e + d for e, d in zip(law(0.3, 0.05, 0.8), (0.01, -0.02, 0, 0.01, 0), strict=True)]
    fit = scaling_fit.fit(SHARES, errors, stds)
    weighted = [r / std**2 for r, std in zip(fit.residuals, stds, strict=True)]
    assert sum(weighted) == pytest.approx(0, abs=1e-6 * max(map(abs, weighted)))


def test_points_that_scatter_more_than_they_say_widen_the_curve():
    noise = (0.01, -0.02, 0.01, 0.01, -0.01)
    errors = [e + d for e, d in zip(law(0.3, 0.05, 0.8), noise, strict=True)]
    sure, unsure = (scaling_fit.fit(SHARES, errors, [std] * 5) for std in (0.001, 0.01))
    assert sure.chi2 > 100 and sure.drop_std(0.1) == pytest.approx(
        0.001 * math.sqrt(sure.chi2 / 2) * unsure.drop_std(0.1)
        / (0.01 * math.sqrt(max(1, unsure.chi2 / 2)))
    )  # fmt: skip


def test_deviations_are_those_of_repeated_sweeps():
    """Of 150 noisy sweeps the fitted drops scatter as each says of itself."""
    rng = np.random.default_rng(0)
    wanted = np.asarray(law(0.3, 0.05, 0.8))
    fits = [scaling_fit.fit(SHARES, wanted + rng.normal(0, 0.003, 5), [0.003] * 5)
            for _ in range(150)]  # fmt: skip
    drops = [fit.drop(0.25) for fit in fits]
    assert np.mean(drops) == pytest.approx(wanted[2] - 0.3, abs=0.001)
    assert np.std(drops) == pytest.approx(np.median([f.drop_std(0.25) for f in fits]), rel=0.35)


def test_too_few_points_have_no_curve_and_a_flat_one_no_exponent():
    assert scaling_fit.fit([1, 0.5, 0.25, 0.25], [0.1, 0.2, 0.3, 0.3], [0.01] * 4) is None
    flat = scaling_fit.fit(SHARES, [0.3] * 5, [0.01] * 5)
    assert flat.drop(0.06) == pytest.approx(0, abs=1e-9) and flat.stds[2] > 1e6


def test_a_line_over_doublings():
    trend = scaling_fit.trend([2e6, 1e6, 4e6], [0.08, 0.10, 0.06], [0.001] * 3)
    assert trend.slope == pytest.approx(-0.02) and trend.direction == -1
    assert trend.at(8e6) == pytest.approx(0.04)
    assert scaling_fit.trend([1e6, 4e6], [0.1, 0.101], [0.01] * 2).direction == 0
    assert scaling_fit.trend([1e6, 1e6], [0.1, 0.2], [0.01] * 2) is None


def test_sampling_error_of_certain_answers_is_not_none():
    assert scaling_fit.sampling_std(0.5, 1000) == pytest.approx(math.sqrt(0.25 / 1000), rel=1e-3)
    assert 0 < scaling_fit.sampling_std(1.0, 100) < 0.02
