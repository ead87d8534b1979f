"""What a recipe takes before anything is run: FLOPs, chip-hours, cost, expected accuracy.

    python -m clipa_t5x.plan --gin_file=gin/bigG14.gin [--chip=v5p --mfu=0.4 --price=4.2]
    python -m clipa_t5x.plan --published
    python -m clipa_t5x.plan --budget_dollars=10000 [--chip=...]

Figures follow from sizes, tokens and samples alone: nothing is compiled, no data is read, no
device is needed. Hours and costs are at the stated share of the chip's peak.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from clipa_t5x import costs, errors, experiment, gin_utils, plan_plot, plan_tables
from clipa_t5x.plan_tables import StagePlan


def read_recipe(
    gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> list[StagePlan]:
    """The stages of a recipe as gin builds them.

    Args:
      gin_files: schedules, or stages in their order.
      bindings: overrides of every stage; STAGES of the schedule.
      search_paths: for gin files.

    Raises:
      UserError: anything in the configuration is refused.
    """
    # Imports TensorFlow: not for a plan without a gin file.
    from clipa_t5x import schedule
    from clipa_t5x.data import input_pipeline

    input_pipeline.keep_accelerators_for_jax()
    own, shared = schedule.split_bindings(bindings)
    stages = []
    for gin_file in gin_files:
        files = [gin_file]
        if schedule.is_schedule(files, search_paths):
            files = list(schedule.read(files, [experiment.NO_MODEL_DIR, *own], search_paths).stages)
        for file in files:
            settings = [*experiment.NO_PLACES, *shared]
            experiment.parse([file], settings, search_paths)
            stages.append(_stage_plan(file))
    return stages


def _stage_plan(gin_file: str) -> StagePlan:
    arguments = experiment.arguments()
    dataset = arguments["train_dataset_cfg"]
    return StagePlan(
        name=pathlib.PurePath(gin_file).stem,
        model=arguments["model"],
        pixels=dataset.task_feature_lengths["images"],
        text_length=dataset.task_feature_lengths["text"],
        samples=arguments["total_steps"] * dataset.batch_size,
    )


def make_plan(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """What the arguments ask for, as plain values and as texts; writes `--plot`.

    Raises:
      UserError: a mistake in the arguments or in the configuration.
    """
    rate = costs.rate(arguments.chip, arguments.mfu, arguments.price)
    has_budget = arguments.budget_hours is not None or arguments.budget_dollars is not None
    if not (arguments.gin_file or arguments.published or has_budget or arguments.plot):
        raise errors.UserError(
            "nothing to plan: give --gin_file=gin/bigG14.gin, --published, --budget_hours=N or "
            "--budget_dollars=N."
        )
    budget = None
    if has_budget:
        budget = rate.budget_flops(arguments.budget_hours, arguments.budget_dollars)
    record: dict[str, Any] = {"rate": {**dataclasses.asdict(rate.chip), "mfu": rate.mfu}}
    tables, marks = [], []
    if arguments.gin_file:
        stages = read_recipe(
            arguments.gin_file, arguments.gin_bindings, arguments.gin_search_paths.split(",")
        )
        record["recipe"] = plan_tables.recipe_record(stages, rate)
        tables.append(plan_tables.recipe_table(record["recipe"]))
        accuracies = tuple(row["top1"] for row in record["recipe"]["expected_top1"])
        name = ", ".join(pathlib.PurePath(file).stem for file in arguments.gin_file)
        marks.append(plan_plot.Mark(name, plan_tables.training_flops(stages), accuracies))
    if arguments.published:
        record["published"] = plan_tables.published_records(rate)
        tables.append(plan_tables.published_table(record["published"]))
    if budget is not None:
        record["budget"] = plan_tables.budget_record(budget, rate)
        tables.append(plan_tables.budget_table(record["budget"]))
        marks.append(plan_plot.Mark("budget", budget))
    if arguments.plot:
        plan_plot.write(arguments.plot, marks, [f"Rate: {rate}", *tables])
    return record, [f"Rate: {rate}", *tables]


def write_json(path: str, record: dict[str, Any]) -> None:
    """Writes a plan's values.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        pathlib.Path(path).write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise errors.UserError(
            f"cannot write '{path}' ({error.strerror}): name a file in a directory that you can "
            "write, by --output"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m clipa_t5x.plan", description="Reckon what a recipe takes.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--gin_file", action="append", default=[], help="a schedule, or a stage; repeatable")
    add("--gin_bindings", action="append", default=[], help="as --gin.NAME=VALUE")
    add("--gin_search_paths", default="gin", help="folders of gin files, separated by commas")
    add("--published", action="store_true", help="the published runs, listed and reckoned")
    add("--budget_hours", type=float, help="chip-hours: rank models by what they would reach")
    add("--budget_dollars", type=float, help="the same in US dollars")
    add(
        "--chip", default=costs.DEFAULT_CHIP, help=f"{', '.join(costs.CHIPS)}; default: %(default)s"
    )
    add(
        "--mfu",
        type=float,
        default=costs.DEFAULT_MFU,
        help="share of the chip's peak, in (0, 1]; default: %(default)s, as published hours imply",
    )
    add("--price", type=float, help="US dollars for an hour of one chip; A100-80G has a default")
    add("--output", help="a JSON file for all figures")
    add("--plot", help="an HTML file: accuracy against compute, the recipe marked")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a plan: the door `python -m clipa_t5x.plan`.

    Args:
        argv: Arguments without the program's name; those of the process when not given.

    Returns:
        The exit status: 0, or 2 after a user's mistake, told in one line.
    """
    try:
        given = gin_utils.rewrite_gin_args(sys.argv[1:] if argv is None else argv)
        arguments = _parser().parse_args(given)
        record, texts = make_plan(arguments)
        if arguments.output:
            write_json(arguments.output, record)
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(texts))
    for path in filter(None, (arguments.output, arguments.plot)):
        print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
