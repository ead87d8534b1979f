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
