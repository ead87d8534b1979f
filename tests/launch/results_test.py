"""What came of an experiment's work units: read off their MODEL_DIRs, printed, and written."""

import csv
import json

import pytest
from saved_runs import one_line_error

from clipa_t5x import wall_time
from launch import job, results, sweep


def write_run(folder, steps, total_steps, starts=1, loss=0.5):
    """A MODEL_DIR of a run that logged every step and an accuracy at its end."""
    folder.mkdir(parents=True)
    lines = [
        {"step": i, "time": 1.0 * i, "group": "train", "values": {"loss": loss / i, "samples": i}}
        for i in range(1, steps + 1)
    ]
    lines.append(
        {"step": steps, "time": 9.0, "group": "inference_eval/digits", "values": {"accuracy": 0.25}}
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage = {"total_steps": total_steps, "completed": steps == total_steps}
    (folder / "stage.json").write_text(json.dumps(stage))
    (folder / "goodput.jsonl").write_text(
        "".join(
            wall_time.Line(start, start + 0.5, 0, 0, 1, {}).to_json() + "\n"
            for start in range(1, starts + 1)
        )
    )


@pytest.fixture
def record(tmp_path):
    """Five work units: done, failed, stopped, killed with its launcher, and waiting."""
    spec = job.JobSpec(("a.gin",), str(tmp_path))
    units = sweep.work_units(spec, ["LR=[1e-3, 2e-3] x N=[1, 2]", "NAME=['a,b']"])
    record = results.Record.begin(tmp_path, units)
    for unit, steps, starts in zip(units, (8, 4, 2, 1), (3, 1, 1, 1), strict=False):
        write_run(tmp_path / unit.name, steps, 8, starts)
    for unit, status in zip(units, (0, 1, 75), strict=False):
        record.ended(unit.name, status)
    return record


def test_a_row_for_every_work_unit_whatever_became_of_it(record):
    table = results.rows(results.Record.read(record.folder))
    assert [each["state"] for each in table] == [
        "done", "failed (1)", "stopped", "not done", "not begun",
    ]  # fmt: skip
    assert [each["step"] for each in table] == [8, 4, 2, 1, None]
    assert [each["restarts"] for each in table] == [2, 0, 0, 0, 0]
    assert table[0]["overrides"] == {"LR": "1e-3", "N": "1"}
    assert table[0]["metrics"]["train/loss"] == 0.5 / 8
    assert table[0]["metrics"]["inference_eval/digits/accuracy"] == 0.25


def test_of_what_is_in_a_bucket_nothing_is_told(tmp_path):
    units = sweep.work_units(job.JobSpec(("a.gin",), "gs://b/sweep"), ["N=[1]"])
    [row] = results.rows(results.Record.begin(tmp_path, units))
    assert row["state"] == "remote, not read" and row["step"] is None


def test_the_table_is_printed_and_written(record, capsys):
    assert results.main([str(record.folder)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "LR N NAME state step train loss top-1 digits restarts"
    assert lines[2] == "1e-3 1 - done 8 of 8 0.0625 25.0% 2"
    assert lines[-1] == "- - 'a,b' not begun - - - 0"
    with (record.folder / results.CSV_FILE).open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 5
    assert written[0]["LR"] == "1e-3" and written[0]["train/loss"] == "0.0625"
    assert written[4]["NAME"] == "'a,b'" and written[4]["step"] == ""
    content = json.loads((record.folder / results.JSON_FILE).read_text())
    assert [each["step"] for each in content["work_units"]] == [8, 4, 2, 1, None]


def test_a_loss_that_is_no_number_is_null_in_json(tmp_path):
    unit = results.Unit("u", {}, str(tmp_path / "u"))
    write_run(tmp_path / "u", 1, 1, loss=float("nan"))
    [written] = json.loads(results.as_json([results.row(unit)]))["work_units"]
    assert written["metrics"]["train/loss"] is None


def test_a_longer_sweep_in_the_same_folder_keeps_what_was_there(record):
    units = sweep.work_units(job.JobSpec(("a.gin",), str(record.folder)), ["N=[3]", "NAME=['a,b']"])
    later = results.Record.begin(record.folder, units)
    assert [unit.name for unit in later.units[:4]] == [unit.name for unit in record.units[:4]]
    assert len(later.units) == 6 and later.units[0].status == 0


def test_a_folder_that_is_no_experiment_is_refused_in_one_line(tmp_path, capsys):
    assert results.main([str(tmp_path / "none")]) == 2
    assert "give the folder of an experiment" in capsys.readouterr().err
    for content in ("[]", "{", '{"work_units": [{"nam": 1}]}'):
        (tmp_path / results.RECORD_FILE).write_text(content)
        one_line_error(lambda: results.Record.read(tmp_path), "no record of an experiment")
