"""Sizes of images and lengths of captions, counted record by record and summed over shards."""

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

# What is counted: pixels, bytes as stored, words between spaces, bytes of UTF-8.
NAMES = ("width", "height", "short_side", "image_bytes", "caption_words", "caption_bytes")
_PERCENTILES = (5, 25, 50, 75, 95)


class RecordStatistics:
    """How often each value was seen. Sizes of files are rounded to two digits: there are many."""

    def __init__(self) -> None:
        self._counts = {name: collections.Counter[int]() for name in NAMES}

    def add_record(self, features: Mapping[str, Any], caption_names: Iterable[str]) -> None:
        """Counts a record.

        Args:
          features: 'height', 'width' (pixels), 'jpg' (bytes) and captions (lists of bytes).
          caption_names: of the captions that are counted, where the record has them.
        """
        height, width = features["height"], features["width"]
        self._counts["height"][height] += 1
        self._counts["width"][width] += 1
        self._counts["short_side"][min(height, width)] += 1
        self._counts["image_bytes"][_two_digits(len(features["jpg"]))] += 1
        for name in caption_names:
            for caption in features.get(name, ()):
                self._counts["caption_words"][len(caption.split())] += 1
                self._counts["caption_bytes"][len(caption)] += 1

    def to_json(self) -> dict[str, list[list[int]]]:
        """Everything counted: [value, how often] of each quantity, the least value first."""
        return {
            name: [list(item) for item in sorted(counts.items())]
            for name, counts in self._counts.items()
        }

    def add_json(self, counts: Mapping[str, list[list[int]]]) -> None:
        """Adds what another one's `to_json` returned."""
        for name, items in counts.items():
            self._counts[name].update(dict((value, n) for value, n in items))

    def summary(self) -> dict[str, dict[str, Any]]:
        """By quantity that was seen: min, mean, max, percentiles ('p5', ...) of its values."""
        return {name: summarize(counts) for name, counts in self._counts.items() if counts}


def _two_digits(number: int) -> int:
    digits = max(len(str(number)) - 2, 0)
    return round(number, -digits)


def summarize(counts: Mapping[int, int]) -> dict[str, Any]:
    """Min, mean, max and percentiles of values that were seen so often; none may be empty.

    A percentile is the least value that so many percent of what was seen do not exceed.
    """
    values = sorted(counts)
    total = sum(counts.values())
    mean = sum(value * n for value, n in counts.items()) / total
    result: dict[str, Any] = {"min": values[0], "mean": round(mean, 3), "max": values[-1]}
    passed, left = 0, list(_PERCENTILES)
    for value in values:
        passed += counts[value]
        while left and passed >= math.ceil(total * left[0] / 100):
            result[f"p{left.pop(0)}"] = value
    return result
