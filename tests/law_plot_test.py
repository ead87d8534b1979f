import re
from xml.etree import ElementTree

from synthetic_sweeps import SIZES, run, runs, sweep

from clipa_t5x import inverse_scaling, law_plot


def test_every_axis_is_drawn_with_its_points_and_curves():
    law = inverse_scaling.analyse(sweep(runs()))
    page = law_plot.render(law, "a & b")
    assert page == law_plot.render(law, "a & b") and "a &amp; b" in page
    labels = re.findall(r'aria-label="(.*?)"', page)
    assert len([label for label in labels if "image tokens" in label.lower()]) >= 2
    assert "Accuracy against training FLOPs" in page and "<h3>Curves</h3>" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_pictures_are_files_of_their_own():
    law = inverse_scaling.analyse(sweep(runs()))
    files = law_plot.files(law)
    assert list(files) == ["image-accuracy", "image-drop", "image-trend", "compute"]
    for text in files.values():
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        names = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert not names & {"script", "image", "foreignObject"} and len(text) < 60_000
        # Which size is which.
        assert {"1M", "4M", "16M"} <= {element.text for element in root.iter()}


def test_colours_belong_to_sizes_in_all_pictures():
    text = [run(p, s, text_tokens=t, name=f"{p} {t}") for p in SIZES if p > 1_000_000
            for s, t in ((1.0, 8.0),)]  # fmt: skip
    law = inverse_scaling.analyse(sweep(runs() + text))
    pictures = [p for axis in law.axes for p in law_plot.axis_pictures(axis, law)]
    numbers = {size: number for p in pictures for size, number in p.sizes.items()}
    assert all(p.sizes.items() <= numbers.items() for p in pictures) and len(numbers) == 3
