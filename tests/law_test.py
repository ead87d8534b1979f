"""The door: a table, a page, CSV and JSON of a sweep on disk."""

import csv
import html.parser
import json

import pytest
from sweep_runs_test import make

from clipa_t5x import law


@pytest.fixture
def folder(tmp_path):
    for width in (32, 64, 128):
        for kept in (36, 18, 9, 4):
            drop = 6 / width * ((kept / 36) ** -0.4 - 1)
            make(tmp_path / "runs" / f"w{width}_k{kept}", width, kept, accuracy=0.7 - drop)
    make(tmp_path / "runs" / "<b>\x1b[2J", 32, 9, seed=1, completed=False, step=4)
    return tmp_path


def test_all_is_written(folder, capsys):
    output = folder / "law.html"
    status = law.main([str(folder / "runs"), f"--output={output}", "--csv", "--json"])
    printed = capsys.readouterr().out
    assert status == 0 and "Image tokens: " in printed and "\x1b" not in printed
    assert "Incomplete, and left out" in printed and "step 4 of 10" in printed
    rows = list(csv.DictReader((folder / "law.csv").open()))
    assert len(rows) == 13 and {row["model"] for row in rows} == {"32x4/8", "64x4/8", "128x4/8"}
    record = json.loads((folder / "law.json").read_text())
    assert record["axes"][0]["axis"] == "image"


def test_the_page_holds_no_script_and_fetches_nothing(folder):
    output = folder / "law.html"
    law.main([str(folder / "runs"), f"--output={output}"])
    text = output.read_text()
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.feed(text)
    assert not {tag for tag, _ in tags} & {"script", "iframe", "object", "embed"}
    assert "\x1b" not in text and "<b>\x1b" not in text and "http" not in text.split("<body>")[1]
    assert sum(attrs.get("class") == "plot" for _, attrs in tags) == 4
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_published_points(tmp_path, capsys):
    assert law.main(["--published", f"--output={tmp_path}/law.html"]) == 0
    assert "larger models lose less, as the inverse scaling law has it" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--published", "x"], ["none"], ["--metric=x", "."]])
def test_mistakes_are_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert law.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
