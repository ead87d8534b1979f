"""SplitMix64 (Steele et al., 2014) over tensors: random numbers that are a function of a key alone.

Element by element, so that a sample draws the same whatever batch it is prepared in.
"""

import tensorflow as tf

GAMMA = 0x9E3779B97F4A7C15  # the odd number nearest to 2^64 / golden ratio


def mix(x: tf.Tensor) -> tf.Tensor:
    """The finaliser: every bit of the result depends on every bit of `x`, uint64 [...]."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        shifted = tf.bitwise.right_shift(x, tf.constant(shift, tf.uint64))
        x = tf.bitwise.bitwise_xor(x, shifted) * tf.constant(factor, tf.uint64)
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, tf.constant(31, tf.uint64)))


def keys(seeds: tf.Tensor) -> tf.Tensor:
    """A word of each seed, int64 [n, 2] to uint64 [n], that depends on every bit of it."""
    gamma = tf.constant(GAMMA, tf.uint64)
    words = tf.bitcast(seeds, tf.uint64)
    return mix(mix(words[:, 0] + gamma) + words[:, 1] * gamma)


def uniform(seeds: tf.Tensor, count: tf.Tensor | int) -> tf.Tensor:
    """The first `count` numbers of each seed's sequence.

    Args:
      seeds: int64 [n, 2].
      count: of numbers; fewer are the beginning of more.

    Returns:
      float64 [n, count], multiples of 2^-53 in [0, 1).
    """
    gamma = tf.constant(GAMMA, tf.uint64)
    steps = tf.cast(tf.range(1, tf.cast(count, tf.int64) + 1), tf.uint64) * gamma
    bits = tf.bitwise.right_shift(mix(keys(seeds)[:, None] + steps), tf.constant(11, tf.uint64))
    return tf.cast(tf.bitcast(bits, tf.int64), tf.float64) * 2.0**-53
