import json

import experiments
import pytest

from clipa_t5x import plan, published

PATHS = f"--gin_search_paths={experiments.GIN},{experiments.REPOSITORY}"


def test_bigg14s_recipe_is_the_published_one(tmp_path, capsys):
    """From gin alone: its stages' samples, tokens and masks make the published run's compute."""
    output, plot = tmp_path / "plan.json", tmp_path / "plan.html"
    arguments = [PATHS, "--gin_file=bigG14.gin", f"--output={output}", f"--plot={plot}"]
    assert plan.main([*arguments, "--mfu=0.4", "--chip=v6e"]) == 0
    record = json.loads(output.read_text())
    point = next(p for p in published.POINTS if p.accuracy == 83.0)
    assert record["recipe"]["total"]["training_flops"] == point.training_flops
    assert record["recipe"]["expected_top1"][0]["by"] == f"published: {point}"
    assert [
        (row["stage"], row["image_tokens"], row["text_tokens"])
        for row in record["recipe"]["stages"]
    ] == [("bigG14_stage1", 37, 8), ("bigG14_stage2", 154, 32), ("bigG14_stage3", 346, 32)]
    # Spread over 256 chips: 21 hours.
    assert record["recipe"]["total"]["chip_hours"] == pytest.approx(5402, abs=1)
    assert record["rate"] == {"name": "v6e", "peak": 918e12, "price": None, "mfu": 0.4}
    out = capsys.readouterr().out
    assert "v6e, 918 TFLOP/s bfloat16 peak, 0.4 MFU" in out
    assert "bigG14" in plot.read_text()


def test_stage_files_and_overrides(capsys, tmp_path):
    output = tmp_path / "plan.json"
    files = [f"--gin_file=shapes_stage{n}.gin" for n in (1, 2)]
    override = "--gin.TRAIN_SAMPLES=6400"
    assert plan.main([PATHS, *files, override, f"--output={output}"]) == 0
    record = json.loads(output.read_text())["recipe"]
    assert [row["samples"] for row in record["stages"]] == [6400, 6400]
    assert [row["pixels"] for row in record["stages"]] == [32, 48]
    assert record["expected_top1"] == []


def test_published_rows_and_a_budget_need_no_gin_file(capsys):
    assert plan.main(["--published", "--budget_hours=5000"]) == 0
    out = capsys.readouterr().out
    assert "$39,056 is listed" in out and "Nothing is extrapolated" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to plan"),
        (["--published", "--mfu=1.5"], "--mfu is 1.5"),
        (["--published", "--chip=v9"], "--chip is 'v9'"),
        (["--budget_hours=1", "--budget_dollars=1"], "given twice"),
        (["--budget_hours=1"], "cheapest"),
        (["--published", "--output=/no/such/folder/x.json"], "--output"),
        (["--gin_file=no_such.gin"], "no_such.gin"),
        ([PATHS, "--gin_file=shapes_stage1.gin", "--gin.TRAIN_SAMPELS=1"], "TRAIN_SAMPLES"),
        ([PATHS, "--gin_file=shapes_stage1.gin", "--gin.TRAIN_SAMPLES=1"], "less than one batch"),
        ([PATHS, "--gin_file=shapes.gin", "--gin.STAGES=[]"], "STAGES of shapes.gin is empty"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys):
    assert plan.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
