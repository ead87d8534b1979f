import pytest

from clipa_t5x.data import build, word_classes


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
