"""Tables of strangers: what is well formed is read, the rest is left out."""

import math

import pytest

from clipa_t5x import run_tables

CLASS = {
    "class": "cat",
    "examples": 50,
    "correct": 10,
    "confused_with": [{"class": "dog", "examples": 30}, {"class": "fox", "examples": 10}],
}
CONFUSION = {
    "name": "zoo",
    "num_examples": 100,
    "num_classes": 3,
    "accuracy": 0.6,
    "worst": [CLASS],
}
PARAMETER = {
    "parameter": "a/kernel",
    "shape": [4, 8],
    "dtype": "float32",
    "sharding": [None, ["data", "model"]],
    "bytes": 32,
}


def test_a_confusion_is_read():
    worst = (run_tables.ConfusedClass("cat", 50, 10, (("dog", 30), ("fox", 10))),)
    assert run_tables.confusion(CONFUSION) == run_tables.Confusion("zoo", 100, 3, 0.6, worst)


@pytest.mark.parametrize(
    "change",
    [
        {"class": 3},
        {"examples": 0},
        {"examples": -1},
        {"examples": True},
        {"correct": 51},
        {"correct": "1"},
        {"correct": 1.5},
        {"examples": 10**400},
    ],
    ids=str,
)
def test_classes_that_make_no_sense_are_left_out(change):
    found = run_tables.confusion({**CONFUSION, "worst": [{**CLASS, **change}, CLASS]})
    assert [row.name for row in found.worst] == ["cat"]
    assert run_tables.confusion({**CONFUSION, "worst": [{**CLASS, **change}]}) is None


@pytest.mark.parametrize("value", [None, "high", -0.1, 1.1, math.nan, math.inf, True, [], 10**400])
def test_facts_that_make_no_sense_are_unknown(value):
    found = run_tables.confusion({**CONFUSION, "accuracy": value})
    assert found.accuracy is None and found.num_examples == 100


@pytest.mark.parametrize(
    "record", [{}, {"name": "x"}, {"name": "x", "worst": {}}, {"worst": [CLASS]}]
)
def test_no_confusion_is_none(record):
    assert run_tables.confusion(record) is None


def test_sizes_are_bounded():
    row = {**CLASS, "confused_with": CLASS["confused_with"] * 1000}
    found = run_tables.confusion({**CONFUSION, "worst": [row] * 1000})
    assert len(found.worst) == run_tables.MAX_CLASSES
    assert len(found.worst[0].confused_with) == run_tables.MAX_CONFUSED_WITH
    table = run_tables.sharding({"parameters": [PARAMETER] * 10_000})
    assert len(table.parameters) == run_tables.MAX_PARAMETERS


def test_a_sharding_is_read():
    scalar = {**PARAMETER, "parameter": "b", "shape": [], "sharding": [], "bytes": 4}
    broken = [{**PARAMETER, field: None} for field in PARAMETER]
    found = run_tables.sharding(
        {"mesh": {"data": 2, "model": 4, "odd": "x"}, "parameters": [PARAMETER, scalar, *broken, 7]}
    )
    assert found == run_tables.Sharding(
        "data=2, model=4",
        (
            run_tables.Parameter("a/kernel", "4 x 8", "float32", "-, data+model", 32),
            run_tables.Parameter("b", "scalar", "float32", "", 4),
        ),
    )
    assert run_tables.sharding({"mesh": {"data": 1}, "parameters": broken}) is None
