"""Pages in a real browser: sections are there, figures are drawn, nothing is fetched, buttons act.

Pages hold no scripts; what they look like is measured by screenshots, in which a browser draws only
what the page's own policy lets through.
"""

import html.parser
import io
import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from goodput_plot_test import write_times
from PIL import Image
from report_test import STAGES, write_run
from run_tables_test import CONFUSION, PARAMETER

from clipa_t5x import compare, report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome in PATH")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
WIDTH, HEIGHT = 1200, 6000


@pytest.fixture(scope="session")
def open_page(tmp_path_factory):
    """Returns a function that opens a file with further flags; gives what the browser prints."""
    profiles = itertools.count()

    def call(path, *flags):
        # A profile that another browser holds would end this one at once.
        profile = tmp_path_factory.mktemp(f"profile{next(profiles)}")
        command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *flags, path.as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=120, check=True)
        return done.stdout.decode()

    return call


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """report.html of a schedule of two stages, and compare.html of it and a part of it."""
    folder = tmp_path_factory.mktemp("runs") / "two stages"
    folder.mkdir()
    stages = STAGES[1:]
    (folder / "schedule.json").write_text(json.dumps({"stages": [each[0] for each in stages]}))
    for stage, flops in zip(stages, (3e9, 9e9), strict=True):
        run = folder / stage[0]
        write_run(run, stage, gallery=stage is stages[-1])
        info = json.loads((run / "stage.json").read_text())
        (run / "stage.json").write_text(json.dumps({**info, "train_flops_per_example": flops}))
        sharding = {"mesh": {"data": 2}, "parameters": [PARAMETER] * 3}
        (run / "sharding.json").write_text(json.dumps(sharding))
        (run / "confusion_zoo.json").write_text(json.dumps(CONFUSION))
        write_times(run, step=60, data_wait=15, init=25)
    output = folder / "compare.html"
    assert compare.main([str(folder), str(folder / stages[0][0]), f"--output={output}"]) == 0
    return {"report": report.write_report(folder), "compare": output}


class Elements(html.parser.HTMLParser):
    """Start tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("report", ["summary", "time", "curves", "confusion", "gallery", "sharding", "stages"]),
        ("compare", ["results", "summary", "recipe", "time", "curves"]),
    ],
)
def test_the_browser_finds_every_section_and_fetches_nothing(pages, open_page, name, sections):
    elements = Elements(open_page(pages[name], "--dump-dom")).found
    found = [attrs["id"] for tag, attrs in elements if tag == "h2"]
    assert found == sections
    assert sum(attrs.get("class") == "plot" for _, attrs in elements) == 2 * 10 + 1
    assert not [tag for tag, _ in elements if tag in ("script", "iframe", "object", "embed")]
    links = [v for _, attrs in elements for k, v in attrs.items() if k in ("src", "href")]
    links += [v for _, attrs in elements for k, v in attrs.items() if k == "xlink:href"]
    assert links and all(link.startswith(("data:", "#")) for link in links)


def screenshot(open_page, path, folder):
    shot = folder / "shot.png"
    open_page(path, f"--screenshot={shot}", f"--window-size={WIDTH},{HEIGHT}")
    return np.asarray(Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")).astype(int)


def rows_with(picture, color, tolerance=30):
    """Of the picture, those rows that have a pixel of about this colour: '#1f6fb4'."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return np.flatnonzero((np.abs(picture - wanted).max(-1) < tolerance).any(-1))


@pytest.mark.parametrize("name", ["report", "compare"])
def test_figures_are_drawn_and_buttons_switch_between_them(pages, open_page, tmp_path, name):
    """The second button is pushed in the file, as there is no hand here to push it."""
    text = pages[name].read_text()
    other = text.replace(" checked>", ">").replace('id="axis-1">', 'id="axis-1" checked>')
    # In either, only the shown panels keep their curves: others would not be missed otherwise.
    pictures = {}
    for axis, page in (("samples", text), ("flops", other)):
        path = tmp_path / f"{axis}.html"
        path.write_text(page)
        pictures[axis] = screenshot(open_page, path, tmp_path)
        curve = rows_with(pictures[axis], "#1f6fb4")
        # Ten panels under each other by twos or threes, and the bars of time above them.
        assert len(curve) > 400 and curve.max() - curve.min() > 1000
    assert pictures["samples"].shape == pictures["flops"].shape == (HEIGHT, WIDTH, 3)
    changed = np.flatnonzero((pictures["samples"] != pictures["flops"]).any((1, 2)))
    assert len(changed) > 200
    # The page is as long with either: one set of panels takes the other's place.
    lengths = [np.flatnonzero((p != p[-1, 0]).any((1, 2))).max() for p in pictures.values()]
    assert abs(lengths[0] - lengths[1]) < 100 and max(lengths) < HEIGHT - 10


def test_a_page_without_its_curves_is_told_apart(pages, open_page, tmp_path):
    """The measure of the test above finds nothing where nothing is drawn."""
    path = tmp_path / "blank.html"
    path.write_text(re.sub("<svg.*?</svg>", "", pages["compare"].read_text(), flags=re.DOTALL))
    assert len(rows_with(screenshot(open_page, path, tmp_path), "#1f6fb4")) < 100
