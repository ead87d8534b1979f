"""The bars of a run's wall time: their widths are the shares, in both colour schemes."""

import re
import xml.etree.ElementTree

import pytest
from run_files import line, schedule_of, write

from clipa_t5x import goodput_plot, report, run_history, wall_time


def write_times(folder, **seconds):
    record = wall_time.Line(1.7e9, 1.7e9 + sum(seconds.values()), 1, 0, 10, seconds, ended=True)
    (folder / wall_time.FILE).write_text(record.to_json() + "\n")


def bars(figure):
    """Widths of what is drawn, by the variable of its colour: lists, a bar after the other."""
    svg = xml.etree.ElementTree.fromstring(re.search("<svg.*</svg>", figure, re.DOTALL)[0])
    widths = {}
    for path in svg.iter("path"):
        color = re.search(r"fill: var\(--([\w-]+)", path.get("style") or "")
        corners = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", path.get("d"))]
        if color and len(corners) >= 4:
            widths.setdefault(color[1], []).append(max(corners) - min(corners))
    return widths


def test_a_run_without_record_has_no_bar(tmp_path):
    history = run_history.load(write(tmp_path, line(1, loss=1)))
    assert goodput_plot.figure([history]) == ""
    assert 'id="time"' not in report.render(history)


def test_widths_are_shares(tmp_path):
    schedule_of(tmp_path, "a_$1$", "b", "c")
    for name in ("a_$1$", "b", "c"):
        write(tmp_path / name, line(1, loss=1))
    write_times(tmp_path / "a_$1$", step=60, data_wait=15, init=25)
    write_times(tmp_path / "b", step=280, evaluation=20)
    page = report.render(run_history.load(tmp_path))
    figure = re.search("<figure><figcaption><strong>Goodput.*?</figure>", page, re.DOTALL)[0]
    assert "85.0% of 6 min 40 s went into steps that were kept; no restarts" in figure
    assert "a_$1$: goodput 60.0% of 1 min 40 s (data wait 15.0%, init 25.0%)" in figure
    assert "a_$1$</text>" in figure and "all stages</text>" in figure and ">c</text>" not in figure
    widths = bars(figure)
    legend = 1  # Each colour's last one is its mark in the legend.
    step = widths["series-1"][:-legend]
    assert step[0] / step[1] == pytest.approx(60 / 100 / (280 / 300), rel=1e-3)
    assert step[0] / step[2] == pytest.approx(60 / 100 / (340 / 400), rel=1e-3)
    assert widths["series-2"][0] / step[0] == pytest.approx(15 / 60, rel=1e-2)
    assert not {"series-4", "series-5", "series-6"} & widths.keys()
