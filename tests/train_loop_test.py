import contextlib
import json

import jax
import numpy as np
import pytest
import tiny_records

from clipa_t5x import (
    checkpoints,
    metrics,
    optimizers,
    partitioning,
    schedules,
    stage_info,
    train_loop,
    trainer,
)
from clipa_t5x.data import input_pipeline

STEPS = 6


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records")
    tiny_records.write(directory)
    return tiny_records.config(tiny_records.task("train_loop_test", directory, label_key=None), 8)


@pytest.fixture(scope="module")
def bound(tiny_model, cfg):
    sizes = {"width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 4}
    return trainer.Trainer(
        model=tiny_model(image=sizes, text=sizes),
        optimizer=optimizers.adamw(schedules.warmup_cosine(1e-3, STEPS)),
        partitioner=partitioning.PjitPartitioner(devices=jax.devices()),
        batch_spec=cfg.batch_spec(),
    )


class Run:
    """A run in one folder, and what happened in it, in order."""

    def __init__(self, bound, cfg, model_dir, **kwargs):
        self.bound, self.cfg, self.model_dir, self.events = bound, cfg, model_dir, []
        self.options = {"total_steps": STEPS, "eval_period": 3, "stats_period": 2, **kwargs}

    def evaluate(self, step, params, last):
        self.events.append(f"evaluate {step}{' last' if last else ''}")
        return {"inference_eval/steps/accuracy": step / STEPS}

    def start(self, period=2):
        """Goes on from the newest checkpoint to the end; returns the final state."""
        checkpointer = checkpoints.Checkpointer(
            str(self.model_dir), checkpoints.SaveCheckpointConfig(period)
        )
        save = checkpointer.save
        checkpointer.save = lambda step, *args: (
            self.events.append(f"save {step}"),
            save(step, *args),
        )
        state, position = self.bound.init_state(0), 0
        if checkpointer.latest_step() is not None:
            state, data = checkpointer.restore(self.bound.abstract_state)
            position = input_pipeline.resume_position(self.cfg, data)
        info = stage_info.StageInfo("", 0, 16, 8, 4, 4, 8, 8, STEPS, "", None)
        progress = train_loop.Progress(
            metrics.MetricsWriter(str(self.model_dir)), info, int(state.step)
        )
        loop = train_loop.TrainLoop(
            train_step=self.bound.compiled_train_step,
            dataset_cfg=self.cfg,
            layout=input_pipeline.BatchLayout(partitioning.PjitPartitioner().batch_sharding()),
            checkpointer=checkpointer,
            evaluate=self.evaluate,
            progress=progress,
            **self.options,
        )
        with contextlib.closing(checkpointer):
            return loop.run(state, position)

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
