import json

import pytest

from clipa_t5x.data import conversion_journal, manifests
from clipa_t5x.errors import UserError

ARGUMENTS = {"source": "a", "short_side": None}


def finish_one(place, number=0):
    """A shard and its entry, as `conversion` leaves them."""
    path = place.folder / f"{number:05d}.tfrecord"
    path.write_bytes(b"x" * 10)
    place.keep(number, {"file": path.name, "records": 1, "bytes": 10})


def test_only_one_process_at_a_time(tmp_path):
    first = conversion_journal.SplitFolder(str(tmp_path), "train")
    second = conversion_journal.SplitFolder(str(tmp_path), "train")
    other = conversion_journal.SplitFolder(str(tmp_path), "validation")
    with first.reserved():
        assert not first.prepare(ARGUMENTS, overwrite=False)
        with pytest.raises(UserError, match="another process"), second.reserved():
            pass
        with other.reserved():
            pass
        assert first.journal.exists()
    with second.reserved():
        pass


def test_what_the_journal_has_is_done(tmp_path):
    place = conversion_journal.SplitFolder(str(tmp_path), "train")
    with place.reserved():
        place.prepare(ARGUMENTS, overwrite=False)
        finish_one(place, 0)
        finish_one(place, 1)
        (place.folder / "00001.tfrecord").write_bytes(b"shorter")
        place.keep(2, {"file": None, "records": 0, "bytes": 0})
        (place.journal / "3.json").write_text('{"file": ')
    assert [place.done(number) is not None for number in range(5)] == [
        True, False, True, False, False,
    ]  # fmt: skip


def test_other_arguments_may_follow_until_a_shard_is_finished(tmp_path):
    place = conversion_journal.SplitFolder(str(tmp_path), "train")
    with place.reserved():
        place.prepare(ARGUMENTS, overwrite=False)
        (place.folder / "00000.tfrecord.tmp-12").write_bytes(b"torn")
    with place.reserved():
        place.prepare({**ARGUMENTS, "short_side": 3}, overwrite=False)
        assert not list(place.folder.iterdir())
        finish_one(place)
    with pytest.raises(UserError, match="was begun with .*short_side 3 -> None"), place.reserved():
        place.prepare(ARGUMENTS, overwrite=False)
    with place.reserved():
        place.prepare(ARGUMENTS, overwrite=True)
        assert not list(place.folder.iterdir()) and place.done(0) is None
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}/*"))


def test_the_embedded_data_sets_are_not_joined(tmp_path):
    manifests.write(tmp_path, {"generator": manifests.GENERATOR, "name": "shapes", "splits": {}})
    place = conversion_journal.SplitFolder(str(tmp_path), "train")
    with pytest.raises(UserError, match="holds the data set 'shapes'"), place.reserved():
        place.prepare(ARGUMENTS, overwrite=True)


def test_the_manifest_takes_the_journals_place(tmp_path):
    place = conversion_journal.SplitFolder(str(tmp_path), "train")
    with place.reserved():
        place.prepare(ARGUMENTS, overwrite=False)
        finish_one(place)
        place.finish({"arguments": ARGUMENTS, "shards": [place.done(0)]})
    assert not place.journal.exists()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["splits"]["train"]["arguments"] == ARGUMENTS
    with place.reserved():
        assert place.prepare(ARGUMENTS, overwrite=False)
    (place.folder / "00000.tfrecord").unlink()
    with pytest.raises(UserError, match="00000.tfrecord is missing"), place.reserved():
        place.prepare(ARGUMENTS, overwrite=False)
    assert (tmp_path / "manifest.json").exists()
