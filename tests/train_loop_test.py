import contextlib
import functools
import json
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_records

from clipa_t5x import (
    bad_numbers,
    checkpoints,
    metrics,
    optimizers,
    partitioning,
    preemption,
    schedules,
    stage_info,
    supervision,
    train,
    train_loop,
    trainer,
    wall_time,
    watchdog,
)
from clipa_t5x.data import input_pipeline

STEPS = 6


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records")
    tiny_records.write(directory)
    return tiny_records.config(tiny_records.task("train_loop_test", directory, label_key=None), 8)


@pytest.fixture(scope="module")
def make_trainer(tiny_model, cfg):
    """Returns a function that makes a trainer on some devices."""

    def make(devices=8, **kwargs):
        sizes = {"width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 4}
        return trainer.Trainer(
            model=tiny_model(image=sizes, text=sizes),
            optimizer=optimizers.adamw(schedules.warmup_cosine(1e-3, STEPS)),
            partitioner=partitioning.PjitPartitioner(devices=jax.devices()[:devices]),
            batch_spec=cfg.batch_spec(),
            **kwargs,
        )

    return make


@pytest.fixture(scope="module")
def bound(make_trainer):
    return make_trainer()


class Run:
    """A run in one folder, and what happened in it, in order."""

    def __init__(self, bound, cfg, model_dir, **kwargs):
        self.bound, self.cfg, self.model_dir, self.events = bound, cfg, model_dir, []
        self.train_step = self.supervisor = None
        self.periods = train_loop.Periods(**{"total": STEPS, "evaluation": 3, "log": 2, **kwargs})

    def evaluate(self, supervisor, step, params, last):
        self.events.append(f"evaluate {step}{' last' if last else ''}")
        supervisor.before_batch()
        return {"inference_eval/steps/accuracy": step / STEPS}

    def start(self, period=2):
        """Goes on from the newest checkpoint to the end; returns the final state."""
        with supervision.supervised(str(self.model_dir), watchdog.Watchdog(None)) as supervisor:
            self.supervisor = supervisor
            checkpointer = checkpoints.Checkpointer(
                str(self.model_dir), checkpoints.SaveCheckpointConfig(period)
            )
            save = checkpointer.save
            checkpointer.save = lambda step, *args: (
                self.events.append(f"save {step}"),
                save(step, *args),
            )
            writer = metrics.MetricsWriter(str(self.model_dir))
            info = stage_info.StageInfo("", 0, 16, 8, 4, 4, 8, 8, STEPS, "", None)
            start = self.starting_point(checkpointer)
            train.absorb_lost_devices(self.bound, start)
            loop = train_loop.TrainLoop(
                train_step=self.train_step or self.bound.compiled_train_step,
                dataset_cfg=self.cfg,
                layout=input_pipeline.BatchLayout(self.bound.abstract_batch["images"].sharding),
                checkpointer=checkpointer,
                evaluate=functools.partial(self.evaluate, supervisor),
                progress=train_loop.Progress(writer, info, supervisor, self.bound.bad_numbers),
                supervisor=supervisor,
                start_over=lambda: self.starting_point(checkpointer),
                rows_at_once=self.bound.rows_at_once,
                periods=self.periods,
            )
            return loop.run(start)

    def starting_point(self, checkpointer):
        cfg = checkpoints.RestoreCheckpointConfig()
        return train.starting_point(self.bound, checkpointer, cfg, self.cfg, 0)

    def logged(self):
        lines = (self.model_dir / "metrics.jsonl").read_text().splitlines()
        return [record["step"] for record in map(json.loads, lines)]


@pytest.fixture
def make_run(bound, cfg, tmp_path):
    return lambda name="run", **kwargs: Run(bound, cfg, tmp_path / name, **kwargs)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_steps_are_logged_evaluated_and_saved_in_this_order(make_run):
    run = make_run()
    state = run.start()
    assert int(state.step) == STEPS
    assert run.events == ["save 2", "evaluate 3", "save 4", "evaluate 6 last", "save 6"]
    assert run.logged() == [2, 4, 6]


def test_evaluation_may_be_left_to_another_process(make_run):
    run = make_run(evaluation=None)
    run.start()
    assert run.events == ["save 2", "save 4", "save 6"]
    assert run.start().step == STEPS and len(run.events) == 3


def stop_after(run, step, signum=signal.SIGTERM):
    """Sends this process a signal when step `step` is about to be dispatched."""
    train_step = run.bound.compiled_train_step

    def signalling(state, batch):
        if int(state.step) + 1 == step:
            os.kill(os.getpid(), signum)
            wait_for_signal(run.supervisor)
        return train_step(state, batch)

    run.train_step = signalling


def wait_for_signal(supervisor):
    """The thread that hears of signals needs a moment."""
    until = time.monotonic() + 10
    while not supervisor.stop.requested():
        assert time.monotonic() < until
        time.sleep(0.001)


def spent(run):
    """What the run's records say of its time."""
    return wall_time.summarize(wall_time.parse((run.model_dir / "goodput.jsonl").read_text()))


def test_a_run_that_loses_nothing_has_lost_nothing(make_run):
    run = make_run()
    stop_after(run, 4)
    with pytest.raises(preemption.PreemptedError):
        run.start()
    run.train_step = None
    run.start()
    summary = spent(run)
    assert (summary.restarts, summary.rewinds) == (1, 0)
    assert summary.seconds["lost"] == 0 and summary.seconds["step"] > 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_is_saved_and_goes_on_to_the_same_end(make_run, signum):
    whole, run = make_run("whole"), make_run("stopped")
    before = signal.getsignal(signum)
    stop_after(run, 5, signum)
    with pytest.raises(preemption.PreemptedError, match="after step 5, which is saved"):
        run.start(period=4)
    assert signal.getsignal(signum) is before
    assert run.events == ["evaluate 3", "save 4", "save 5"] and run.logged()[-1] == 5
    state = run.start(period=4)
    assert run.events[3:] == ["evaluate 6 last", "save 6"]
    assert_same(state, whole.start())


def test_an_evaluation_that_is_stopped_is_made_up_for(make_run):
    run = make_run()
    stopping = [True]

    def evaluate(supervisor, step, params, last):
        if step == 3 and stopping.pop():
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for_signal(supervisor)
            supervisor.before_batch()
        run.events.append(f"evaluate {step}")
        return {}

    run.evaluate = evaluate
    with pytest.raises(preemption.PreemptedError):
        run.start()
    assert run.events == ["save 2", "save 3"]
    stopping.append(False)
    run.start()
    assert run.events[2:] == ["evaluate 3", "save 4", "evaluate 6", "save 6"]


def test_an_evaluation_that_is_stopped_after_the_last_step_is_made_up_for(make_run):
    run = make_run(evaluation=STEPS)

    def evaluate(supervisor, step, params, last):
        assert last
        run.events.append("evaluate")
        if len(run.events) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for_signal(supervisor)
        supervisor.before_batch()
        return {}

    run.evaluate = evaluate
    with pytest.raises(preemption.PreemptedError):
        run.start(period=None)
    assert int(run.start(period=None).step) == STEPS
    assert run.events == ["evaluate", f"save {STEPS}", "evaluate"]


def test_what_an_error_would_lose_is_saved(make_run):
    whole, run = make_run("whole"), make_run("failing")
    evaluate, failing = run.evaluate, [True]

    def fail_once(supervisor, step, params, last):
        if failing and failing.pop():
            raise OSError("the images are gone")
        return evaluate(supervisor, step, params, last)

    run.evaluate = fail_once
    with pytest.raises(OSError, match="the images are gone"):
        run.start()
    assert run.events == ["save 2", "save 3"]
    state = run.start()
    assert run.events[2:] == ["evaluate 3", "save 4", "evaluate 6 last", "save 6"]
    assert_same(state, whole.start())


def bad_images(index, once=False):
    """An `augment` that makes the images of one batch NaN: those whose keys are given."""

    def augment(images, keys):
        hit = (keys == jnp.asarray(index)).all(axis=-1).any()
        return jnp.where(hit, jnp.nan, images.astype(jnp.float32))

    return augment


@pytest.fixture(scope="module")
def fifth_key(cfg):
    """The augmentation key of the first sample of the fifth batch."""
    layout = input_pipeline.BatchLayout(partitioning.PjitPartitioner().batch_sharding())
    with contextlib.closing(input_pipeline.TrainIterator(cfg, layout, 32)) as batches:
        return np.asarray(next(batches)["augment_keys"])[0]


@pytest.fixture(scope="module")
def make_guarded(make_trainer, fifth_key):
    """Returns a function that makes a trainer whose fifth batch of data is bad."""

    @functools.cache
    def make(action):
        return make_trainer(
            augment=bad_images(fifth_key), bad_numbers=bad_numbers.Policy(action=action)
        )

    return make


def test_a_diverged_run_ends_and_saves_nothing_of_it(make_guarded, cfg, tmp_path):
    run = Run(make_guarded("raise"), cfg, tmp_path, evaluation=100, log=100)
    with pytest.raises(bad_numbers.BadNumbersError, match="the loss is nan at step 5"):
        run.start()
    assert run.events == ["save 2", "save 4"]
    # The same again, from the last checkpoint.
    with pytest.raises(bad_numbers.BadNumbersError, match="the loss is nan at step 5"):
        run.start()
    assert run.events == ["save 2", "save 4"]


def test_a_skipped_update_is_counted_and_training_goes_on(make_guarded, cfg, tmp_path, caplog):
    run = Run(make_guarded("skip"), cfg, tmp_path)
    state = run.start()
    assert int(state.guard.skipped) == 1 and int(state.step) == STEPS
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = {record["step"]: record["values"] for record in map(json.loads, lines)}
    assert [values[s]["bad_numbers/skipped"] for s in (2, 4, 6)] == [0, 0, 1]
    assert np.isfinite(values[6]["loss"])


def test_a_rewound_run_leaves_out_the_bad_data(make_guarded, make_trainer, cfg, tmp_path):
    """It goes on from step 4 with the sixth batch of data, and is what a run on those would be."""
    run = Run(make_guarded("rewind"), cfg, tmp_path / "rewound", log=6)
    state = run.start()
    assert int(state.step) == STEPS and int(state.guard.skipped) == 0
    assert [event for event in run.events if "save" in event] == ["save 2", "save 4", "save 6"]
    assert spent(run).rewinds == 1
    # A run that was killed right after the rewind comes to the same.
    killed = Run(make_guarded("rewind"), cfg, tmp_path / "killed", log=6)
    killed.model_dir.mkdir()
    shutil.copytree(run.model_dir / "checkpoint_4", killed.model_dir / "checkpoint_4")
    assert_same(killed.start(), state)
    # By hand: four batches, then the sixth and the seventh.
    bound = make_guarded("rewind")
    layout = input_pipeline.BatchLayout(partitioning.PjitPartitioner().batch_sharding())
    expected = bound.init_state(0)
    for position in (0, 8, 16, 24, 40, 48):
        with contextlib.closing(input_pipeline.TrainIterator(cfg, layout, position)) as batches:
            expected, _ = bound.compiled_train_step(expected, next(batches))
    assert_same(state, expected)


@pytest.mark.slow
def test_a_rewind_with_no_checkpoint_starts_over(make_guarded, cfg, tmp_path):
    run = Run(make_guarded("rewind"), cfg, tmp_path, log=6)
    state = run.start(period=None)
    assert int(state.step) == STEPS
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_a_run_that_goes_on_with_fewer_devices(make_trainer, cfg, tmp_path):
    """8 devices, then 4, whose share is taken in two parts: the same batches, the same end."""
    whole = Run(make_trainer(), cfg, tmp_path / "whole").start()
    run = Run(make_trainer(), cfg, tmp_path / "run")
    stop_after(run, 3)
    with pytest.raises(preemption.PreemptedError):
        run.start()
    four = make_trainer(devices=4)
    run.bound, run.train_step = four, None
    state = run.start()
    assert four.num_microbatches == 2
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(state.params),
        jax.tree.leaves(whole.params),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        if "key" not in name or "bias" not in name:  # A softmax does not feel its keys' bias.
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_request_while_the_last_save_is_under_way_is_heard(make_run):
    """Or a schedule would begin its next stage."""
    run = make_run()

    def evaluate(supervisor, step, params, last):
        if last:
            os.kill(os.getpid(), signal.SIGTERM)  # Heard of after this evaluation, or later.
        return {}

    run.evaluate = evaluate
    with pytest.raises(preemption.PreemptedError, match=f"after step {STEPS}"):
        run.start()
    run.evaluate = lambda *args: {}
    assert int(run.start().step) == STEPS
