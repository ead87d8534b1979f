import re

import pytest

from clipa_t5x import accuracy_curves, plan_plot, published
from clipa_t5x.errors import UserError

MARKS = [plan_plot.Mark("<b>$mine_$", 7.1e21, (83.0,)), plan_plot.Mark("budget", 1e25)]


def test_the_page_shows_every_point_and_mark_and_fetches_nothing(tmp_path):
    path = tmp_path / "plan.html"
    plan_plot.write(path, MARKS, ["a <table>"])
    page = path.read_text()
    for curve in accuracy_curves.curves():
        assert f"{curve.model}, {curve.data}" in page
    assert page.count("<tr>") == 1 + len(published.POINTS)
    assert "&lt;b&gt;$mine_$" in page and "<b>$mine_$" not in page
    assert "a &lt;table&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)
    assert page == plan_plot.render(MARKS, ["a <table>"])
    assert page != plan_plot.render(MARKS[:1], ["a <table>"])
    assert [p.name for p in tmp_path.iterdir()] == ["plan.html"]


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot write .*--plot"):
        plan_plot.write(tmp_path / "no" / "plan.html", [], [])
