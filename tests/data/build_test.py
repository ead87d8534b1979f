import pytest
import tiny_tars

from clipa_t5x.data import build, manifests, word_classes


@pytest.mark.parametrize(
    "flag", ["--num_train=0", "--num_shards=0", "--seed=-1", "--image_size=7", "--num_workers=-1"]
)
def test_impossible_numbers_are_refused(tmp_path, capsys, flag):
    assert build.main(["shapes", f"--output_dir={tmp_path}/x", flag]) == 2
    assert capsys.readouterr().err.startswith(f"error: {flag} is too small: give at least ")


def test_tags_of_a_vocabulary(tmp_path, capsys, monkeypatch):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\ndog\nred\nrun\nof\n")
    tags = {"dog": "NN", "red": "JJ", "run": "VBP", "of": "IN"}
    fake = word_classes.Tagger("fake", "1.5", lambda text: [tags.get(text, "NNP")])
    monkeypatch.setitem(word_classes.TAGGERS, "nltk", lambda: fake)
    assert build.main(["tags", f"--vocabulary_path={path}", "--tagger=nltk"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/vocab.tags.json is ready (fake 1.5)" in out
    assert "noun 4, adjective 1, verb 1, other 1" in out
    assert word_classes.read(str(path), 7).tolist() == [1, 1, 1, 1, 2, 3, 4]


def test_tags_of_no_vocabulary(tmp_path, capsys):
    assert build.main(["tags", f"--vocabulary_path={tmp_path}/vocab.txt"]) == 2
    assert capsys.readouterr().err.startswith(f"error: vocabulary file {tmp_path}/vocab.txt does")


def convert(source, output_dir, *flags):
    arguments = [f"--source={source}", f"--output_dir={output_dir}", "--num_workers=0"]
    return build.main(["convert", *arguments, *flags])


def test_convert_and_inspect(tmp_path, capsys):
    tiny_tars.write_shards(tmp_path / "tars")
    flags = ["--caption_key=txt", "--caption_key=json:synthetic", "--label_key=json:label"]
    flags += ["--output_format=tfrecord", "--short_side=24", "--records_per_shard=9"]
    assert convert(tmp_path / "tars", tmp_path / "x", *flags) == 0
    assert f"{tmp_path}/x/train is ready: 21 records in 3 shards" in capsys.readouterr().out
    assert convert(tmp_path / "tars", tmp_path / "x", *flags) == 0
    assert "already holds this split: nothing to do" in capsys.readouterr().out
    arguments = manifests.read(tmp_path / "x")["splits"]["train"]["arguments"]
    assert arguments["caption_key"] == ["txt", "json:synthetic"]

    grid = f"--output={tmp_path}/grid.png"
    assert build.main(["inspect", str(tmp_path / "x"), grid, "--num=4", "--all"]) == 0
    out = capsys.readouterr().out
    assert "21 records, tfrecord, 3 shards" in out and "3 checksums agree" in out
    assert "synthetic  9 bytes, text 'made up 0'" in out
    assert (tmp_path / "grid.png").exists()


def test_images_without_captions(tmp_path):
    tiny_tars.write_shards(tmp_path / "tars")
    flags = ["--caption_key=", "--label_key=json:label", "--split=val", "--output_format=tfrecord"]
    assert convert(tmp_path / "tars", tmp_path / "x", *flags) == 0
    facts = manifests.read(tmp_path / "x")["splits"]["val"]
    assert (facts["records"], facts["arguments"]["caption_key"]) == (21, [])


@pytest.mark.parametrize(
    "command, message",
    [
        (["convert", "--source=nowhere", "--output_dir=x"], "no shards match nowhere"),
        (["convert", "--source=.", "--output_dir=x", "--short_side=0"], "--short_side=0 is too sm"),
        (["convert", "--source=.", "--output_dir=x", "--quality=101"], "--quality=101 is too gre"),
        (["convert", "--source=.", "--output_dir=x", "--records_per_shard=-1"], "--records_per_sh"),
        (["convert", "--source=.", "--output_dir=x", "--num_workers=-1"], "--num_workers=-1 is to"),
        (["convert", "--source=.", "--output_dir=x", "--caption_key=jpg"], "no shards match"),
        (
            ["convert", "--source=.", "--output_dir=x", "--caption_key=a", "--caption_key=a"],
            "--caption_key a a would write",
        ),
        (["inspect", "nowhere"], "no shards match nowhere"),
        (["inspect", ".", "--num=0"], "--num=0 is too small"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tmp_path, capsys, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    assert build.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", [["convert"], ["convert", "--output_format=csv"], ["inspect"], []]
)
def test_incomplete_commands_tell_their_usage(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        build.main(command)
    assert exit_.value.code == 2
    assert "usage: python -m clipa_t5x.data.build" in capsys.readouterr().err
