import pytest

from clipa_t5x import costs, plan_tables, published
from clipa_t5x.errors import UserError

RATE = costs.rate("A100-80G", 0.25, None)


def stages(name="H/14", count=3, samples=None):
    model = published.clip_model(name)
    lengths = [(84, 8), (224, 32), (336, 32)][:count]
    return [
        plan_tables.StagePlan(f"stage{i}", model, pixels, length, samples or 1000 * (i + 1))
        for i, (pixels, length) in enumerate(lengths)
    ]


def test_the_total_is_the_sum_of_the_stages():
    record = plan_tables.recipe_record(stages(), RATE)
    for key in ("samples", "training_flops", "chip_hours", "dollars"):
        total = sum(row[key] for row in record["stages"])
        assert record["total"][key] == pytest.approx(total)
    row = record["stages"][1]
    forward = row["image_forward_flops"] + row["text_forward_flops"]
    assert row["training_flops"] == 3 * forward * row["samples"] == 3 * forward * 2000
    assert record["expected_top1"] == []  # a thousandth of what is published
    text = plan_tables.recipe_table(record)
    assert [line.split()[0] for line in text.splitlines()[2:]] == [
        "stage0", "stage1", "stage2", "total"
    ]  # fmt: skip


def test_more_than_was_published_is_said_not_to_be_extrapolated():
    record = plan_tables.recipe_record(stages(samples=10**12), RATE)
    assert {row["data"]: row["top1"] for row in record["expected_top1"]} == {
        "DataComp-1B": 81.8, "LAION-2B": 79.1, "LAION-400M": 72.8
    }  # fmt: skip
    assert all("not extrapolated" in row["by"] for row in record["expected_top1"])


def test_without_a_price_there_is_no_cost():
    record = plan_tables.recipe_record(stages(), costs.rate("v5p", 0.4, None))
    assert record["total"]["dollars"] is None
    assert plan_tables.recipe_table(record).splitlines()[-1].endswith("  -")


def test_published_rows_stand_beside_their_figures():
    rows = plan_tables.published_records(RATE)
    assert [(row["listed_hours"], row["listed_dollars"]) for row in rows] == [
        (7776, 12247), (8640, 13616), (4008, 6318), (4520, 7124), (5920, 9324), (7776, 12247),
        (8640, 13616), (21998, 34646), (23742, 39056),
    ]  # fmt: skip
    for row in rows:
        # At the MFU that its hours imply, a row takes its hours.
        implied = costs.rate("A100-80G", row["implied_mfu"], None)
        assert implied.hours(row["training_flops"]) == pytest.approx(row["listed_hours"])
        assert 0.23 < row["implied_mfu"] < 0.28
    inconsistent = [row for row in rows if not row["is_consistent"]]
    assert [(row["model"], row["listed_hours"]) for row in inconsistent] == [("bigG/14", 23742)]
    flagged = plan_tables.published_table(rows).splitlines()[-1]
    assert "23,742 h x $1.575 = $37,394, but $39,056 is listed" in flagged


def test_a_budget_is_ranked_and_the_next_better_recipe_named():
    record = plan_tables.budget_record(RATE.budget_flops(None, 10_000.0), RATE)
    best = record["ranking"][0]
    assert (best["model"], best["data"], best["top1"]) == ("L/14", "DataComp-1B", 80.3)
    assert all(row["dollars"] <= 10_000 * (1 + 1e-9) for row in record["ranking"])
    assert record["next"]["dollars"] > 10_000 and record["next"]["top1"] == 81.1
    text = plan_tables.budget_table(record)
    assert "Nothing is extrapolated" in text
    assert text.splitlines()[-1].startswith("The next better published one, H/14 on DataComp-1B")
    assert plan_tables.budget_record(1e24, RATE)["next"] is None


def test_a_budget_that_buys_nothing_names_the_cheapest_recipe_and_its_cost():
    with pytest.raises(UserError, match=r"cheapest, S/16 .* takes 73 hours, \$114\.$"):
        plan_tables.budget_record(RATE.flops(10.0), RATE)


def test_cells_line_up_and_hold_nothing_that_moves_the_cursor():
    text = plan_tables.layout([["a", "bcd"], ["e\x1b\nf", "g"]])
    assert text == "a     bcd\n----  ---\ne  f    g"
