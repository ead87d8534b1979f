import re

from synthetic_sweeps import runs, sweep

from clipa_t5x import inverse_scaling, law_plot


def test_every_axis_is_drawn_with_its_points_and_curves():
    law = inverse_scaling.analyse(sweep(runs()))
    page = law_plot.render(law, "a & b")
    assert page == law_plot.render(law, "a & b") and "a &amp; b" in page
    labels = re.findall(r'aria-label="(.*?)"', page)
    assert len([label for label in labels if "image tokens" in label.lower()]) >= 2
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
