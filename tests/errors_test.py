import math

import pytest

from clipa_t5x import errors


@pytest.mark.parametrize("value, minimum, whole", [(1, 1, True), (0.5, 0, False), (3, 0.5, False)])
def test_numbers_pass(value, minimum, whole):
    errors.check_number("X", value, minimum=minimum, whole=whole)


@pytest.mark.parametrize(
    "value, whole, message",
    [
        (0, True, "X is 0; it must be an integer of at least 1."),
        (2.0, True, "X is 2.0; it must be an integer of at least 1."),
        (True, True, "X is True; it must be an integer of at least 1."),
        ("2", False, "X is '2'; it must be a number of at least 1."),
        (None, False, "X is None; it must be a number of at least 1."),
        (math.nan, False, "X is nan; it must be a number of at least 1."),
    ],
)
def test_anything_else_is_told(value, whole, message):
    with pytest.raises(errors.UserError) as caught:
        errors.check_number("X", value, minimum=1, whole=whole)
    assert str(caught.value) == message


def test_what_cannot_be_printed_is_escaped():
    message = str(errors.UserError("field 'a\x1b[2J\u202e\ud800' of größe\nsecond line"))
    assert message == "field 'a\\x1b[2J\\u202e\\ud800' of größe\nsecond line"
    message.encode()


def test_of_a_very_long_line_the_middle_is_left_out():
    message = str(errors.UserError(f"{'a' * 10_000} Set X.\n{'b' * 1400}"))
    first, second = message.split("\n")
    assert len(first) < 1400 and first.endswith("aa Set X.") and " ... " in first
    assert second == "b" * 1400
    assert str(errors.UserError(message)) == message
