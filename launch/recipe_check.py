"""Refuses a recipe that would not train, before anything is rented for it."""

from clipa_t5x import experiment, schedule
from launch import job


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
