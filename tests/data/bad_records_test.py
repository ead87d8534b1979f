import concurrent.futures

import pytest
from absl import logging

from clipa_t5x.data import bad_records
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.errors import UserError


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(logging, "warning", lambda *args: found.append(args[0] % args[1:]))
    return found


def test_counts_are_by_reason(warnings):
    records = bad_records.BadRecords()
    for i in range(3):
        records.add(BadRecord("truncated image", f"at {i}"), f"{i} of shard")
    records.add(BadRecord("missing caption"), "7 of shard")
    records.mend("CMYK")
    assert records.num_bad == 4
    assert records.counts() == {
        "bad/missing caption": 1, "bad/truncated image": 3, "mended/CMYK": 1,
    }  # fmt: skip
    assert "0 of shard" in warnings[0] and "truncated image: at 0" in warnings[0]


def test_the_log_is_bounded_and_counts_go_on(warnings):
    records = bad_records.BadRecords()
    for i in range(50):
        records.add(BadRecord("a"), f"{i}")
        records.add(BadRecord("b"), "always the same")
    assert sum("(a)" in line for line in warnings) == 10
    assert sum("(b)" in line for line in warnings) == 1
    assert "only counted" in [line for line in warnings if "(a)" in line][-1]
    assert records.counts() == {"bad/a": 50, "bad/b": 50}


def test_too_large_a_share_stops(warnings):
    records = bad_records.BadRecords()
    for i in range(60):
        records.add(BadRecord("not an image"), str(i))
    records.saw(255)
    records.check(0.01)  # too few to tell
    records.saw(745)
    records.check(0.06)
    with pytest.raises(UserError) as caught:
        records.check(0.05)
    message = str(caught.value)
    assert "60 of 1000 records are bad (6.0%; not an image 60)" in message
    assert "MAX_BAD_FRACTION 5.0%" in message and "\n" not in message


def test_threads_lose_nothing(warnings):
    records = bad_records.BadRecords()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(2000):
            pool.submit(records.add, BadRecord("x"), "y")
    assert records.num_bad == 2000


def test_giving_up_names_the_reasons(warnings):
    records = bad_records.BadRecords()
    records.saw(20)
    records.add(BadRecord("not an image"), "0 of shard")
    with pytest.raises(UserError, match=r"20 records .* all bad, and 1 of 20 .*\(not an image 1\)"):
        records.give_up(20)
