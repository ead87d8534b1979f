"""Refuses a recipe that would not train, before anything is rented for it."""

import contextlib
import os

from clipa_t5x import experiment, gin_utils, schedule
from clipa_t5x.errors import UserError
from launch import job

# What recipes call the places that they read.
_READ = ("DATA_DIR", "VOCABULARY_PATH")


def check_recipe(spec: job.JobSpec) -> None:
    """Parses a job's recipe and builds its objects, as the trainer will; reads no data.

    Raises:
      UserError: what the trainer would refuse it for, such as a macro that nothing reads.
    """
    bindings = [*spec.gin_bindings, f"MODEL_DIR = {spec.model_dir!r}"]
    paths = spec.gin_search_paths
    if spec.verb != "schedule":
        experiment.parse(spec.gin_file, bindings, paths)
        experiment.arguments()
        return
    own, shared = schedule.split_bindings(bindings)
    stages = schedule.read(spec.gin_file, own, paths)
    for number in range(len(stages.stages)):
        schedule.parse_stage(stages, number, shared, paths)


def refuse_data_of_this_machine() -> None:
    """Refuses that the recipe that was checked last reads what other machines have not.

    Raises:
      UserError: a relative path.
    """
    for name in _READ:
        path = None
        with contextlib.suppress(UserError):  # A recipe may have none.
            path = gin_utils.query(name)
        if isinstance(path, str) and "://" not in path and not os.path.isabs(path):
            raise UserError(
                f"{name} is {path!r}, which is on this machine and not on the workers: put it into "
                f"a bucket (--gin.{name}=\"'gs://...'\"), or have --setup make it."
            )
