import experiments
import pytest

from clipa_t5x import eval as eval_lib
from clipa_t5x import gin_utils
from clipa_t5x.errors import UserError


def test_a_checkpoint_is_evaluated_as_in_training(tmp_path, monkeypatch):
    monkeypatch.chdir(experiments.digits_dir(str(tmp_path)))
    run = str(tmp_path / "run")
    experiments.train("digits_stage1", *experiments.MINIATURE, f"MODEL_DIR = {run!r}",
                      "TRAIN_STEPS = 4", "EVAL_PERIOD = 2", "CHECKPOINT_PERIOD = 2")  # fmt: skip
    in_training = experiments.records(run, "inference_eval/digit")
    # The run's own configuration is all that is needed, and any checkpoint can be named.
    gin_utils.parse([f"{run}/config.gin"], [], [], root=experiments.TRAIN)
    arguments = gin_utils.build_arguments(experiments.TRAIN)
    assert eval_lib.evaluate(**arguments)["digit"] == in_training[4]
    earlier = eval_lib.evaluate(**arguments, checkpoint=f"{run}/checkpoint_2")
    assert earlier["digit"] == in_training[2]
    # Another run's results belong to that run.
    other = {**arguments, "model_dir": str(tmp_path / "other")}
    assert eval_lib.evaluate(**other, checkpoint=run)["digit"] == in_training[4]
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="no complete checkpoint at .*checkpoint_3 .*checkpoint_4"):
        eval_lib.evaluate(**arguments, checkpoint=f"{run}/checkpoint_3")
