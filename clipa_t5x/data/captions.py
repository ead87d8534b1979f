"""Which of a record's captions a sample uses, and what makes a caption fit to be tokenised."""

from collections.abc import Mapping, Sequence

import numpy as np

from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.data.shard_formats import Fields

# Far beyond any text length: the tokeniser would work through all of it to keep 32 pieces.
MAX_BYTES = 4096
# Stand-ins of bad records draw from the streams 1, 2, ...
_FIELD_STREAM, _TEXT_STREAM = 1001, 1002
_GAMMA = 0x9E3779B97F4A7C15


def _mix(x: np.ndarray) -> np.ndarray:
    """`splitmix.mix` in NumPy."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def uniform(seeds: np.ndarray, stream: int) -> np.ndarray:
    """A number in [0, 1) of each seed (int64 [n, 2]) and stream: float64 [n].

    Streams are independent of each other and of `splitmix.uniform`, which crops are drawn from.
    """
    words = seeds.astype(np.uint64)
    gamma = np.uint64(_GAMMA)
    with np.errstate(over="ignore"):
        keys = _mix(_mix(words[:, 0] + gamma) + words[:, 1] * gamma)
        bits = _mix(_mix(keys ^ np.uint64(0x5851F42D4C957F2D)) + np.uint64(stream + 1) * gamma)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose(record: Fields, rates: Mapping[str, float], seed: int, index: int) -> tuple[bytes, str]:
    """One of a record's captions.

    Fields that a record lacks leave their share to the others. Where a field holds several texts,
    they are equally likely.

    Args:
      record: its fields.
      rates: names of caption fields, with how likely each is taken.
      seed: of the run.
      index: of the sample.

    Returns:
      (the caption in UTF-8, what was mended of it or '').

    Raises:
      BadRecord: there is none, or none with a letter in it.
    """
    texts = _texts(record, rates)
    present = {name: rates[name] for name in texts}
    (name,) = present if len(present) == 1 else (None,)
    draws = _draws(seed, index) if name is None or len(texts[name]) > 1 else (0.0, 0.0)
    if name is None:
        shares = np.cumsum([max(rate, 0.0) for rate in present.values()])
        place = int(np.searchsorted(shares, draws[0] * shares[-1], side="right"))
        name = list(present)[min(place, len(present) - 1)]
    chosen = texts[name][int(draws[1] * len(texts[name]))]
    return clean(chosen)


def every(record: Fields, rates: Mapping[str, float], most: int) -> tuple[bytes, str]:
    """The first captions of a record, one a line.

    A field with several texts holds a caption in each; the only text of a field holds one a line,
    as clip_benchmark writes them.

    Args:
      record: its fields.
      rates: names of caption fields; those of rate 0 are left out.
      most: how many are taken at most.

    Returns:
      (the captions in UTF-8, what was mended of them or '').

    Raises:
      BadRecord: there is none, or none with a letter in it.
    """
    texts = _texts(record, {name: rate for name, rate in rates.items() if rate})
    found = [t for each in texts.values() for t in (each if len(each) > 1 else _lines(each[0]))]
    cleaned = [clean(text) for text in found[:most]]
    # What separates words within a caption does not matter to a tokeniser.
    lines = [b" ".join(text.split()) for text, _ in cleaned]
    return b"\n".join(lines), next((mended for _, mended in cleaned if mended), "")


def _lines(text: bytes) -> list[bytes]:
    return [line for line in text.splitlines() if line.strip()]


def _texts(record: Fields, rates: Mapping[str, float]) -> dict[str, list[bytes]]:
    """The texts of a record's caption fields, of those that have any.

    Raises:
      BadRecord: none has.
    """
    texts = {name: texts_of(record.get(name)) for name in rates}
    present = {name: each for name, each in texts.items() if each}
    if not present:
        missing = all(record.get(name) is None for name in rates)
        reason = "missing caption" if missing else "empty caption"
        raise BadRecord(reason, " and ".join(map(repr, rates)))
    return present


def _draws(seed: int, index: int) -> tuple[float, float]:
    seeds = np.asarray([[seed, index]], np.int64)
    return float(uniform(seeds, _FIELD_STREAM)[0]), float(uniform(seeds, _TEXT_STREAM)[0])


def texts_of(values: Sequence[bytes | int] | None) -> list[bytes]:
    """Those of a field's values that are texts with something in them."""
    return [value for value in values or () if isinstance(value, bytes) and value.strip()]


def clean(text: bytes) -> tuple[bytes, str]:
    """(at most MAX_BYTES of a text in valid UTF-8, what was mended or '')."""
    mended = ""
    if len(text) > MAX_BYTES:
        # UTF-8 is cut between characters: what follows the last whole one is dropped below.
        text, mended = text[:MAX_BYTES].decode("utf-8", "ignore").encode(), "long caption"
    if text.isascii():
        return text, mended
    try:
        text.decode()
    except UnicodeDecodeError:
        return text.decode("utf-8", "replace").encode(), "invalid UTF-8"
    return text, mended
