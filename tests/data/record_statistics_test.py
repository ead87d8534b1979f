import json

import numpy as np

from clipa_t5x.data import record_statistics


def test_percentiles_are_numpys():
    values = np.random.default_rng(0).integers(0, 50, 997)
    found = record_statistics.summarize(dict(zip(*np.unique(values, return_counts=True))))  # noqa: B905
    for name in ("min", "max"):
        assert found[name] == getattr(values, name)()
    assert abs(found["mean"] - values.mean()) < 1e-3
    for percent in (5, 25, 50, 75, 95):
        expected = np.percentile(values, percent, method="inverted_cdf")
        assert found[f"p{percent}"] == expected


def test_one_value():
    assert set(record_statistics.summarize({7: 3}).values()) == {7}


def test_parts_add_up():
    records = [
        {"height": 10 + i, "width": 30, "jpg": b"x" * (1000 + i), "txt": [b"a b"] * (i % 3)}
        for i in range(20)
    ]
    whole, parts = record_statistics.RecordStatistics(), record_statistics.RecordStatistics()
    for record in records:
        whole.add_record(record, ["txt"])
        part = record_statistics.RecordStatistics()
        part.add_record(record, ["txt"])
        parts.add_json(json.loads(json.dumps(part.to_json())))
    assert parts.to_json() == whole.to_json()
    summary = whole.summary()
    assert summary["short_side"]["max"] == 29
    assert summary["image_bytes"]["p50"] == 1000
    assert summary["caption_words"]["mean"] == 2
    assert sum(n for _, n in whole.to_json()["caption_bytes"]) == 19


def test_nothing_seen():
    assert record_statistics.RecordStatistics().summary() == {}
