import numpy as np
import tensorflow as tf

from clipa_t5x.data import splitmix

MASK = 2**64 - 1


def python_mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def test_the_published_sequence():
    """The generator's first numbers from the state 1234567."""
    states = [(1234567 + n * splitmix.GAMMA) & MASK for n in (1, 2, 3)]
    mixed = splitmix.mix(tf.constant(states, tf.uint64)).numpy().tolist()
    assert mixed == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert mixed == [python_mix(state) for state in states]


def test_uniform_is_the_sequence_of_a_key_of_both_words():
    seeds = [(0, 0), (3, 2**40), (-1, 5)]
    found = splitmix.uniform(tf.constant(seeds, tf.int64), 4).numpy()
    for (first, second), row in zip(seeds, found, strict=True):
        key = python_mix((first + splitmix.GAMMA) & MASK)
        key = python_mix((key + second * splitmix.GAMMA) & MASK)
        assert splitmix.keys(tf.constant([(first, second)], tf.int64)).numpy().tolist() == [key]
        expected = [python_mix((key + n * splitmix.GAMMA) & MASK) >> 11 for n in range(1, 5)]
        assert (row * 2.0**53).astype(np.int64).tolist() == expected


def test_fewer_numbers_and_fewer_seeds_are_part_of_more():
    seeds = tf.constant([(0, i) for i in range(7)], tf.int64)
    many = splitmix.uniform(seeds, 50).numpy()
    assert (many.shape, many.dtype) == ((7, 50), np.float64)
    np.testing.assert_array_equal(splitmix.uniform(seeds, 3), many[:, :3])
    np.testing.assert_array_equal(splitmix.uniform(seeds[4:5], 50), many[4:5])
    assert splitmix.uniform(seeds, 0).shape == (7, 0)
    assert splitmix.uniform(seeds[:0], 3).shape == (0, 3)


def test_neighbouring_seeds_draw_independently():
    seeds = tf.constant([(s, i) for s in (0, 1) for i in range(5000)], tf.int64)
    draws = splitmix.uniform(seeds, 4).numpy()
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5 * np.sqrt(1 / 12 / draws.size)
    by_seed = draws.reshape(2, 5000, 4)
    columns = [*by_seed[0].T, *by_seed[1].T, np.roll(by_seed[0, :, 0], 1)]
    correlations = np.corrcoef(columns)[~np.eye(9, dtype=bool)]
    assert np.abs(correlations).max() < 5 / np.sqrt(5000)
