import pytest

from clipa_t5x import costs
from clipa_t5x.errors import UserError


def test_hours_and_dollars_follow_from_the_peak():
    rate = costs.rate("a100-80g", 0.5, None)
    # An hour at half of 312 TFLOP/s.
    assert rate.hours(0.5 * 312e12 * 3600) == pytest.approx(1.0)
    assert rate.dollars(0.5 * 312e12 * 3600 * 100) == pytest.approx(157.5)
    assert rate.flops(rate.hours(7e21)) == pytest.approx(7e21)
    assert costs.rate("A100-80G", 0.25, None).hours(1e20) == pytest.approx(2 * rate.hours(1e20))
    assert "312 TFLOP/s" in str(rate) and "0.5 MFU" in str(rate) and "$1.575" in str(rate)


def test_dollars_need_a_price():
    assert costs.rate("v5p", 0.4, None).dollars(1e21) is None
    assert "no price (--price)" in str(costs.rate("v5p", 0.4, None))
    assert costs.rate("v5p", 0.4, 2.0).dollars(459e12 * 0.4 * 3600) == pytest.approx(2.0)
    # The default stays as it was.
    assert costs.CHIPS["v5p"].price is None


def test_a_budget_buys_the_same_either_way():
    rate = costs.rate("v5p", 0.4, 2.0)
    assert rate.budget_flops(50.0, None) == pytest.approx(rate.budget_flops(None, 100.0))
    assert rate.budget_flops(50.0, None) == pytest.approx(50 * 3600 * 0.4 * 459e12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("A1000", 0.5, None), "--chip is 'A1000'; it must be one of A100-80G, .*v6e"),
        (("v5p", 0.0, None), r"--mfu is 0; .*\(0, 1\]"),
        (("v5p", 40.0, None), "--mfu is 40;"),
        (("v5p", float("nan"), None), "--mfu is nan"),
        (("v5p", 0.4, 0.0), "--price is 0;"),
    ],
)
def test_rates_out_of_range_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        costs.rate(*arguments)


@pytest.mark.parametrize(
    "hours, dollars, message",
    [
        (5.0, 5.0, "given twice"),
        (-5.0, None, "--budget_hours is -5.0"),
        (None, 0.0, "--budget_dollars is 0.0"),
        (None, float("inf"), "--budget_dollars is inf"),
        (None, 5.0, "on v6e needs --price"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(hours, dollars, message):
    with pytest.raises(UserError, match=message):
        costs.rate("v6e", 0.4, None).budget_flops(hours, dollars)
