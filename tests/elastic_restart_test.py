"""A run that is stopped on some devices goes on with others: same data, same losses."""

import experiments
import numpy as np
import pytest

MACROS = {
    "TRAIN_STEPS": 8,
    "CHECKPOINT_PERIOD": 2,
    "KEEP_CHECKPOINTS": None,
    "EVAL_PERIOD": 8,
    "IMAGE_MASK_RATIO": 0.5,
}


def command(model_dir):
    bindings = [*experiments.UNEVALUATED, "WARMUP_STEPS = 2", f"MODEL_DIR = {str(model_dir)!r}",
                *(f"{name} = {value!r}" for name, value in MACROS.items())]  # fmt: skip
    return experiments.command(
        "train",
        f"--gin_file={experiments.GIN}/digits_stage1.gin",
        *(f"--gin_bindings={binding}" for binding in bindings),
    )


def stopped_at(step, run, folder):
    """What a run leaves behind that was killed after its checkpoint of `step`."""
    folder.mkdir()
    (run / f"checkpoint_{step}").rename(folder / f"checkpoint_{step}")
    (folder / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    return folder


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_devices_and_with_more_processes(tmp_path):
    workspace = experiments.digits_dir(str(tmp_path))
    whole = tmp_path / "whole"
    done = experiments.run(command(whole), workspace, num_devices=8)
    assert done.returncode == 0, done.stderr[-4000:]

    four = stopped_at(2, whole, tmp_path / "four")
    done = experiments.run(command(four), workspace, num_devices=4)
    assert done.returncode == 0, done.stderr[-4000:]
    # A device's share of the batch has doubled: it is taken in two parts.
    assert "in 2 microbatches" in done.stderr

    two = stopped_at(4, four, tmp_path / "two")
    errors = experiments.run_processes(command(two), workspace, 2, num_devices=4)
    assert not any("microbatches, with the same result" in text for text in errors)

    losses = experiments.records(whole, "train")
    for run in (four, two):
        resumed = experiments.records(run, "train")
        assert resumed.keys() == losses.keys()
        for step in losses:
            np.testing.assert_allclose(resumed[step]["loss"], losses[step]["loss"], rtol=1e-5)
    final = experiments.saved_state(whole, 8)
    for run in (four, two):
        other = experiments.saved_state(run, 8)
        for name, value in final.items():
            # A softmax does not feel its keys' bias: its gradient is rounding noise.
            if "key/bias" not in name:
                np.testing.assert_allclose(
                    other[name], value, rtol=1e-3, atol=1e-5, err_msg=name
                )  # fmt: skip
