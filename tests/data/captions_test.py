import numpy as np
import pytest

from clipa_t5x.data import captions, splitmix
from clipa_t5x.data.bad_records import BadRecord


def choose(record, rates=None, index=0, seed=0):
    return captions.choose(record, rates or {"txt": 1.0}, seed, index)


def test_one_caption_is_taken_as_it_is():
    assert choose({"txt": [b"a red cat"]}) == (b"a red cat", "")
    assert choose({"txt": ["\u732b".encode()]}) == ("\u732b".encode(), "")


def test_fields_are_taken_by_their_rates():
    record = {"txt": [b"original"], "synthetic": [b"synthetic"]}
    rates = {"txt": 1.0, "synthetic": 3.0}
    taken = [choose(record, rates, index)[0] for index in range(4000)]
    # Binomial(4000, 3/4) has deviation 27.
    assert abs(taken.count(b"synthetic") - 3000) < 5 * 27
    assert taken == [choose(record, rates, index)[0] for index in range(4000)]
    assert taken != [choose(record, rates, index, seed=1)[0] for index in range(4000)]


def test_a_rate_of_zero_is_a_fallback():
    record = {"txt": [b"original"], "synthetic": [b"synthetic"]}
    rates = {"txt": 0.0, "synthetic": 1.0}
    assert {choose(record, rates, i)[0] for i in range(100)} == {b"synthetic"}
    assert choose({"txt": [b"original"]}, rates)[0] == b"original"


def test_texts_of_one_field_are_equally_likely():
    record = {"txt": [b"a", b"b", b"c", b" "]}
    taken = [choose(record, index=index)[0] for index in range(3000)]
    counts = [taken.count(text) for text in (b"a", b"b", b"c")]
    assert sum(counts) == 3000 and np.abs(np.array(counts) - 1000).max() < 5 * 26


def test_what_is_missing_leaves_its_share_to_others():
    rates = {"txt": 0.5, "synthetic": 0.5}
    for record in ({"txt": [b"x"]}, {"txt": [b"x"], "synthetic": [b""]}):
        assert {choose(record, rates, i)[0] for i in range(50)} == {b"x"}


@pytest.mark.parametrize("record, reason", [
    ({}, "missing caption"), ({"txt": []}, "empty caption"), ({"txt": [b" \n\t"]}, "empty caption"),
    ({"txt": [3]}, "empty caption"),
])  # fmt: skip
def test_no_caption_is_a_bad_record(record, reason):
    with pytest.raises(BadRecord) as caught:
        choose(record)
    assert caught.value.reason == reason


def test_text_that_is_no_utf8_is_mended():
    text, mended = choose({"txt": [b"caf\xe9 au lait"]})
    assert (text.decode(), mended) == ("caf\ufffd au lait", "invalid UTF-8")


@pytest.mark.parametrize("character", ["a", "\u00e9", "\u732b"])
def test_endless_captions_are_cut_between_characters(character):
    text, mended = choose({"txt": [(character * 100_000).encode()]})
    assert mended == "long caption"
    assert captions.MAX_BYTES - 3 < len(text) <= captions.MAX_BYTES
    assert set(text.decode()) == {character}


def test_draws_are_uniform_and_their_streams_independent():
    seeds = np.stack([np.zeros(4000, np.int64), np.arange(4000)], axis=1)
    draws = np.stack([captions.uniform(seeds, stream) for stream in (1, 2, 1001, 1002)])
    counts = np.stack([np.histogram(row, 10, (0, 1))[0] for row in draws])
    assert np.abs(counts - 400).max() < 5 * 19
    assert np.abs(np.corrcoef([*draws, splitmix.uniform(seeds, 1).numpy()[:, 0]])
                  - np.eye(5)).max() < 0.08  # fmt: skip
    assert np.abs(np.corrcoef(draws[0, :-1], draws[0, 1:])[0, 1]) < 0.08


@pytest.mark.parametrize("record, most, found", [
    ({"txt": [b"one\ntwo\r\n\n three  words \n"]}, 5, b"one\ntwo\nthree words"),
    ({"txt": [b"one\ntwo", b"three"]}, 5, b"one two\nthree"),
    ({"txt": [b"one\ntwo\nthree"]}, 2, b"one\ntwo"),
    ({"txt": [b"a", b" ", b"b"], "more": [b"c\nd"], "unused": [b"e"]}, 3, b"a\nb\nc"),
])  # fmt: skip
def test_all_captions_are_taken_in_order(record, most, found):
    rates = {"txt": 1.0, "more": 0.5, "unused": 0.0}
    assert captions.every(record, rates, most) == (found, "")


def test_all_captions_are_mended_and_missing_as_one_is():
    assert captions.every({"txt": [b"a", b"\xff"]}, {"txt": 1.0}, 5) == (
        "a\n\ufffd".encode(), "invalid UTF-8",
    )  # fmt: skip
    with pytest.raises(BadRecord, match="missing caption"):
        captions.every({}, {"txt": 1.0}, 5)
    with pytest.raises(BadRecord, match="empty caption"):
        captions.every({"txt": [b" \n "]}, {"txt": 1.0}, 5)
