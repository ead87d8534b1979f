"""The inverse scaling law of a sweep over model size and tokens: a table, a page, CSV and JSON.

    python -m clipa_t5x.law RUN_OR_EXPERIMENT_DIR... [--metric=accuracy] [--evaluator=NAME]
        [--output=law.html] [--csv] [--json] [--svg]
    python -m clipa_t5x.law --published

Runs are grouped by the sizes of their towers and by the tokens of their first stage. What is
reckoned, and how, `inverse_scaling` and `scaling_fit` say.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from clipa_t5x import errors, inverse_scaling, law_plot, law_tables, report_page, sweep_runs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "clipa_t5x law",
        description="Do larger models lose less by fewer tokens?",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folders", nargs="*", metavar="DIR", help="a MODEL_DIR, or a folder of a sweep's")
    add("--published", action="store_true", help="CLIPA's published figure in the place of runs")
    add("--metric", default="accuracy", help="a share in 0..1; default: %(default)s")
    add("--evaluator", help="whose metric; default: the first that has it")
    add("--output", default="law.html", help="the page to write; default: %(default)s")
    add("--csv", action="store_true", help="write a line for every run beside the page, too")
    add("--json", action="store_true", help="write all that was reckoned beside the page, too")
    add("--svg", action="store_true", help="write every picture as a file beside the page, too")
    return parser


def _sweep(arguments: argparse.Namespace) -> sweep_runs.Sweep:
    if arguments.published == bool(arguments.folders):
        raise errors.UserError(
            "nothing to read, or two things: name MODEL_DIRs or folders of them, or --published"
        )
    if arguments.published:
        return sweep_runs.from_published()
    return sweep_runs.load(arguments.folders, arguments.metric, arguments.evaluator)


def _write(arguments: argparse.Namespace, law: inverse_scaling.Law) -> list[pathlib.Path]:
    path = pathlib.Path(arguments.output)
    if path.suffix in (".csv", ".json", ".svg"):
        raise errors.UserError(
            f"--output={arguments.output} names the page, which is HTML: name it .html; --csv, "
            "--json and --svg write files beside it"
        )
    title = "published" if arguments.published else ", ".join(
        pathlib.Path(folder).resolve().name for folder in arguments.folders[:3]
    )  # fmt: skip
    texts = {path: law_plot.render(law, title)}
    if arguments.csv:
        texts[path.with_suffix(".csv")] = law_tables.to_csv(law)
    if arguments.json:
        record = json.dumps(law_tables.to_record(law), indent=1, allow_nan=False) + "\n"
        texts[path.with_suffix(".json")] = record
    if arguments.svg:
        for key, text in law_plot.files(law).items():
            texts[path.with_name(f"{path.stem}_{key}.svg")] = text
    return [report_page.write(each, text, what="") for each, text in texts.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the law's table and writes its page: the door `python -m clipa_t5x.law`.

    Args:
        argv: Arguments without the program's name; those of the process when not given.

    Returns:
        The exit status: 0, or 2 after a user's mistake, told in one line.
    """
    arguments = _parser().parse_args(argv)
    try:
        law = inverse_scaling.analyse(_sweep(arguments))
        paths = _write(arguments, law)
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(law_tables.console(law), end="\n\n")
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
