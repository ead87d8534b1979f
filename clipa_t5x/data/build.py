"""Makes data sets: converts one's own, looks into them, and writes the two embedded ones.

    python -m clipa_t5x.data.build convert --source=DIR --pattern='*.tar' --output_dir=data/mine
    python -m clipa_t5x.data.build inspect data/mine --output=grid.png
    python -m clipa_t5x.data.build shapes --output_dir=data/shapes

And for a vocabulary of one's own, the table that TEXT_REDUCTION = 'syntax' reads:
`python -m clipa_t5x.data.build tags --vocabulary_path=data/vocab.txt`, see `word_classes`. Class
names, templates and label maps of ImageNet, of an installed open_clip:
`python -m clipa_t5x.data.build prompts --output_dir=data`, see `prompt_files`. The label map of a
part of ImageNet in folders: `python -m clipa_t5x.data.build label_map --folder=data/imagenet-a
--output=data/map.txt`, see `label_maps`.

This module knows the command line; see `conversion`, `inspection` and `embedded` for the rest.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from clipa_t5x.data import embedded, word_classes
from clipa_t5x.errors import UserError

_LEAST = {"image_size": 8, "seed": 0, "num_workers": 0}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clipa_t5x.data.build", description="Makes data sets, and looks into them."
    )
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="{convert,inspect,shapes,digits,tags,prompts,label_map}",
    )
    _add_convert(commands)
    _add_inspect(commands)
    _add_embedded(commands)
    _add_tags(commands)
    _add_prompts(commands)
    return parser


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser("convert", help="a split of any format to TFRecord or ArrayRecord")
    for option, default, meaning in (
        ("source", None, "folder of the shards, or one file"),
        ("output_dir", None, "where the data set goes; it may hold other converted splits"),
        ("pattern", "", "glob pattern of the shards under source (all of a known format)"),
        ("split", "train", "name of what is written (train)"),
        ("image_key", "jpg;jpeg;png;webp", "the image's field; of several the first there is"),
        ("label_key", "", "the label's field, an integer (none)"),
    ):
        parser.add_argument(f"--{option}", required=default is None, default=default, help=meaning)
    parser.add_argument(
        "--caption_key",
        action="append",
        help="a caption's field, again for each further one; the first is written as txt (txt)",
    )
    parser.add_argument(
        "--output_format",
        choices=["array_record", "tfrecord"],
        default="array_record",
        help="of the shards written (array_record)",
    )
    for option, default, meaning in (
        ("short_side", None, "shrink larger images to this many pixels on their short side"),
        ("quality", 95, "of JPEGs that are encoded anew (95)"),
        ("records_per_shard", 10_000, "records of the input per shard (10000)"),
        ("num_workers", os.cpu_count(), "processes; the output does not depend on it (cores)"),
    ):
        parser.add_argument(f"--{option}", type=int, default=default, help=meaning)
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew where arguments have changed"
    )


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="what is in a shard, a split or a data set")
    parser.add_argument("path", help="a shard, a folder of shards, or a data set's folder")
    parser.add_argument("--num", type=int, default=36, help="pictures of the grid (36)")
    parser.add_argument("--output", default="", help="where the picture grid goes, a PNG (nowhere)")
    parser.add_argument("--image_key", default="", help="the image's field (by its usual names)")
    parser.add_argument(
        "--caption_key", action="append", help="a caption's field (by its usual names)"
    )
    parser.add_argument(
        "--all", action="store_true", help="look at every record, and compare checksums"
    )


def _add_embedded(commands: Any) -> None:
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


def _add_prompts(commands: Any) -> None:
    prompts_parser = commands.add_parser("prompts", help="ImageNet's names, templates and maps")
    prompts_parser.add_argument("--output_dir", required=True, help="where the text files go")
    map_parser = commands.add_parser("label_map", help="which classes folders of images are of")
    for option, default, meaning in (
        ("folder", None, "that holds a folder for each class"),
        ("output", None, "the text file to write"),
        ("classes", "", "text file of what all classes' folders are called (ImageNet's ids)"),
    ):
        map_parser.add_argument(
            f"--{option}", required=default is None, default=default, help=meaning
        )


def _map_labels(folder: str, output: str, classes: str) -> None:
    from clipa_t5x.data import label_maps, prompts  # only here: they take TensorFlow

    lines = label_maps.of_folders(folder, label_maps.wordnet_ids(classes or None))
    try:
        with open(output, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise UserError(
            f"--output={output} cannot be written ({error.strerror}): give a file that can."
        ) from error
    unknown = lines.count(prompts.NO_CLASS)
    print(f"{output} is ready: {len(lines)} labels, of which {unknown} stand for no class")


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
    if name == "convert":
        _convert(arguments)
    elif name == "inspect":
        _inspect(arguments)
    elif name == "tags":
        _tag(**arguments)
    elif name == "prompts":
        from clipa_t5x.data import prompt_files  # only here: it takes TensorFlow

        for path, lines in prompt_files.write(arguments["output_dir"]).items():
            print(f"{path} is ready: {lines} lines")
    elif name == "label_map":
        _map_labels(**arguments)
    else:
        _build(name, arguments)


def _convert(arguments: dict[str, Any]) -> None:
    from clipa_t5x.data import conversion, shard_conversion  # only here: they take TensorFlow

    _check_least(arguments)
    if arguments["quality"] > 100:
        raise UserError(f"--quality={arguments['quality']} is too great: give at most 100")
    keys = ["txt"] if arguments["caption_key"] is None else arguments["caption_key"]
    options = shard_conversion.Options(
        caption_keys=tuple(key for key in keys if key),
        label_key=arguments["label_key"] or None,
        **{name: arguments[name] for name in ("image_key", "short_side", "quality")},
        output_format=arguments["output_format"],
    )
    facts = conversion.convert(
        arguments["source"],
        arguments["output_dir"],
        pattern=arguments["pattern"] or None,
        options=options,
        **{
            name: arguments[name]
            for name in ("split", "records_per_shard", "num_workers", "overwrite")
        },
    )
    print(conversion.describe(facts, arguments["output_dir"], arguments["split"]))


def _inspect(arguments: dict[str, Any]) -> None:
    from clipa_t5x.data import inspection  # only here: it takes TensorFlow

    _check_least(arguments)
    keys = arguments["caption_key"]
    for text in inspection.inspect(
        arguments["path"],
        image_key=arguments["image_key"] or None,
        caption_keys=None if keys is None else tuple(key for key in keys if key),
        num_pictures=arguments["num"],
        output=arguments["output"] or None,
        everything=arguments["all"],
    ):
        print(text, flush=True)


def _check_least(numbers: Mapping[str, Any]) -> None:
    for option, value in numbers.items():
        if isinstance(value, int) and value < _LEAST.get(option, 1) and value is not False:
            raise UserError(
                f"--{option}={value} is too small: give at least {_LEAST.get(option, 1)}"
            )


def _build(name: str, arguments: dict[str, Any]) -> None:
    output_dir = arguments.pop("output_dir")
    overwrite, num_shards = arguments.pop("overwrite"), arguments.pop("num_shards")
    _check_least({**arguments, "num_shards": num_shards})
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
