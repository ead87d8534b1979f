"""Tables of work units whose folders are written by hand."""

import csv
import json

import pytest
from run_files import line, write
from saved_runs import one_line_error

from launch import job, results, sweep

SPEC = job.JobSpec(("gin/digits_stage1.gin",), "exp")


@pytest.fixture
def experiment(tmp_path):
    units = sweep.work_units(SPEC, ["RATE=[1e-3, 2e-3, 3e-3]"])
    results.write_experiment(str(tmp_path), units)
    metrics = line(10, loss=1.5, samples=80) + line(10, "inference_eval/zoo", accuracy=0.25)
    write(tmp_path / "RATE=1e-3", metrics, completed=True, total_steps=10)
    write(tmp_path / "RATE=2e-3", line(4, loss=2.5, samples=32), completed=False, total_steps=10)
    return tmp_path


def test_a_row_for_every_work_unit(experiment):
    text = results.write(str(experiment))
    rows = list(csv.DictReader((experiment / "results.csv").open()))
    assert [(r["RATE"], r["state"], r["step"]) for r in rows] == [
        ("1e-3", "completed", "10"),
        ("2e-3", "step 4 of 10", "4"),
        ("3e-3", "not begun", ""),
    ]
    assert (rows[0]["zoo/accuracy"], rows[0]["train/loss"]) == ("0.25", "1.5")
    assert rows[2]["train/loss"] == "" and "step 4 of 10" in text
    records = json.loads((experiment / "results.json").read_text())
    assert records[0]["metrics"] == {"train/loss": 1.5, "zoo/accuracy": 0.25}


def test_a_longer_sweep_goes_on_with_the_table(experiment):
    units = sweep.work_units(SPEC, ["RATE=[3e-3, 4e-3]"])
    results.write_experiment(str(experiment), units)
    assert [each.name for each in results.collect(str(experiment))] == [
        f"RATE={rate}" for rate in ("1e-3", "2e-3", "3e-3", "4e-3")
    ]


def test_other_folders_are_refused(tmp_path, capsys):
    one_line_error(lambda: results.collect(str(tmp_path)), "experiment.json", "launch.xm")
    assert results.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
