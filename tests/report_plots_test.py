"""Curves stay true when they are thinned; tests/report_test.py looks at them in a page."""

import math
import re

import pytest
from run_files import line, schedule_of, write

from clipa_t5x import report_plots, run_history


def two_stages(folder, *flops):
    schedule_of(folder, "a", "b")
    for name, per_example in zip("ab", flops, strict=True):
        metrics = "".join(line(s, loss=4 - s, samples=10 * s) for s in (1, 2))
        metrics += line(2, "inference_eval/z", accuracy=0.5)
        write(folder / name, metrics, train_flops_per_example=per_example)
    return run_history.load(folder)


def captions(page):
    """(title, text) of every panel, text without the lines that tell its curves apart."""
    found = re.findall("<figcaption><strong>(.*?)</strong> (.*?)</figcaption>", page)
    return [(title, re.sub("<.*?>", "", text)) for title, text in found]


def test_flops_go_on_from_stage_to_stage(tmp_path):
    history = two_stages(tmp_path, 7, 300)
    assert history.axes == ("samples", "training FLOPs")
    assert history.curve("train", "loss", "training FLOPs") == [
        [(70, 3), (140, 2)],
        [(140 + 3000, 3), (140 + 6000, 2)],
    ]
    assert history.spans("training FLOPs") == ((0, 140), (140, 6140))


def test_buttons_switch_between_axes(tmp_path):
    page = report_plots.curves([two_stages(tmp_path, 7, 300)])
    titles = re.findall("<strong>(.*?)</strong>", page)
    assert titles == ["Loss", "Zero-shot top-1"] * 2
    assert re.findall(r"Loss over ([\w ]+):", page) == ["samples", "training FLOPs"]
    assert page.count('type="radio"') == 2 and page.count(" checked>") == 1
    # The second stage is nearly all of the FLOPs: its curve begins near the left edge.
    assert page.count('<svg class="plot"') == 4
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("flops", [None, 0, -1, "many", math.nan, True])
def test_without_flops_there_are_samples_only(flops, tmp_path):
    history = two_stages(tmp_path, 7, flops)
    assert history.axes == ("samples",)
    page = report_plots.curves([history])
    assert "radio" not in page and "FLOPs" not in page and page.count('<svg class="plot"') == 2


def test_whatever_else_was_logged_has_a_panel(tmp_path):
    metrics = line(1, samples=8, spare_metric=1, data_wait_share=0.1)
    metrics += line(1, "training_eval/d", loss=2, accuracy=0.25)
    recalls = {f"image_to_text_recall_at_{k}": k / 10 for k in (1, 5)}
    metrics += line(
        1, "inference_eval/r", num_images=9, num_captions=45, **recalls, **{"<b>x": 3.5}
    )
    metrics += line(
        1, "inference_eval/c", num_examples=9, accuracy_top5=0.5, mean_per_class_recall=0.25
    )
    page = report_plots.curves([run_history.load(write(tmp_path, metrics))])
    assert captions(page) == [
        ("Loss", "last: 2"),
        ("Recall, image to text", "last: r R@1 10.0%, r R@5 50.0%"),
        ("Waiting for data", "last: 10.0%"),
        ("In-batch accuracy", "last: 25.0%"),
        ("Spare metric", "last: 1"),
        ("&lt;b&gt;x", "last: 3.5"),
        ("Accuracy top5", "last: 50.0%"),
        ("Mean per class recall", "last: 25.0%"),
    ]


def test_panels_for_other_metrics_are_bounded(tmp_path):
    metrics = line(1, samples=8, **{f"metric {i}": 1 for i in range(1000)})
    history = run_history.load(write(tmp_path, metrics))
    view = report_plots._View([history], [""], "samples")
    assert len(report_plots._plots(view)) == report_plots._MAX_OTHERS


def test_runs_share_panels_in_colours_of_their_own(tmp_path):
    histories = [
        two_stages(tmp_path / name, *flops) for name, flops in (("A", (7, 300)), ("B", (7, None)))
    ]
    page = report_plots.curves(histories, ["A", "B"])
    assert "radio" not in page and page.count('<svg class="plot"') == 2
    assert ("Loss", "last: A train 2, B train 2") in captions(page)
    curves = re.findall(r"<path d=\"M[^>]*fill: none; stroke: var\(--(series-\d)", page)
    # Loss: a line for every stage; accuracy: one.
    assert sorted(curves) == ["series-1"] * 3 + ["series-2"] * 3
    keys = re.findall(r'<path d="M0 4H24" fill="none" style="stroke: var\(--(series-\d)', page)
    assert keys == ["series-1", "series-2"] * 2


def test_more_curves_than_colours_take_several_panels(tmp_path):
    metrics = "".join(line(1, f"inference_eval/e{i}", accuracy=0.5) for i in range(14))
    page = report_plots.curves([run_history.load(write(tmp_path, line(1, samples=8) + metrics))])
    titles, texts = zip(*captions(page), strict=True)
    assert titles == tuple(f"Zero-shot top-1 ({i} of 3)" for i in (1, 2, 3))
    shown = [re.findall(r"(e\d+) 50.0%", text) for text in texts]
    assert [len(names) for names in shown] == [6, 6, 2]
    assert sum(shown, []) == [f"e{i}" for i in range(14)]
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_long_logs_are_thinned():
    points = [(float(x), float(x % 2)) for x in range(6000)]
    thinned = report_plots._thin(points)
    assert len(thinned) == 600 and thinned[0] == (4.5, 0.5)
    assert math.isnan(report_plots._thin([(0.0, math.nan), *points])[0][1])
    assert report_plots._thin(points[:600]) == points[:600]
