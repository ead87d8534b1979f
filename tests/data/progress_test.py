import io
import re

from clipa_t5x.data import progress


def test_the_last_line_says_that_all_is_done():
    stream = io.StringIO()
    counter = progress.Progress(3, stream, "shards")
    for _ in range(3):
        counter.count()
    (line,) = stream.getvalue().splitlines()
    assert re.fullmatch(r"3/3 shards, [\d.]+/s, ETA 0 s", line)


def test_a_terminal_is_written_to_in_place():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    counter = progress.Progress(2, stream)
    counter.count()
    counter.count()
    assert stream.getvalue().startswith("\r") and stream.getvalue().endswith("\n")
    assert "2/2 records" in stream.getvalue()
