"""What a data set says of itself, `manifest.json`, and whether its shards are what it says.

    {"generator": ..., "splits": {"train": {"records": 9, "shards": [
        {"file": "00000.tfrecord", "records": 9, "bytes": 4711, "sha256": ...}, ...]}}}

The files of a split lie in the folder of its name. Of anybody else's `manifest.json` nothing is
expected: it is as if it were not there.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clipa_t5x.data import record_writer, shard_reader
from clipa_t5x.errors import UserError

if TYPE_CHECKING:  # The index takes TensorFlow, which reading a manifest does not.
    from clipa_t5x.data.record_index import RecordIndex

FILE = "manifest.json"
GENERATOR = "clipa_t5x.data.build"


def read(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of a data set's folder, local or remote; None where there is none of ours.

    Raises:
      UserError: it is one of ours, but damaged.
    """
    path = os.path.join(directory, FILE)
    try:
        manifest = json.loads(_text(path))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or manifest.get("generator") != GENERATOR:
        return None
    splits = manifest.get("splits")
    if not isinstance(splits, dict) or not all(map(_is_split, splits.values())):
        raise UserError(
            f"{path} does not say of every split which shards it has, and file, records, bytes and "
            "sha256 of each: copy the data set again, or remove that file and nothing is compared."
        )
    return manifest


_SHARD_FACTS = {"file": str, "records": int, "bytes": int, "sha256": str}


def _is_split(facts: Any) -> bool:
    shards = facts.get("shards") if isinstance(facts, dict) else None
    return isinstance(shards, list) and all(
        isinstance(shard, dict)
        and {"file", "records"} <= shard.keys()  # Older manifests state no sizes.
        and all(isinstance(shard.get(name, kind()), kind) for name, kind in _SHARD_FACTS.items())
        for shard in shards
    )


def _text(path: str) -> str:
    if shard_reader.is_local(path):
        with open(path, encoding="utf-8") as file:
            return file.read()
    import tensorflow as tf

    try:
        with tf.io.gfile.GFile(path) as file:
            return file.read()
    except tf.errors.OpError as error:
        raise OSError(str(error)) from error


def write(directory: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
    """Writes a manifest into a local folder; a reader finds it whole or not at all."""
    write_json(os.path.join(directory, FILE), manifest)


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Writes a local file of JSON in one move."""
    temporary = f"{path}.tmp-{os.getpid()}"
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def spell(arguments: Any) -> str:
    """Arguments in a manifest, for people."""
    if not isinstance(arguments, dict):
        return "arguments unknown"
    return " ".join(f"{name}={value}" for name, value in arguments.items())


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Which arguments changed: 'quality 95 -> 90, ...'."""
    names = [*before, *(name for name in after if name not in before)]
    return ", ".join(
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in names
        if before.get(name) != after.get(name)
    )


def check(data_dir: str, index: "RecordIndex") -> str:
    """Compares shards with the manifest of their data set, if it has one.

    Only splits that shards of the index belong to are looked at. A glob pattern may well leave out
    shards; but all that the manifest names must be there.

    Args:
      data_dir: folder of the data set.
      index: of the shards that are to be read.

    Returns:
      What was compared, for people; '' where nothing was.

    Raises:
      UserError: names the first shard that is missing, is not in the manifest, or has another
        number of records or bytes.
    """
    manifest = read(data_dir)
    if manifest is None:
        return ""
    counts = [int(n) for n in (index.ends - _before(index.ends))]
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for path, size, count in zip(index.shards, index.shard_bytes, counts, strict=True):
        split = os.path.relpath(os.path.dirname(path), data_dir)
        found.setdefault(split, {})[os.path.basename(path)] = (int(size), count)
    compared = 0
    for split, shards in found.items():
        if (facts := manifest["splits"].get(split)) is not None:
            _compare(os.path.join(data_dir, split), facts["shards"], shards)
            compared += len(shards)
    return f"{compared} shards are as {FILE} says (records, bytes)" if compared else ""


def _before(ends: Any) -> Any:
    return [0, *ends[:-1]]


def _compare(folder: str, stated: list[dict], found: Mapping[str, tuple[int, int]]) -> None:
    by_name = {shard["file"]: shard for shard in stated}
    remedy = (
        f"Copy the data set again, or write it anew; if the change is meant, remove {FILE} beside "
        f"the folder {os.path.basename(folder)}."
    )
    for name, (size, records) in found.items():
        path = os.path.join(folder, name)
        if name not in by_name:
            raise UserError(f"shard {path} is not in {FILE}, which names {len(stated)}. {remedy}")
        # Older manifests state no sizes.
        for what, here in (("bytes", size), ("records", records)):
            said = by_name[name].get(what, here)
            if said != here:
                raise UserError(f"shard {path} has {here} {what}, {FILE} says {said}. {remedy}")
    for name in by_name:
        path = os.path.join(folder, name)
        if name not in found and not _exists(path):
            raise UserError(
                f"shard {path}, {by_name[name]['records']} records by {FILE}, is missing. {remedy}"
            )


def _exists(path: str) -> bool:
    if shard_reader.is_local(path):
        return os.path.exists(path)
    import tensorflow as tf

    return tf.io.gfile.exists(path)


def check_sums(shards: Sequence[str]) -> str:
    """Reads local shards whole and compares their checksums with the manifest's.

    Args:
      shards: paths of shards of one split, all of them named by the manifest.

    Returns:
      What was compared, for people.

    Raises:
      UserError: names the first shard whose bytes are others.
    """
    data_dir, split = os.path.split(os.path.dirname(shards[0]))
    manifest = read(data_dir) or {"splits": {}}
    facts = manifest["splits"].get(split, {"shards": []})
    stated = {shard["file"]: shard["sha256"] for shard in facts["shards"]}
    for path in shards:
        if record_writer.sha256(path) != stated.get(os.path.basename(path)):
            raise UserError(
                f"shard {path} has another SHA-256 than {FILE} says: its bytes have changed. Copy "
                "it again, or write the data set anew."
            )
    return f"{len(shards)} checksums agree"
