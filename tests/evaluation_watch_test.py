"""Every checkpoint once, whatever happens to it: with small states; tests/eval_test.py has runs."""

import json
import logging

import pytest
import saved_runs
from run_files import line

from clipa_t5x import (
    checkpoint_folders,
    checkpoints,
    evaluation_records,
    evaluation_watch,
    preemption,
    stage_handover,
    stage_info,
    supervision,
)
from clipa_t5x.errors import UserError

SOON = evaluation_watch.Patience(poll_seconds=0.01)
STATE = saved_runs.small_state()


class Stop:
    """Asks to stop after so many questions; does something at each."""

    def __init__(self, after=10**9, at_each=lambda count: None):
        self.after, self.count, self.at_each = after, 0, at_each

    def requested(self):
        self.count += 1
        self.at_each(self.count)
        return self.count > self.after


class Watching:
    """A watch that only notes what it evaluates."""

    def __init__(
        self, model_dir, stop=None, abstract=None, meanwhile=lambda step: None, names=("sum",),
        save_period=None,
    ):  # fmt: skip
        self.model_dir, self.events, self.meanwhile = model_dir, [], meanwhile
        self.writer = evaluation_watch.RecordWriter(str(model_dir))
        (model_dir / evaluation_records.FOLDER).mkdir(parents=True, exist_ok=True)
        params = (abstract or saved_runs.abstract(STATE)).params
        self.watch = evaluation_watch.Watch(
            str(model_dir), params, [f"inference_eval/{name}" for name in names], self.evaluate,
            self.writer, stop or Stop(), save_period=save_period,
        )  # fmt: skip

    def evaluate(self, step, params, groups):
        self.events.append(step)
        self.meanwhile(step)
        for group in groups:
            self.writer.write(step, group, {"accuracy": float(params["kernel"].sum())})

    def run(self, patience=SOON):
        self.watch.run(patience)
        self.writer.close()
        return self.events


def complete(model_dir):
    info = stage_info.StageInfo("", 0, 16, 8, 4, 4, 8, 8, 6, "", None)
    info.write(str(model_dir), completed=True)


def records(model_dir):
    paths = (model_dir / evaluation_records.FOLDER).glob("*.json")
    return {int(path.stem): json.loads(path.read_text())["results"] for path in paths}


def test_all_are_evaluated_oldest_first_and_never_again(tmp_path):
    saved_runs.save(tmp_path, STATE, 2, 10, 4, keep=None)
    complete(tmp_path)
    assert Watching(tmp_path).run() == [2, 4, 10]
    total = float(STATE.params["kernel"].sum())
    expected = {"inference_eval/sum": {"accuracy": pytest.approx(total)}}
    assert records(tmp_path) == dict.fromkeys((2, 4, 10), expected)
    assert list((tmp_path / "inference_eval" / "sum").glob("events.out.tfevents.*"))
    assert Watching(tmp_path).run() == []


def test_what_is_missing_of_an_evaluation_is_made_up_for(tmp_path):
    """Evaluators by name, whether an earlier watch has run them or training."""
    saved_runs.save(tmp_path, STATE, 2, 4, keep=None)
    complete(tmp_path)
    torn = line(2, "inference_eval/b", accuracy=0.25)
    (tmp_path / "metrics.jsonl").write_text(line(2, loss=1) + '{"step": 2, "gro' + torn)
    assert Watching(tmp_path).run() == [2, 4]
    before = records(tmp_path)
    assert Watching(tmp_path, names=("b", "sum", "c")).run() == [2, 4]
    after = records(tmp_path)
    assert after[2].keys() == {"inference_eval/sum", "inference_eval/c"}
    assert after[4].keys() == {f"inference_eval/{name}" for name in ("sum", "b", "c")}
    assert all(after[step]["inference_eval/sum"] == found["inference_eval/sum"]
               for step, found in before.items())  # fmt: skip
    assert Watching(tmp_path, names=("c", "b")).run() == []


def test_checkpoints_that_came_and_went_are_told_of(tmp_path, caplog):
    """Once, and not those that training evaluated, or that were seen to go."""
    (tmp_path / "metrics.jsonl").write_text(line(4, "inference_eval/sum", accuracy=0.5))
    saved_runs.save(tmp_path, STATE, 10, keep=None)

    def train(count):
        if count == 3:
            saved_runs.save(tmp_path, STATE, 13, 16, keep=1)
            complete(tmp_path)

    with caplog.at_level(logging.WARNING):
        assert Watching(tmp_path, Stop(at_each=train), save_period=2).run() == [10, 16]
    said = [r.getMessage() for r in caplog.records if "removed before" in r.getMessage()]
    assert ["3 checkpoints" in said[0], "steps 2, 6, 8:" in said[0]] == [True, True]
    assert len(said) == 2 and "2 checkpoints" in said[1] and "steps 12, 14:" in said[1]


