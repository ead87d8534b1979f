import gin
import pytest
from saved_runs import one_line_error

from clipa_t5x import gin_macros


@pytest.fixture(autouse=True)
def no_configuration():
    gin.clear_config()
    yield
    gin.clear_config()


def test_an_override_that_nothing_reads_is_named():
    gin.parse_config("RATE = 1\nOTHER = {'a': [%RATE]}\nTHIRD = %OTHER\nRATE2 = %THIRD\nX = 2")
    gin_macros.refuse_unread(["RATE = 1", "OTHER=3", "f.a = 2"])
    call = lambda: gin_macros.refuse_unread(["RATE = 1", "RATE2 = 3"])  # noqa: E731
    one_line_error(call, "macro RATE2", "Did you mean RATE?")
