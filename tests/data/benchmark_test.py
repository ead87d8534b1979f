import itertools
import time

import pytest
import tiny_records

from clipa_t5x import errors
from clipa_t5x.data import benchmark


def test_rates_are_of_time_and_of_cpu_time():
    def batches():
        while True:
            time.sleep(0.01)
            yield None

    (rate,) = benchmark.measure({"sleep": batches}, 8, 0.1)
    assert rate.name == "sleep" and rate.per_second < 8 / 0.01
    assert rate.per_cpu_second > 2 * rate.per_second  # sleeping costs none


def test_at_least_one_batch_is_taken():
    stages = {"one": lambda: itertools.repeat(0)}
    assert benchmark.measure(stages, 1, 0.0)[0].per_second > 0


def test_the_table_has_a_line_for_every_stage(tmp_path):
    name = tiny_records.task("benchmark_test", tiny_records.write(tmp_path) and tmp_path)
    table = benchmark.run(tiny_records.config(name), seconds=0.0)
    lines = table.splitlines()
    assert lines[0] == "benchmark_test: 13 records to 16 px and 8 tokens, batches of 8"
    assert [line[:28].strip() for line in lines[2:]] == [
        "read, check", "+ tokenize captions", "+ decode images", "+ batches of this host",
        "+ to the devices",
    ]  # fmt: skip


def test_missing_data_are_named(tmp_path):
    name = tiny_records.task("benchmark_test", tmp_path, vocabulary=None)
    with pytest.raises(errors.UserError, match="no file matches"):
        benchmark.run(tiny_records.config(name))
