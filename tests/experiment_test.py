import json

import experiments
import pytest

from clipa_t5x import checkpoint_manifest, experiment, gin_utils, run_history
from clipa_t5x.errors import UserError

STAGE2 = [str(experiments.GIN / "digits_stage2.gin")]


def began(model_dir, *bindings):
    """Where a run of stage 2, which must say where it begins, would take parameters from."""
    bindings = [f"MODEL_DIR = {str(model_dir)!r}", *bindings]
    experiment.parse_to_go_on(STAGE2, bindings, [str(experiments.GIN)])
    return gin_utils.query("INITIAL_CHECKPOINT_PATH")


def save(model_dir):
    (model_dir / "checkpoint_0").mkdir(parents=True)
    (model_dir / "checkpoint_0" / checkpoint_manifest.FILE).write_text("")


def test_a_run_that_has_not_begun_says_where_it_begins(tmp_path):
    with pytest.raises(UserError, match="INITIAL_CHECKPOINT_PATH must be set"):
        began(tmp_path)
    assert began(tmp_path, "INITIAL_CHECKPOINT_PATH = 'earlier'") == "earlier"


def test_a_run_goes_on_without_saying_where_it_began(tmp_path):
    save(tmp_path)
    assert began(tmp_path) is None
    assert began(tmp_path, "INITIAL_CHECKPOINT_PATH = 'earlier'") == "earlier"
    (tmp_path / run_history.STAGE_FILE).write_text(json.dumps({"initial_checkpoint": "first"}))
    assert began(tmp_path) == "first"


def test_other_mistakes_are_told_as_they_were(tmp_path):
    save(tmp_path)
    with pytest.raises(UserError, match="LEARNIG_RATE"):
        began(tmp_path, "LEARNIG_RATE = 1")
    with pytest.raises(UserError, match="MODEL_DIR must be set.*; INITIAL_CHECKPOINT_PATH must"):
        experiment.parse_to_go_on(STAGE2, [], [str(experiments.GIN)])
