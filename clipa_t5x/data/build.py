"""Makes data sets: converts one's own, looks into them, and writes the two embedded ones.

    python -m clipa_t5x.data.build convert --source=DIR --pattern='*.tar' --output_dir=data/mine
    python -m clipa_t5x.data.build inspect data/mine --output=grid.png
    python -m clipa_t5x.data.build shapes --output_dir=data/shapes

And for a vocabulary of one's own, the table that TEXT_REDUCTION = 'syntax' reads:
`python -m clipa_t5x.data.build tags --vocabulary_path=data/vocab.txt`, see `word_classes`.

This module knows the command line; see `conversion`, `inspection` and `embedded` for the rest.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from clipa_t5x.data import embedded, word_classes
from clipa_t5x.errors import UserError

_LEAST = {"image_size": 8, "seed": 0, "num_workers": 0}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clipa_t5x.data.build", description="Builds a small data set."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{shapes,digits,tags}")
    shapes_parser = commands.add_parser("shapes", help="procedural scenes of patterned shapes")
    digits_parser = commands.add_parser("digits", help="scikit-learn's handwritten digits")
    # Options that are left out keep the defaults of the functions above.
    for option, meaning in (
        ("num_train", "training scenes (16000)"),
        ("num_validation", "scenes with held-out combinations (1000)"),
        ("num_zeroshot", "single objects of held-out combinations (1024)"),
        ("num_workers", "processes that render; the data does not depend on it (2)"),
    ):
        default = 2 if option == "num_workers" else argparse.SUPPRESS
        shapes_parser.add_argument(f"--{option}", type=int, default=default, help=meaning)
    for command, size, num_shards in ((shapes_parser, 64, 8), (digits_parser, 32, 4)):
        command.add_argument("--output_dir", required=True, help="where the data set goes")
        command.add_argument(
            "--image_size", type=int, default=size, help=f"side of the images in pixels ({size})"
        )
        command.add_argument("--seed", type=int, default=0, help="seed of everything random (0)")
        command.add_argument(
            "--num_shards", type=int, default=num_shards, help=f"files per split ({num_shards})"
        )
        command.add_argument(
            "--overwrite", action="store_true", help="replace another data set in output_dir"
        )
    _add_tags(commands)
    return parser


def _add_tags(commands: Any) -> None:
    tags_parser = commands.add_parser("tags", help="the classes of a vocabulary's words")
    tags_parser.add_argument(
        "--vocabulary_path", required=True, help="WordPiece vocabulary, one piece a line"
    )
    tags_parser.add_argument(
        "--tagger",
        choices=list(word_classes.TAGGERS),
        default="textblob",
        help="library that tells the parts of speech (textblob)",
    )


def _tag(vocabulary_path: str, tagger: str) -> None:
    from clipa_t5x.data import vocabularies  # only here: it takes TensorFlow

    pieces = vocabularies.BertVocabulary(vocabulary_path).pieces
    found = word_classes.TAGGERS[tagger]()
    classes = word_classes.classify(pieces, found)
    word_classes.write(vocabulary_path, classes, found.name, found.version)
    sizes = ", ".join(f"{name} {n}" for name, n in word_classes.counts(classes).items())
    path = word_classes.table_path(vocabulary_path)
    print(f"{path} is ready ({found.name} {found.version}): {sizes}")


def _run(arguments: dict[str, Any]) -> None:
    name = arguments.pop("command")
    if name == "tags":
        _tag(**arguments)
    else:
        _build(name, arguments)


def _build(name: str, arguments: dict[str, Any]) -> None:
    output_dir = arguments.pop("output_dir")
    overwrite, num_shards = arguments.pop("overwrite"), arguments.pop("num_shards")
    for option, value in {**arguments, "num_shards": num_shards}.items():
        if value < _LEAST.get(option, 1):
            raise UserError(
                f"--{option}={value} is too small: give at least {_LEAST.get(option, 1)}"
            )
    dataset = embedded.MAKERS[name](**arguments)
    manifest = embedded.build(dataset, output_dir, num_shards=num_shards, overwrite=overwrite)
    if manifest is None:
        print(f"{output_dir} already holds this data set: nothing to do")
        return
    sizes = ", ".join(f"{split} {facts['records']}" for split, facts in manifest["splits"].items())
    print(f"{name} is ready in {output_dir}: {sizes}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the command line without the program's name; the process's own if None.

    Returns:
      The exit status: 0, or 2 after a mistake of the user.
    """
    # TensorFlow, imported later to write the records, greets with warnings about missing GPUs.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        _run(vars(_parser().parse_args(argv)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
