import json
import math

import pytest
from run_files import line, write

from clipa_t5x import evaluation_records, run_history

RECORD = evaluation_records.Evaluation(
    20, 1.7e9, {"inference_eval/digit": {"accuracy": 0.5, "recall/at_1": math.nan}, "e": {"x": 1.0}}
)


def test_a_record_is_read_as_it_was_written():
    text = RECORD.to_json()
    again = evaluation_records.parse(text)
    assert again is not None and again.to_json() == text
    assert again.value("inference_eval/digit/accuracy") == 0.5
    assert again.value("inference_eval/digit/loss") is None
    nested = again.value("inference_eval/digit/recall/at_1")
    assert nested is not None and math.isnan(nested)


def test_half_a_record_is_none():
    text = RECORD.to_json().rstrip()
    assert not [n for n in range(len(text)) if evaluation_records.parse(text[:n]) is not None]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[" * 100_000,
        '{"step": 1, "time": 0}',
        '{"step": true, "time": 0, "results": {}}',
        '{"step": 1, "time": 0, "results": []}',
        '{"step": 1, "time": 0, "results": {"a": {"b": "c"}}}',
        '{"step": 1, "time": 0, "results": {"a": [1]}}',
    ],
)
def test_what_is_no_record_is_none(text):
    assert evaluation_records.parse(text) is None


def test_files_are_named_by_step():
    assert evaluation_records.file_name(20) == "evaluations/20.json"
    names = ["20.json", "0.json", "020.json", "x.json", ".lease", "20.json.tmp", "9" * 99 + ".json"]
    assert [evaluation_records.step_of(name) for name in names] == [20, 0, *[None] * 5]


def test_a_history_has_them_among_its_records(tmp_path):
    write(tmp_path, line(10, loss=3) + line(20, loss=2) + line(10, "inference_eval/digit", b=1))
    folder = tmp_path / evaluation_records.FOLDER
    folder.mkdir()
    for step in (20, 10):
        results = {"inference_eval/digit": {"accuracy": step / 100}}
        record = evaluation_records.Evaluation(step, 1.7e9, results)
        (tmp_path / evaluation_records.file_name(step)).write_text(record.to_json())
    (folder / "30.json").write_text(json.dumps({"step": 30})[:-2])
    (folder / "notes.txt").write_text("x")
    (stage,) = run_history.load(tmp_path).stages
    assert stage.points("inference_eval/digit", "accuracy") == [(10, 0.1), (20, 0.2)]
    assert stage.points("train", "loss") == [(10, 3), (20, 2)]
    assert stage.problems == () and stage.last_step == 20
