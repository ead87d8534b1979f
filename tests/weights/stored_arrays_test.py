import pytest

from clipa_t5x.weights import stored_arrays


@pytest.mark.parametrize("fact", ["two\nlines.", " \x0b much   space ", ValueError("a\n\nb")])
def test_a_refusal_is_one_line(fact):
    message = str(stored_arrays.refusal("w.npz", fact))
    assert len(message.splitlines()) == 1
    assert message.startswith("w.npz cannot be read: ")
    assert ".." not in message
