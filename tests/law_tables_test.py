import csv
import io

from synthetic_sweeps import runs, sweep

from clipa_t5x import inverse_scaling, law_tables


def law(**kwargs):
    return inverse_scaling.analyse(sweep(runs(**kwargs)))


def test_points_are_hundredths_with_their_deviation():
    assert law_tables.points(0.123, 0.004) == "12.3 ± 0.4"
    assert law_tables.points(-0.02, sign=True) == "-2.0"
    assert law_tables.share(1 / 9) == "11.1%"


def test_drops_and_residuals_have_a_row_for_every_cell():
    (axis,) = law().axes
    header, *rows = law_tables.drop_cells(axis)
    assert len(rows) == 12 and all(len(row) == len(header) for row in rows)
    assert rows[3][:3] == ["1M", "4", "11.1%"] and rows[3][5].startswith("24.0")
    assert all(row[-1].lstrip("+-") == "0.0" for row in rows)


def test_the_verdict_says_how_surely():
    (axis,) = law().axes
    text = law_tables.verdict(axis)
    assert "larger models lose less" in text and "over 3 sizes from 1,000,000 to 16M" in text


def test_csv_has_a_line_for_every_run():
    rows = list(csv.DictReader(io.StringIO(law_tables.to_csv(law(seeds=(0, 1))))))
    assert len(rows) == 24 and set(rows[0]) == set(law_tables.COLUMNS)
    assert float(rows[0]["value"]) == 0.7


def test_records_hold_no_nan():
    import json

    json.dumps(law_tables.to_record(law()), allow_nan=False)
