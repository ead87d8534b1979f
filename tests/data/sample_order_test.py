import itertools

import numpy as np
import pytest

from clipa_t5x.data import sample_order


def order(count, *, window=None, shards=1, shuffle=True, seed=0):
    """Of `count` records in shards of about equal length."""
    ends = np.linspace(0, count, shards + 1).astype(np.int64)[1:]
    return sample_order.SampleOrder(ends, window or count, shuffle, seed)


def epochs(of, number):
    count = of.num_records
    return of.records(np.arange(number * count)).reshape(number, count)


def test_unshuffled_order_is_the_shards():
    found = order(13, shards=3, shuffle=False).records(np.arange(26))
    assert found.tolist() == list(range(13)) * 2


@pytest.mark.parametrize("seed", [0, 1, 2**40, 2**63 - 1, -3])
def test_every_epoch_is_another_permutation(seed):
    found = epochs(order(13, seed=seed), 4)
    for epoch in found:
        assert sorted(epoch) == list(range(13))
    for a, b in itertools.combinations([*found, np.arange(13)], 2):
        assert a.tolist() != b.tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 255, 257, 1000])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_permutations_of_any_length(count, window):
    found = epochs(order(count, window=window, shards=min(count, 6)), 3)
    np.testing.assert_array_equal(np.sort(found), np.tile(np.arange(count), (3, 1)))


def test_permutations_look_random():
    """Every record comes at every place about as often, after every other about as often."""
    count, number = 8, 500
    found = epochs(order(count), number)
    for place in range(count):
        times = np.bincount(found[:, place], minlength=count)
        # Binomial(500, 1/8) has mean 62.5 and deviation 7.4: five of them.
        assert np.abs(times - number / count).max() < 37
    pairs = np.zeros((count, count))
    np.add.at(pairs, (found[:, :-1].ravel(), found[:, 1:].ravel()), 1)
    assert pairs[~np.eye(count, dtype=bool)].min() > 0.5 * pairs.sum() / (count * (count - 1))


def test_neighbours_part():
    """No step from one record to the next is much more frequent than a random order's."""
    found = epochs(order(1000), 8)
    frequency = np.unique(np.diff(found), return_counts=True)[1]
    assert frequency.max() < 30  # 8 expected of the commonest
    for a, b in itertools.combinations(found, 2):
        assert np.sum(a == b) < 10  # 1 expected


@pytest.mark.parametrize("window", [None, 4])
def test_seeds_differ(window):
    seeds = [0, 1, 2, 3, -1, 2**32, 2**40]
    found = [epochs(order(40, window=window, shards=8, seed=seed), 1).tolist() for seed in seeds]
    for a, b in itertools.combinations(found, 2):
        assert a != b


def test_a_window_holds_neighbouring_shards():
    """Of 20 shards of 10 records, a window of 40 records takes four, or parts of five."""
    of = order(200, window=40, shards=20)
    found = epochs(of, 3).reshape(3, 5, 40) // 10
    for windows in found:
        for window in windows:
            assert len(np.unique(window)) == 4  # shards are whole where windows are as long
    # Other shards come together in the next epoch.
    first, second = (
        {frozenset(np.unique(window).tolist()) for window in windows} for windows in found[:2]
    )
    assert first != second


def test_records_are_mixed_within_their_window():
    found = epochs(order(4000, window=1000, shards=4), 2)
    for window in found.reshape(8, 1000):
        assert np.abs(np.corrcoef(window, np.arange(1000))[0, 1]) < 0.15
        assert len(np.unique(np.diff(window))) > 500


def test_windows_of_one_epoch_are_mixed_differently():
    windows = epochs(order(400, window=100, shards=4), 1).reshape(4, 100) % 100
    for a, b in itertools.combinations(windows, 2):
        assert np.sum(a == b) < 10


def test_shards_come_at_every_place():
    of = order(60, window=10, shards=6)
    places = epochs(of, 300)[:, ::10] // 10
    for shard in range(6):
        times = np.bincount(np.argwhere(places == shard)[:, 1], minlength=6)
        assert np.abs(times - 50).max() < 33  # five deviations of Binomial(300, 1/6)


def test_a_record_is_a_function_of_its_index_alone():
    of = order(90, window=20, shards=7, seed=7)
    whole = of.records(np.arange(500))
    for chosen in ([3], [499, 0, 170], range(85, 200)):
        np.testing.assert_array_equal(of.records(np.asarray(list(chosen))), whole[list(chosen)])


def test_far_positions_are_as_near_as_the_first():
    first = 10**15 // 13 * 13
    assert sorted(order(13).records(np.arange(first, first + 13))) == list(range(13))


def test_empty_shards_are_passed_over():
    of = sample_order.SampleOrder(np.asarray([0, 3, 3, 8, 8]), 2, True, 0)
    np.testing.assert_array_equal(np.sort(epochs(of, 5)), np.tile(np.arange(8), (5, 1)))


@pytest.mark.parametrize("window, mean, expected", [(1000, 100.0, 10), (5, 100.0, 1), (9, 0.0, 9)])
def test_a_window_is_stated_in_bytes(window, mean, expected):
    assert sample_order.window_records(window, mean) == expected
