import dataclasses

import pytest
from saved_runs import one_line_error

from launch import job, recipe_check

STAGE = job.JobSpec(("gin/shapes_stage1.gin",), "runs/x", gin_bindings=("BATCH_SIZE = 8",))
SCHEDULE = dataclasses.replace(STAGE, gin_file=("gin/shapes.gin",), verb="schedule")


@pytest.mark.parametrize("spec", [STAGE, SCHEDULE])
def test_what_trains_passes_and_what_does_not_is_refused(spec, monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    recipe_check.check_recipe(spec)
    wrong = dataclasses.replace(spec, gin_bindings=("LEARNING_RAT = 3",))
    one_line_error(lambda: recipe_check.check_recipe(wrong), "LEARNING_RAT", "LEARNING_RATE")


def test_data_that_are_here_alone_are_refused_for_other_machines(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    bindings = ["DATA_DIR = 'gs://b/data'", "VOCABULARY_PATH = '/shared/vocab.txt'"]
    recipe_check.check_recipe(dataclasses.replace(STAGE, gin_bindings=tuple(bindings)))
    recipe_check.refuse_data_of_this_machine()
    recipe_check.check_recipe(STAGE)
    one_line_error(recipe_check.refuse_data_of_this_machine, "DATA_DIR is 'data/shapes'", "--setup")
