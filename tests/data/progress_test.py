import io

from clipa_t5x.data import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_stays_on_one_line():
    stream = Terminal()
    counter = progress.Progress(3, stream)
    for _ in range(3):
        counter.count()
    assert stream.getvalue().startswith("\r")
    assert stream.getvalue().count("\n") == 1
    assert "3/3 records" in stream.getvalue()


def test_progress_elsewhere_reports_every_few_seconds(monkeypatch):
    clock = iter(range(100, 200, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    counter = progress.Progress(10, stream)
    for _ in range(10):
        counter.count()
    lines = stream.getvalue().splitlines()
    # One record every two seconds from the first on; six still to come after the fourth.
    assert lines[0] == "4/10 records, 0.5/s, ETA 12 s"
    assert lines[-1].startswith("10/10 records")
    assert len(lines) == 3


def test_several_are_counted_at_once(monkeypatch):
    clock = iter(range(100, 200, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    counter = progress.Progress(1000, stream)
    counter.count(0)
    for _ in range(3):
        counter.count(200)
    # What the first report brought took an unknown time.
    assert stream.getvalue().splitlines()[-1] == "600/1000 records, 20/s, ETA 20 s"


def test_what_is_counted_is_named():
    stream = io.StringIO()
    progress.Progress(1, stream, "shards").count()
    assert stream.getvalue().startswith("1/1 shards, ")
