import math

import jax
import numpy as np
import pytest

from clipa_t5x import errors, schedules


@pytest.mark.parametrize(
    ("samples", "batch_size", "steps"),
    [
        # bigG/14: low resolution, then 224, then 336 pixels.
        (12_811_632_640, 65_536, 195_490),
        (16_000 * 32_768, 32_768, 16_000),
        (8_000 * 16_384, 16_384, 8_000),
        (1_999, 1_000, 1),
        (1.28e8, 16_384, 7_812),
    ],
)
def test_steps_from_samples(samples, batch_size, steps):
    assert schedules.steps_from_samples(samples, batch_size) == steps


def test_less_than_a_batch_of_samples_is_refused():
    with pytest.raises(errors.UserError, match="999 samples are less than one batch of 1000"):
        schedules.steps_from_samples(999, 1000)


@pytest.mark.parametrize(
    ("base", "batch_size", "rate"),
    [
        (8e-6, 65_536, 2.048e-3),
        (4e-7, 32_768, 5.12e-5),
        (1e-7, 16_384, 6.4e-6),
        (8e-6, 100, 8e-6),
        (8e-6, 511, 8e-6),
    ],
)
def test_scaled_learning_rate(base, batch_size, rate):
    assert schedules.scaled_learning_rate(base, batch_size) == pytest.approx(rate, rel=1e-12)


def test_warmup_cosine_begins_at_zero_peaks_and_ends_at_zero():
    rate = schedules.warmup_cosine(2e-3, total_steps=100, warmup_steps=20)
    assert rate(0) == 0
    np.testing.assert_allclose(rate(10), 1e-3, rtol=1e-6)
    np.testing.assert_allclose(rate(20), 2e-3, rtol=1e-6)
    np.testing.assert_allclose(rate(60), 1e-3, rtol=1e-5)
    np.testing.assert_allclose(rate(40), 2e-3 * (1 + math.cos(math.pi / 4)) / 2, rtol=1e-6)
    np.testing.assert_allclose(rate(100), 0, atol=1e-12)


def test_warmup_cosine_stays_at_zero_after_the_end():
    rate = schedules.warmup_cosine(1.0, total_steps=10)
    np.testing.assert_allclose(rate(1000), 0, atol=1e-7)


def test_warmup_cosine_rises_then_falls():
    rate = np.asarray(jax.vmap(schedules.warmup_cosine(1.0, 50, 7))(np.arange(51)))
    assert np.all(np.diff(rate[:8]) > 0) and np.all(np.diff(rate[7:]) < 0)


def test_warmup_cosine_without_warmup_begins_at_its_peak():
    assert float(schedules.warmup_cosine(0.5, total_steps=10)(0)) == 0.5


def test_warmup_cosine_tells_the_steps_of_a_long_stage_apart():
    rate = schedules.warmup_cosine(1.0, total_steps=195_490, warmup_steps=3_200)
    assert float(rate(100_000)) > float(rate(100_001)) > float(rate(100_002))


@pytest.mark.parametrize("warmup_steps", [10, 11, -1])
def test_a_warmup_that_is_no_shorter_than_the_run_is_refused(warmup_steps):
    with pytest.raises(errors.UserError, match=f"WARMUP_STEPS is {warmup_steps}"):
        schedules.warmup_cosine(1.0, total_steps=10, warmup_steps=warmup_steps)
