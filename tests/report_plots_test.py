"""Curves stay true when they are thinned; tests/report_test.py looks at them in a page."""

import math

from clipa_t5x import report_plots


def test_long_logs_are_thinned():
    points = [(float(x), float(x % 2)) for x in range(6000)]
    thinned = report_plots._thin(points)
    assert len(thinned) == 600 and thinned[0] == (4.5, 0.5)
    assert math.isnan(report_plots._thin([(0.0, math.nan), *points])[0][1])
    assert report_plots._thin(points[:600]) == points[:600]
