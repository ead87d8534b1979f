"""All stages of a recipe in one job: `python -m clipa_t5x.schedule --gin_file=gin/shapes.gin`.

Stage n trains in MODEL_DIR/stage<n> and takes its parameters from stage n - 1. Started again, the
schedule goes on in whatever stage it was stopped.
"""

import dataclasses
import json
import os
from collections.abc import Sequence

import jax
from absl import logging
from etils import epath

from clipa_t5x import (
    errors,
    experiment,
    gin_statements,
    gin_utils,
    goodput,
    recipe_changes,
    run_history,
    run_summary,
    stage_info,
)

ROOT = "clipa_t5x.schedule.Schedule"

# Macros of the schedule itself; every other override goes to all stages.
OWN_MACROS = ("MODEL_DIR", "STAGES")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which experiments, in order.

    Attributes:
      stages: gin files, each an experiment.
      model_dir: a folder for all of them.
    """

    stages: Sequence[str]
    model_dir: str

    def stage_name(self, number: int) -> str:
        """'stage1' for number 0."""
        return f"stage{number + 1}"

    def stage_dir(self, number: int) -> str:
        """The MODEL_DIR of a stage."""
        return os.path.join(self.model_dir, self.stage_name(number))

    def bindings(self, number: int) -> list[str]:
        """What the schedule adds to a stage's own configuration."""
        bindings = [f"MODEL_DIR = {self.stage_dir(number)!r}"]
        if number > 0:
            bindings.append(f"INITIAL_CHECKPOINT_PATH = {self.stage_dir(number - 1)!r}")
        return bindings

    def is_completed(self, number: int) -> bool:
        """Whether a stage has been trained to its end."""
        return stage_info.is_completed(self.stage_dir(number))

    def write(self) -> None:
        """Writes `schedule.json`, which names the stages; process 0 only."""
        if jax.process_index() == 0:
            directory = epath.Path(self.model_dir)
            directory.mkdir(parents=True, exist_ok=True)
            names = [self.stage_name(i) for i in range(len(self.stages))]
            (directory / run_history.SCHEDULE_FILE).write_text(json.dumps({"stages": names}) + "\n")


def is_schedule(gin_files: Sequence[str], search_paths: Sequence[str]) -> bool:
    """Whether gin files make a schedule rather than a stage: one of them sets STAGES.

    Raises:
      UserError: a file is missing or cannot be read.
    """
    return gin_statements.sets_macro("STAGES", gin_files, search_paths)


def split_bindings(bindings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits overrides into (those of the schedule itself, those of every stage)."""
    own = [b for b in bindings if b.partition("=")[0].strip() in OWN_MACROS]
    return own, [b for b in bindings if b not in own]


def read(
    gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> Schedule:
    """The schedule that gin files and its own overrides make.

    Raises:
      UserError: they are refused, or name no stages.
    """
    gin_utils.parse(gin_files, bindings, search_paths, root=ROOT)
    schedule: Schedule = gin_utils.get_root(ROOT)()
    if not schedule.stages:
        raise errors.UserError(f"STAGES of {gin_files[-1]} is empty: list the stages' gin files.")
    return schedule


def parse_stage(
    schedule: Schedule, number: int, shared: Sequence[str], search_paths: Sequence[str]
) -> None:
    """Puts a stage's configuration in force, with the overrides of all, and builds its objects.

    Raises:
      UserError: anything in it is refused.
    """
    bindings = [*schedule.bindings(number), *shared]
    experiment.parse([schedule.stages[number]], bindings, search_paths)
    experiment.arguments()


def run(
    gin_files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str],
    accept_recipe_changes: bool = False,
) -> None:
    """Trains every stage that is not completed, then prints the table of all.

    Args:
      gin_files: the schedule's, see gin/engine/schedule.gin.
      bindings: overrides: MODEL_DIR and STAGES of the schedule, all others of each stage.
      search_paths: for gin files.
      accept_recipe_changes: go on where a stage, completed or not, was trained by another recipe.

    Raises:
      UserError: anything in any stage's configuration is refused, or is not what its MODEL_DIR was
        trained by; no stage has begun then.
    """
    own, shared = split_bindings(bindings)
    schedule = read(gin_files, own, search_paths)

    def parse(number: int) -> str:
        """Puts a stage's configuration in force and returns it as resolved."""
        parse_stage(schedule, number, shared, search_paths)
        return gin_utils.operative_config()

    for number in range(len(schedule.stages)):
        recipe = parse(number)
        if not accept_recipe_changes:
            recipe_changes.refuse(schedule.stage_dir(number), recipe)
    schedule.write()
    for number, stage in enumerate(schedule.stages):
        if schedule.is_completed(number):
            logging.info("%s (%s) is completed.", schedule.stage_name(number), stage)
            continue
        logging.info("%s of %d: %s", schedule.stage_name(number), len(schedule.stages), stage)
        parse(number)
        gin_utils.get_root(experiment.ROOT)()
        goodput.count_from()
    if jax.process_index() == 0:
        history = run_history.load(schedule.model_dir)
        print(run_summary.format_table(run_summary.summary_rows(history)))


if __name__ == "__main__":
    from clipa_t5x import main

    main.run("schedule")
