import numpy as np
import pytest

from clipa_t5x.checkpoint_retention import Retention


@pytest.mark.parametrize(
    "rules, removed",
    [
        ({"keep": None}, []),
        ({"keep": 2}, [1, 2, 3, 4]),
        ({"keep": 9}, []),
        ({"keep": 1, "keep_period": 2}, [1, 3, 5]),
        ({"keep": 1, "keep_best": 2}, [1, 3, 4]),
        ({"keep": 1, "keep_best": 1, "best_mode": "min"}, [1, 2, 3, 5]),
        ({"keep": 2, "keep_period": 3, "keep_best": 1}, [1, 2, 4]),
        ({"keep": 1, "keep_best": 9}, [1, 3]),
    ],
)
def test_what_is_superseded(rules, removed):
    metrics = {1: None, 2: 0.7, 3: None, 4: 0.1, 5: 0.7, 6: 0.2}
    assert Retention(**rules).superseded(metrics) == removed


def random_case(rng):
    steps = rng.choice(40, rng.integers(0, 12), replace=False) + 1
    saved = {int(s): None if rng.random() < 0.3 else float(rng.integers(4)) for s in steps}
    rules = Retention(
        keep=int(rng.integers(1, 5)),
        keep_period=None if rng.random() < 0.5 else int(rng.integers(1, 9)),
        keep_best=int(rng.integers(0, 4)),
        best_mode=str(rng.choice(["max", "min"])),
    )
    return rules, saved


def test_its_properties():
    rng = np.random.default_rng(0)
    for _ in range(500):
        rules, saved = random_case(rng)
        removed = rules.superseded(saved)
        kept = {step: metric for step, metric in saved.items() if step not in removed}
        assert removed == sorted(removed) and set(removed) <= saved.keys()
        assert set(sorted(saved)[-rules.keep :]) <= kept.keys()
        assert not [s for s in removed if rules.keep_period and s % rules.keep_period == 0]
        # What is removed is no better than any of as many as are kept for being good.
        sign = -1 if rules.best_mode == "min" else 1
        ranked = sorted((sign * m for m in kept.values() if m is not None), reverse=True)
        for step in removed:
            if saved[step] is not None and rules.keep_best:
                assert len(ranked) >= rules.keep_best
                assert sign * saved[step] <= ranked[rules.keep_best - 1]
        # Nothing is kept without a reason, and a second look changes nothing.
        periodic = sum(rules.keep_period is not None and s % rules.keep_period == 0 for s in kept)
        assert len(kept) <= rules.keep + rules.keep_best + periodic
        assert rules.superseded(kept) == []


def test_the_peak_is_never_exceeded():
    """And without keep_best, whose metrics cannot be foreseen, it is reached to one."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        rules, saved = random_case(rng)
        newest = max(saved, default=0)
        due = sorted({int(s) + newest for s in rng.integers(1, 30, rng.integers(1, 15))})
        peak = rules.peak(saved, due)
        there, most = dict(saved), 0
        for step in due:
            there[step] = float(rng.integers(4))
            most = max(most, len(there))
            for old in rules.superseded(there):
                del there[old]
        assert most <= peak
        if not rules.keep_best:
            assert peak <= most + 1


def test_all_are_counted_where_all_are_kept():
    assert Retention(None).peak([1, 2], [3, 4, 5]) == 5
    assert Retention(2).peak([1, 2, 3, 4], []) == 4
    assert Retention(2).peak([1, 2, 3, 4], [5]) == 5
    assert Retention(2).peak([], [5]) == 1
    assert Retention(2).peak([], range(1, 100)) == 3
    assert Retention(2, keep_period=10).peak([], range(1, 100)) == 12
