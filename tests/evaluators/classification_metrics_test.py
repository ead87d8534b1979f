import numpy as np
import pytest

from clipa_t5x.evaluators import classification_metrics as cm

RNG = np.random.default_rng(5)
COUNT, CLASSES = 60, 7


@pytest.fixture(scope="module")
def targets():
    """Up to three labels of each example; some twice, some none."""
    rows = np.full((COUNT, 3), -1)
    for row in rows:
        number = RNG.integers(0, 4)
        row[:number] = RNG.integers(0, CLASSES - 1, number)  # class 6 has no example
    return rows


def test_a_prediction_is_right_if_it_is_one_of_the_labels(targets):
    predictions = RNG.integers(0, CLASSES, (COUNT, 2))
    right = cm.hits(predictions, targets)
    for i in range(COUNT):
        own = set(targets[i]) - {-1}
        assert right[i].tolist() == [p in own for p in predictions[i]]


def test_recall_is_the_mean_over_classes_that_occur(targets):
    right = RNG.random(COUNT) < 0.4
    recalls = []
    for c in range(CLASSES):
        own = [bool(right[i]) for i in range(COUNT) if c in targets[i]]
        recalls += [np.mean(own)] if own else []
    assert len(recalls) == CLASSES - 1
    assert cm.mean_per_class_recall(right, targets) == pytest.approx(np.mean(recalls), abs=1e-12)


@pytest.mark.parametrize("decimals", [9, 1])
def test_average_precision_is_brute_forces(targets, decimals):
    """Precision at every score, by counting; with one decimal many scores are equal."""
    scores = RNG.random((COUNT, CLASSES)).round(decimals)
    means = []
    for c in range(CLASSES):
        truth = np.array([c in row for row in targets])
        if not truth.any():
            continue
        total = 0.0
        for threshold in np.unique(scores[:, c]):
            kept = scores[:, c] >= threshold
            gained = (truth & (scores[:, c] == threshold)).sum() / truth.sum()
            total += gained * truth[kept].mean()
        means.append(total)
    found = cm.mean_average_precision(scores, targets)
    assert found == pytest.approx(np.mean(means), abs=1e-12)
    sklearn = pytest.importorskip("sklearn.metrics")
    multi_hot = np.array([[c in row for c in range(CLASSES - 1)] for row in targets])
    expected = sklearn.average_precision_score(multi_hot, scores[:, : CLASSES - 1], average="macro")
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_worst_classes_come_first_with_what_they_were_taken_for():
    labels = np.array([[0]] * 4 + [[1]] * 3 + [[3]] * 2)
    predictions = np.array([0, 1, 2, 2, 1, 1, 1, 0, 1])
    right = predictions == labels[:, 0]
    worst = cm.worst_classes(predictions, right, labels, "abcd", "ABCD")
    assert worst == [
        {"class": "d", "examples": 2, "correct": 0,
         "confused_with": [{"class": "A", "examples": 1}, {"class": "B", "examples": 1}]},
        {"class": "a", "examples": 4, "correct": 1,
         "confused_with": [{"class": "C", "examples": 2}, {"class": "B", "examples": 1}]},
        {"class": "b", "examples": 3, "correct": 3, "confused_with": []},
    ]  # fmt: skip


def test_no_more_than_ten_classes_and_five_confusions_are_told():
    labels = np.repeat(np.arange(12), 7)[:, None]
    predictions = np.tile(np.arange(20, 27), 12)
    names = [str(i) for i in range(30)]
    worst = cm.worst_classes(predictions, np.zeros(84, bool), labels, names, names)
    assert [each["class"] for each in worst] == names[:10]
    assert all(len(each["confused_with"]) == 5 for each in worst)
