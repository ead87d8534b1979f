"""What is read back is what a run wrote, whatever interrupted it."""

import json
import math

import pytest
from run_files import line, schedule_of, write

from clipa_t5x import errors, run_history, run_summary


def only_stage(folder):
    (stage,) = run_history.load(folder).stages
    return stage


def test_last_record_of_a_step_wins_and_steps_ascend(tmp_path):
    metrics = line(10, loss=3) + line(20, loss=2) + line(20, "training_eval/d", loss=9)
    metrics += line(10, loss=3.5) + line(20, loss=2.5) + line(30, loss=1.5)
    stage = only_stage(write(tmp_path, metrics))
    assert stage.points("train", "loss") == [(10, 3.5), (20, 2.5), (30, 1.5)]
    assert stage.points("training_eval/d", "loss") == [(20, 9)]
    assert stage.last_step == 30


@pytest.mark.parametrize("cut", [1, 12, 30, 60])
def test_torn_last_line_is_ignored_without_complaint(tmp_path, cut):
    stage = only_stage(write(tmp_path, line(10, loss=3) + line(20, loss=2)[:cut]))
    assert stage.points("train", "loss") == [(10, 3)]
    assert stage.problems == ()


@pytest.mark.parametrize("cut", [1, 12, 30, 60])
def test_record_appended_to_a_torn_line_is_kept(tmp_path, cut):
    stage = only_stage(
        write(
            tmp_path,
            line(10, loss=3) + line(20, loss=2)[:cut] + line(15, loss=4),
        )
    )
    assert stage.points("train", "loss") == [(10, 3), (15, 4)]
    assert stage.problems == ()


def test_unreadable_lines_are_counted(tmp_path):
    bad = [
        "garbage",
        "[1, 2]",
        '{"step": 1}',
        '{"step": "x", "group": "train", "values": {}}',
        "{" * 99,
    ]
    stage = only_stage(write(tmp_path, "\n".join([*bad, "", line(10, loss=3)])))
    assert stage.points("train", "loss") == [(10, 3)]
    assert stage.problems == ("5 lines were unreadable in metrics.jsonl and left out",)


def test_values_that_are_not_finite_or_not_numbers(tmp_path):
    values = (
        '{"loss": NaN, "a": Infinity, "b": null, "c": "NaN", "d": [1], "e": "text", "f": 1e999}'
    )
    metrics = f'{{"step": 1, "group": "train", "values": {values}}}\n'
    stage = only_stage(write(tmp_path, metrics))
    (record,) = stage.records["train"]
    assert set(record.values) == {"loss", "a", "b", "c", "f"}
    assert all(math.isnan(record.values[name]) for name in ("loss", "b", "c"))
    assert record.values["a"] == record.values["f"] == math.inf
    assert math.isnan(record.time)


def test_numbers_too_large_for_a_float(tmp_path):
    write(tmp_path, f'{{"step": 1, "group": "train", "values": {{"loss": 1{"0" * 400}}}}}\n')
    (tmp_path / "stage.json").write_text(f'{{"batch_size": 1{"0" * 400}}}')
    stage = only_stage(tmp_path)
    assert stage.number("batch_size") is None and stage.points("train", "loss") == []


def test_samples_of_an_evaluation(tmp_path):
    metrics = line(10, samples=100) + line(20, samples=300) + line(5, "e") + line(15, "e")
    stage = only_stage(write(tmp_path, metrics, batch_size=10))
    assert [stage.samples_at(step) for step in (10, 15, 20)] == [100, 200, 300]
    assert [stage.samples_at(step) for step in (5, 30, -50)] == [50, 400, 0]
    assert only_stage(write(tmp_path / "b", line(4), batch_size=10)).samples_at(4) == 40
    assert only_stage(write(tmp_path / "c", line(4))).samples_at(4) is None


def test_samples_go_on_from_stage_to_stage(tmp_path):
    schedule_of(tmp_path, "b", "a", "not yet")
    for name, batch in (("b", 100), ("a", 7)):
        metrics = "".join(line(step, loss=step, samples=step * batch) for step in (1, 2))
        write(tmp_path / name, metrics, name=name)
    history = run_history.load(tmp_path)
    assert history.axes == ("samples",)
    assert history.spans("samples") == ((0, 200), (200, 214), (214, 214))
    assert history.curve("train", "loss", "samples") == [
        [(100, 1), (200, 2)],
        [(207, 1), (214, 2)],
        [],
    ]
    cells = run_summary.table_cells(run_summary.summary_rows(history))
    assert cells[3] == ["not yet (not begun)", *["-"] * 6]


def test_steps_are_the_axis_when_samples_are_unknown(tmp_path):
    schedule_of(tmp_path, "a", "b")
    write(tmp_path / "a", line(5, loss=1, samples=50))
    write(tmp_path / "b", line(3, loss=2))
    history = run_history.load(tmp_path)
    assert history.axes == ("steps",)
    assert history.curve("train", "loss", "steps") == [[(5, 1)], [(8, 2)]]


def test_gallery_images_go_by_their_bytes(tmp_path):
    write(tmp_path, line(1))
    jpeg, gif = "/9j/4AAQ", "R0lGODlh"
    results = [
        {"image": jpeg, "mime": "image/svg+xml", "score": 0.5, "caption": "c", "match": True},
        {"image": gif, "mime": "image/png", "score": None, "match": "true"},
        {"image": None},
        "not an object",
    ]
    items = [{"caption": "q", "results": results}, {"caption": "none", "results": []}, 7]
    (tmp_path / "gallery.json").write_text(json.dumps({"items": items}))
    (item,) = only_stage(tmp_path).gallery
    assert [image.source for image in item.results] == [
        f"data:image/jpeg;base64,{jpeg}",
        None,
        None,
    ]
    assert [image.match for image in item.results] == [True, False, False]
    assert item.results[0].score == 0.5 and item.results[2].score is None


@pytest.mark.parametrize("schedule", ["{", "[]", "{}", '{"stages": []}', '{"stages": [3]}'])
def test_bad_schedule_is_told(tmp_path, schedule):
    (tmp_path / "schedule.json").write_text(schedule)
    with pytest.raises(errors.UserError, match=r"schedule\.json"):
        run_history.load(tmp_path)


@pytest.mark.parametrize("name", ["..", "a/b", "/etc", "", "."])
def test_stages_lie_inside_their_schedule(tmp_path, name):
    with pytest.raises(errors.UserError, match="names of sub-directories"):
        run_history.load(schedule_of(tmp_path, "a", name))


def test_directories_without_a_run_are_told(tmp_path):
    with pytest.raises(errors.UserError, match="does not exist"):
        run_history.load(tmp_path / "none")
    with pytest.raises(errors.UserError, match=r"no metrics\.jsonl"):
        run_history.load(schedule_of(tmp_path, "a"))
    with pytest.raises(errors.UserError, match="not a local path"):
        run_history.load("gs://bucket/run")
