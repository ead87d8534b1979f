import csv
import io
import json

from synthetic_sweeps import SHARES, SIZES, run, runs, sweep

from clipa_t5x import inverse_scaling, law_tables


def law(**kwargs):
    return inverse_scaling.analyse(sweep(runs(**kwargs)))


def test_points_are_hundredths_with_their_deviation():
    assert law_tables.points(0.123, 0.004) == "12.3 ± 0.4"
    assert law_tables.points(-0.02, sign=True) == "-2.0"
    assert law_tables.points(-0.0001, sign=True) == law_tables.points(0.0001, sign=True) == "0.0"
    assert law_tables.points(float("nan"), 0.1) == law_tables.MISSING
    assert law_tables.share(1 / 9) == "11.1%"


def test_drops_and_residuals_have_a_row_for_every_cell():
    (axis,) = law().axes
    header, *rows = law_tables.drop_cells(axis)
    assert len(rows) == 12 and all(len(row) == len(header) for row in rows)
    assert rows[3][:3] == ["1M", "4", "11.1%"] and rows[3][5].startswith("24.0")
    assert all(row[-1] == "0.00" for row in rows)


def test_the_verdict_says_how_surely():
    (axis,) = law().axes
    text = law_tables.verdict(axis)
    assert "larger models lose less" in text and "over 3 sizes from 1,000,000 to 16M" in text


def test_a_slope_within_its_deviation_says_nothing():
    same = [run(p, s, 0, 0.7 - 0.1 * (1 - s)) for p in SIZES for s in SHARES]
    (axis,) = inverse_scaling.analyse(sweep(same)).axes
    assert "do not tell whether larger models lose less" in law_tables.verdict(axis)
    more = [run(p, s, 0, 0.7 - p / 4e7 * (1 - s)) for p in SIZES for s in SHARES]
    (axis,) = inverse_scaling.analyse(sweep(more)).axes
    assert "against the inverse scaling law" in law_tables.verdict(axis)
    (axis,) = inverse_scaling.analyse(sweep(r for r in same if r.size.params == 4_000_000)).axes
    assert "say nothing of the law" in law_tables.verdict(axis)


def test_what_is_left_out_is_said_once():
    few = [r for r in runs() if r.image_area > 0.2]
    few.append(run(1_000_000, 0.1, missing="step 3 of 9", name="late"))
    few.append(run(1_000_000, 0.1, text_tokens=8.0, name="both"))
    remarks = law_tables.remarks(inverse_scaling.analyse(sweep(few)))
    curve, incomplete, beside = remarks
    assert curve.startswith("Image tokens: no curve through 3") and "(1M, 4M, 16M)" in curve
    assert "late (step 3 of 9)" in incomplete and beside.startswith("1 completed run with fewer")


def test_of_runs_with_the_same_tokens_it_says_that_there_is_no_drop():
    alike = [run(params, 1.0) for params in SIZES]
    (remark,) = law_tables.remarks(inverse_scaling.analyse(sweep(alike)))
    assert remark.startswith("No size has runs with different numbers of one kind of tokens")


def test_a_name_is_no_formula_of_a_spreadsheet():
    law = inverse_scaling.analyse(sweep([run(1_000_000, 1.0, name="=cmd()")]))
    assert "\n'=cmd()," in law_tables.to_csv(law)


def test_csv_has_a_line_for_every_run():
    rows = list(csv.DictReader(io.StringIO(law_tables.to_csv(law(seeds=(0, 1))))))
    assert len(rows) == 24 and set(rows[0]) == set(law_tables.COLUMNS)
    assert float(rows[0]["value"]) == 0.7


def test_records_hold_no_nan():
    json.dumps(law_tables.to_record(law()), allow_nan=False)
