"""Pieces of pages; tests/report_test.py looks at whole ones."""

import json
import re

import pytest
from run_files import line, schedule_of, write
from run_tables_test import CLASS, CONFUSION, PARAMETER

from clipa_t5x import errors, report, report_page, run_history, run_tables

HOSTILE = "</td><script>alert(1)</script>\x1b[2J\u202e" + "y" * 900


def cells(page):
    rows = re.findall("<tr>(.*?)</tr>", page)
    return [[re.sub("<.*?>", "", cell) for cell in re.split("</t[hd]>", row)[:-1]] for row in rows]


def test_shardings_are_shown_largest_first():
    large = {**PARAMETER, "parameter": "z", "bytes": 4096}
    found = run_tables.sharding({"mesh": {"data": 8}, "parameters": [PARAMETER, large]})
    page = report_page.sharding(found, "sharding")
    assert cells(page)[1:] == [
        ["z", "4 x 8", "float32", "-, data+model", "4,096"],
        ["a/kernel", "4 x 8", "float32", "-, data+model", "32"],
    ]
    assert "Mesh: data=8. All parameters: 4,128 bytes per device." in page


def test_confusions_are_shown():
    page = report_page.confusion(run_tables.confusion(CONFUSION), "confusion")
    assert cells(page)[1:] == [["cat", "20.0%", "50", "dog (30), fox (10)"]]
    assert "The worst 1 class of 3 on 100 examples; 60.0% of all are correct." in page


def test_a_report_has_both_of_every_stage(tmp_path):
    schedule_of(tmp_path, "a", "b")
    for name in "ab":
        folder = write(tmp_path / name, line(1, loss=1))
        (folder / "sharding.json").write_text(json.dumps({"parameters": [PARAMETER]}))
        (folder / "confusion_zoo.json").write_text(json.dumps(CONFUSION))
    (folder / "confusion_other.json").write_text(json.dumps({**CONFUSION, "name": "other"}))
    page = report.render(run_history.load(tmp_path))
    assert re.findall("<details( open)?><summary>(.*?)</summary>", page) == [
        ("", "a: zoo"),
        (" open", "b: other"),
        (" open", "b: zoo"),
        ("", "a"),
        ("", "b"),
    ]


def test_strangers_names_are_text(tmp_path):
    names = {"class": HOSTILE, "confused_with": [{"class": HOSTILE, "examples": 1}]}
    confusion = {**CONFUSION, "name": HOSTILE, "worst": [{**CLASS, **names}]}
    write(tmp_path, line(1, loss=1))
    (tmp_path / "confusion_x.json").write_text(json.dumps(confusion))
    row = {**PARAMETER, "parameter": HOSTILE, "dtype": HOSTILE, "sharding": [HOSTILE, None]}
    (tmp_path / "sharding.json").write_text(json.dumps({"mesh": {HOSTILE: 1}, "parameters": [row]}))
    page = report.render(run_history.load(tmp_path))
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    assert page.count("&lt;/td&gt;&lt;script") == 7 and "y" * 201 not in page


def test_text_keeps_no_character_that_a_page_cannot_hold():
    text = report_page.escape("a\tb\n\x00\x1b[2J\x7f\x85\ud800é日🙂<")
    assert text == "a\tb\n\ufffd\ufffd[2J\ufffd\ufffd\ufffdé日🙂&lt;"
    text.encode()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": 3}', "[" * 100_000, "\xff"])
def test_what_cannot_be_read_is_told(text, tmp_path):
    write(tmp_path, line(1, loss=1))
    (tmp_path / "confusion_<b>.json").write_text(text, encoding="latin-1")
    page = report.render(run_history.load(tmp_path))
    assert "confusion_&lt;b&gt;.json" in page and "left out" in page
    assert 'id="confusion"' not in page


def test_a_page_that_cannot_be_written_is_a_users_mistake(tmp_path):
    with pytest.raises(errors.UserError, match="--output"):
        report_page.write(tmp_path / "none" / "page.html", "text")
