import hashlib
import io
import sys

import numpy as np
import pytest
from PIL import Image

from clipa_t5x.data import digits, wordpiece
from clipa_t5x.errors import UserError

# Generated once: a change would let models be validated on what older ones were trained on.
VALIDATION_DIGEST = "1b6e1622d68ba1bb4c1a54f9d3d2cbfb07592883f27224ad2b7e0a1d2b97bf15"


def test_split_is_disjoint_complete_and_fixed():
    train, validation = digits.split_indices("train"), digits.split_indices("validation")
    assert (len(train), len(validation)) == (1437, 360)
    assert sorted(train + validation) == list(range(1797))
    digest = hashlib.sha256(" ".join(map(str, validation)).encode()).hexdigest()
    assert digest == VALIDATION_DIGEST


def test_every_digit_is_in_both_splits():
    sklearn = pytest.importorskip("sklearn.datasets")
    target = sklearn.load_digits()["target"]
    for split in digits.SPLITS:
        assert np.bincount(target[digits.split_indices(split)], minlength=10).min() >= 20


def test_captions_name_the_digit():
    names = {str(i): i for i in range(10)} | {name: i for i, name in enumerate(digits.DIGITS)}
    known = set(wordpiece.build_vocabulary(digits.phrases()))
    said = set()
    for i in range(2000):
        text = digits.caption(i % 10, np.random.default_rng(i))
        words = wordpiece.basic_tokenize(text)
        named = [word for word in words if word in names]
        assert [names[word] for word in named] == [i % 10], text
        assert 5 <= len(text.split()) <= 12
        assert known.issuperset(words)
        said.update(named)
    assert said == set(names)


def test_class_comes_within_seven_words_of_a_prompt():
    for template in digits.TEMPLATES:
        assert "{}" in template.split()[:7]


def test_enlarging_keeps_the_scan():
    scan = np.zeros((8, 8))
    scan[2:6, 3:5] = 16
    image = digits.enlarge(scan, 40)
    assert image.shape == (40, 40, 3)
    assert image.dtype == np.uint8
    assert (image == image[:, :, :1]).all()
    # Ten cells of four pixels: a margin of one cell, then the scan.
    assert image[18, 18, 0] > 240
    assert image[:4].max() == 0
    assert image[:, 28:].max() < 15


def test_examples_are_the_scans():
    sklearn = pytest.importorskip("sklearn.datasets")
    scans = sklearn.load_digits()
    records = list(digits.examples("validation", seed=1))
    assert [int(r["key"]) for r in records] == digits.split_indices("validation")
    assert [r["label"] for r in records] == list(
        scans["target"][digits.split_indices("validation")]
    )
    for record in records[:20]:
        decoded = np.asarray(Image.open(io.BytesIO(record["jpg"]))).astype(float)
        assert decoded.shape == (32, 32, 3)
        scan = np.pad(scans["images"][int(record["key"])], 1)
        small = Image.fromarray(decoded[:, :, 0].astype(np.uint8)).resize((10, 10))
        assert np.corrcoef(np.asarray(small).ravel(), scan.ravel())[0, 1] > 0.9


def test_seed_changes_captions_only():
    pytest.importorskip("sklearn")
    first, second = (list(digits.examples("validation", seed=seed)) for seed in (0, 1))
    assert [r["jpg"] for r in first] == [r["jpg"] for r in second]
    assert [r["txt"] for r in first] != [r["txt"] for r in second]


def test_missing_scikit_learn_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"pip install 'clipa_t5x\[digits\]'"):
        next(digits.examples("train"))
