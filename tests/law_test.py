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
    status = law.main([str(folder / "runs"), f"--output={output}", "--csv", "--json", "--svg"])
    printed = capsys.readouterr().out
    assert status == 0 and "Image tokens: " in printed and "\x1b" not in printed
    assert "Incomplete, and left out" in printed and "step 4 of 10" in printed
    rows = list(csv.DictReader((folder / "law.csv").open()))
    assert len(rows) == 13 and {row["model"] for row in rows} == {"32x4/8", "64x4/8", "128x4/8"}
    record = json.loads((folder / "law.json").read_text())
    assert record["axes"][0]["axis"] == "image"
    assert (folder / "law_image-drop.svg").read_text().startswith("<svg")
    paths = [line for line in printed.splitlines() if line.startswith(str(folder))]
    assert sorted(paths) == sorted(map(str, folder.glob("law*"))) and len(paths) == 7


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


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "name MODEL_DIRs"),
        (["--published", "x"], "or two things"),
        (["none"], "'none' does not exist"),
        (["empty"], "no run in 'empty'"),
        (["--metric=x", "runs"], "--metric=x: they have zoo accuracy"),
        (["--evaluator=y", "runs"], "--evaluator=y: they have zoo accuracy"),
        (["runs", "--output=no/law.html"], "cannot write 'no/law.html'"),
        (["runs", "--output=law.csv", "--csv"], "name it .html"),
    ],
)
def test_mistakes_are_one_line(arguments, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "a")
    (tmp_path / "empty").mkdir()
    assert law.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and part in err
