"""Two runs side by side, against files whose every number is known."""

import re

import pytest
from goodput_plot_test import write_times
from report_page_test import cells
from run_files import line, schedule_of, write

from clipa_t5x import compare, run_history

RECIPE = """import clipa_t5x.train
LR = {rate}
STEPS = 2
clipa_t5x.train.train:
    total_steps = %STEPS
    optimizer = @optimizers.adamw()
optimizers.adamw:
    learning_rate = %LR
    num_chunks = {chunks}
"""


def make(folder, loss=2.0, rate=0.1, stages=("s1", "s2"), chunks=1, **accuracy):
    schedule_of(folder, *stages)
    for name in stages:
        metrics = "".join(
            line(s, loss=loss + 2 - s, samples=10 * s, samples_per_second=5) for s in (1, 2)
        )
        for evaluator, value in accuracy.items():
            metrics += line(2, f"inference_eval/{evaluator}", accuracy=value, num_examples=4)
        write(folder / name, metrics, train_flops_per_example=100)
        (folder / name / "config.gin").write_text(RECIPE.format(rate=rate, chunks=chunks))
    return folder


@pytest.fixture
def page(tmp_path):
    a = make(tmp_path / "a", digits=0.5, odd=0.1)
    b = make(tmp_path / "<b>", loss=1.5, rate=0.2, stages=("s1",), chunks=9, digits=0.75)
    write_times(a / "s1", step=60, init=40)
    write_times(b / "s1", step=80, init=20)
    return compare.render(compare.load(a, b))


def rows(page, key):
    section = re.search(rf'<section aria-labelledby="{key}">.*?</section>', page, re.DOTALL)
    return cells(section[0])


def test_results_and_their_differences(page):
    assert rows(page, "results") == [
        ["last value or total", "A", "B", "B - A"],
        ["digits accuracy", "0.5", "0.75", "+0.25"],
        ["odd accuracy", "0.1", "-", "-"],
        ["train loss", "2", "1.5", "-0.5"],
        ["train samples per second", "5", "5", "+0"],
        ["samples", "40", "20", "-50.0%"],
        ["training FLOPs", "4k", "2k", "-50.0%"],
        ["training time", "8.0 s", "4.0 s", "-50.0%"],
        ["goodput", "60.0%", "80.0%", "+20.0 points"],
    ]


def test_stages_of_both_share_a_table(page):
    header, *body = rows(page, "summary")
    assert header[-3:] == ["top-1 digits", "top-1 odd", "training time"]
    assert [(row[0], *row[-3:-1]) for row in body] == [
        ("A s1", "50.0%", "10.0%"),
        ("A s2", "50.0%", "10.0%"),
        ("B s1", "75.0%", "-"),
    ]


def test_recipes_differ_in_what_trains(page):
    assert rows(page, "recipe") == [["parameter", "A", "B"], ["LR", "0.1", "0.2"]]
    assert "B has no stage here." in page
    # What changes no parameter is in the files' difference only.
    assert "\n-    num_chunks = 1\n+    num_chunks = 9" in page


def test_equal_recipes_say_so(tmp_path):
    runs = make(tmp_path / "a"), make(tmp_path / "b")
    page = compare.render(compare.load(*runs))
    assert page.count("Both would train the same.") == 2 and "differs in" not in page
    (runs[0] / "s1" / "config.gin").unlink()
    assert "A has no config.gin." in compare.render(compare.load(*runs))


def test_curves_and_times_are_of_both(page):
    assert page.count('type="radio"') == 2
    captions = re.findall("<figcaption>(.*?)</figcaption>", page)
    texts = [re.sub("<.*?>", "", caption) for caption in captions]
    text = "Zero-shot top-1 last: A digits 50.0%, B digits 75.0%, A odd 10.0%"
    assert texts.count(text) == 2
    assert "A 60.0% of 1 min 40 s" in page and "B 80.0% of 1 min 40 s" in page
    assert ">A s1</text>" in page and ">B s1</text>" in page
    assert "<b>," not in page and "&lt;b&gt; (1 stage)" in page


def test_runs_without_samples_are_compared_by_steps(tmp_path):
    a, b = write(tmp_path / "a", line(5, loss=1)), make(tmp_path / "b")
    histories = compare.load(a, b)
    assert run_history.common_axes(histories) == ("steps",)
    assert ["steps", "5", "4", "-20.0%"] in compare.result_cells(histories)
    assert 'id="curves">Over steps<' in compare.render(histories)


def test_the_console_gets_a_short_table(tmp_path, capsys):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", loss=3)
    output = tmp_path / "c.html"
    assert compare.main([str(a), str(b), f"--output={output}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["train", "loss", "2", "3", "+1"]
    assert lines[-1] == str(output) and output.read_text().endswith("</html>\n")


@pytest.mark.parametrize("bad", ["A", "B", "output"])
def test_mistakes_are_one_line(tmp_path, capsys, bad):
    run = str(make(tmp_path / "run"))
    none = str(tmp_path / "none")
    arguments = {"A": [none, run], "B": [run, none], "output": [run, run]}[bad]
    output = f"{none}/c.html" if bad == "output" else str(tmp_path / "c.html")
    assert compare.main([*arguments, f"--output={output}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and none in err