def test_half_an_evaluation_is_none(tmp_path):
    saved_runs.save(tmp_path, STATE, 2, 4)
    complete(tmp_path)
    Watching(tmp_path).run()
    path = tmp_path / evaluation_records.file_name(4)
    path.write_text(path.read_text()[:20])

    def fail(step):
        raise KeyError("killed")

    with pytest.raises(KeyError, match="killed"):
        Watching(tmp_path, meanwhile=fail).run()
    assert Watching(tmp_path).run() == [4]


def test_what_comes_meanwhile_is_evaluated_before_the_end(tmp_path):
    def train(count):
        if count == 3:
            saved_runs.save(tmp_path, STATE, 2)
        if count == 9:
            saved_runs.save(tmp_path, STATE, 4)
            complete(tmp_path)

    assert Watching(tmp_path, Stop(at_each=train)).run() == [2, 4]


def test_removed_checkpoints_are_left_out(tmp_path, caplog, monkeypatch):
    saved_runs.save(tmp_path, STATE, 2, 4, 6, 8, keep=None)
    complete(tmp_path)
    folder = {step: checkpoint_folders.folder_of(str(tmp_path), step) for step in (2, 4, 6, 8)}
    load = stage_handover.load_checkpoint

    def load_late(model_dir, step, abstract_params):
        if step == 6:  # After it was verified, while it is read.
            checkpoint_folders.remove(folder[6])
        return load(model_dir, step, abstract_params)

    monkeypatch.setattr(stage_handover, "load_checkpoint", load_late)
    watching = Watching(
        tmp_path, meanwhile=lambda step: checkpoint_folders.remove(folder[4]) if step == 2 else None
    )
    with caplog.at_level(logging.WARNING):
        assert watching.run() == [2, 8]
    (message,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "checkpoint_6 was removed before it was evaluated" in message


def test_damaged_ones_are_left_out_and_what_replaces_them_is_not(tmp_path, caplog):
    saved_runs.save(tmp_path, STATE, 2, 4)
    (file,) = (tmp_path / "checkpoint_2" / "data").glob("metadata")
    file.write_text(file.read_text()[:-1] + " ")

    def mend(count):
        if count == 8:
            checkpoint_folders.set_aside(checkpoint_folders.folder_of(str(tmp_path), 2))
        if count == 14:
            saved_runs.save(tmp_path, STATE, 2, keep=None)
            complete(tmp_path)

    with caplog.at_level(logging.WARNING):
        assert Watching(tmp_path, Stop(at_each=mend)).run() == [4, 2]
    said = [
        r.getMessage() for r in caplog.records if "damaged: data/metadata has" in r.getMessage()
    ]
    assert len(said) == 1


def test_another_model_and_storage_that_fails_end_it(tmp_path, monkeypatch):
    saved_runs.save(tmp_path, STATE, 2)
    other = saved_runs.abstract(STATE.replace(params={"bias": STATE.params["kernel"]}))
    saved_runs.one_line_error(Watching(tmp_path, abstract=other).run, "bias is missing there")

    def no_answer(folder, *_):
        raise checkpoints.checkpoint_manifest.UnreadableError("x cannot be read (I/O error)")

    monkeypatch.setattr(checkpoints.checkpoint_manifest, "check", no_answer)
    saved_runs.one_line_error(Watching(tmp_path).run, "I/O error", "Mend the storage")


def test_stopped_on_request(tmp_path):
    saved_runs.save(tmp_path, STATE, 2)
    with pytest.raises(preemption.RestartError, match="stopped on request"):
        Watching(tmp_path, Stop(after=3)).run()

    def stop(step):
        raise supervision.StopRequestedError

    saved_runs.save(tmp_path, STATE, 4)
    with pytest.raises(preemption.RestartError, match="stopped on request"):
        Watching(tmp_path, meanwhile=stop).run()
    assert records(tmp_path).keys() == {2}


def test_silence_ends_it_after_its_time(tmp_path):
    patience = evaluation_watch.Patience(0.01, news_timeout_seconds=0.6)
    seen = []

    def save_late(count):
        seen.append(count)
        if len(seen) in (5, 10):
            saved_runs.save(tmp_path, STATE, len(seen))

    with pytest.raises(preemption.RestartError, match="No new checkpoint .* is not completed"):
        Watching(tmp_path, Stop(at_each=save_late)).run(patience)
    assert records(tmp_path).keys() == {5, 10}


def test_a_record_that_cannot_be_written_ends_it(tmp_path):
    saved_runs.save(tmp_path, STATE, 2)
    watching = Watching(tmp_path)
    (tmp_path / evaluation_records.file_name(2)).mkdir()
    with pytest.raises(UserError, match=r"2\.json cannot be written .* is done anew"):
        watching.watch._evaluate_step(2, ["inference_eval/sum"])


@pytest.mark.parametrize("values", [{"poll_seconds": -1}, {"news_timeout_seconds": "x"}])
def test_times_are_numbers(values):
    (flag,) = values
    with pytest.raises(UserError, match=f"--{flag} is"):
        evaluation_watch.Patience(**values)
