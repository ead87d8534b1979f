import random
import threading

import pytest
import tensorflow as tf

from clipa_t5x.data import shard_reader
from clipa_t5x.data.shard_reader import BlockCache, ShardReader

DATA = random.Random(0).randbytes(10_000)
URL = "ram://shard_reader/data"


@pytest.fixture(scope="module", autouse=True)
def remote_file():
    with tf.io.gfile.GFile(URL, "wb") as f:
        f.write(DATA)


@pytest.fixture(params=["local", "remote", "blocks", "small cache"])
def reader(request, tmp_path):
    path, cache = URL, None
    if request.param == "local":
        path = str(tmp_path / "data")
        (tmp_path / "data").write_bytes(DATA)
    elif request.param != "remote":
        cache = BlockCache(10**6 if request.param == "blocks" else 1, 1000)
    with ShardReader(path, cache) as opened:
        yield opened


def test_paths_with_a_scheme_are_remote():
    assert shard_reader.is_local("/a/b:c") and shard_reader.is_local("a//b")
    assert not any(map(shard_reader.is_local, ("gs://a/b", "s3://a", "ram://a")))


def test_reading_equals_reading_a_file(reader):
    assert reader.size == len(DATA)
    rng = random.Random(1)
    for _ in range(200):
        offset, size = rng.randrange(len(DATA)), rng.randrange(4000)
        assert reader.read(offset, size) == DATA[offset : offset + size]


@pytest.mark.parametrize("offset, size", [
    (0, 0), (0, 1), (999, 1), (999, 2), (1000, 1000), (0, 10_000), (9_999, 1), (5, 0),
    (9_999, 10), (0, 20_000), (10_000, 1), (10_000, 0), (10_001, 5), (50_000, 5_000),
])  # fmt: skip
def test_reading_at_the_edges(reader, offset, size):
    assert reader.read(offset, size) == DATA[offset : offset + size]


@pytest.mark.parametrize("offset, size", [
    (-1, 5), (5, -1), (-(2**63), 2**63 - 1), (2**62 + 1, 5), (2**63, 5), (10_000, 2**62),
])  # fmt: skip
def test_places_that_no_file_has_are_empty(reader, offset, size):
    assert reader.read(offset, size) == b""


def test_more_than_there_is(reader):
    assert reader.read(5, 2**62) == DATA[5:]


class Fetches:
    """Stands for the fetches of a cache: counts them, and lets one fail or wait."""

    def __init__(self, cache):
        self.blocks, self.fail, self.go_on = [], set(), None
        self._fetch = cache._fetch
        cache._fetch = self

    def __call__(self, path, number):
        self.blocks.append(number)
        if self.go_on is not None:
            self.go_on.wait(10)
        if number in self.fail:
            raise tf.errors.UnavailableError(None, None, "the network")
        return self._fetch(path, number)


def test_a_block_is_fetched_once():
    cache = BlockCache(10**6, 1000)
    fetches = Fetches(cache)
    for offset in (0, 10, 990, 1500):
        assert cache.read(URL, offset, 20) == DATA[offset : offset + 20]
    assert fetches.blocks == [0, 1]


def test_the_cache_is_bounded_and_drops_what_was_not_used():
    cache = BlockCache(3500, 1000)
    fetches = Fetches(cache)
    for number in (0, 1, 2, 0, 3):  # three blocks; the second is out
        cache.read(URL, number * 1000, 10)
        assert sum(len(block.result()) for block in cache._blocks.values()) <= 3500
    assert fetches.blocks == [0, 1, 2, 3]
    cache.read(URL, 0, 10)
    assert len(fetches.blocks) == 4
    cache.read(URL, 1000, 10)
    assert fetches.blocks == [0, 1, 2, 3, 1]


def test_a_read_may_be_greater_than_the_cache():
    assert BlockCache(1, 1000).read(URL, 100, 9000) == DATA[100:9100]


def test_a_failing_fetch_is_told_and_tried_again():
    cache = BlockCache(10**6, 1000)
    fetches = Fetches(cache)
    fetches.fail = {1}
    for _ in range(2):
        with pytest.raises(tf.errors.UnavailableError, match="the network"):
            cache.read(URL, 0, 3000)
    assert sorted(fetches.blocks) == [0, 1, 1, 2]
    fetches.fail = set()
    assert cache.read(URL, 0, 3000) == DATA[:3000]
    assert sorted(fetches.blocks) == [0, 1, 1, 1, 2]


def test_threads_that_want_the_same_block_share_its_fetch():
    cache = BlockCache(10**6, 1000)
    fetches = Fetches(cache)
    fetches.go_on = threading.Event()
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(cache.read(URL, 500, 1000))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    fetches.go_on.set()
    for thread in threads:
        thread.join()
    assert found == [DATA[500:1500]] * 8
    assert sorted(fetches.blocks) == [0, 1]


def test_many_threads_and_few_blocks():
    cache = BlockCache(2000, 100)
    wrong = []

    def read(seed):
        rng = random.Random(seed)
        for _ in range(200):
            offset, size = rng.randrange(len(DATA)), rng.randrange(500)
            if cache.read(URL, offset, size) != DATA[offset : offset + size]:
                wrong.append((offset, size))

    threads = [threading.Thread(target=read, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(cache._blocks) <= 20


def test_files_are_told_apart():
    with tf.io.gfile.GFile(f"{URL}2", "wb") as f:
        f.write(b"other")
    cache = BlockCache(10**6, 1000)
    assert cache.read(URL, 0, 5) == DATA[:5]
    assert cache.read(f"{URL}2", 0, 5) == b"other"


def test_an_absent_file_is_an_error():
    with pytest.raises(tf.errors.NotFoundError):
        BlockCache(1000, 1000).read("ram://shard_reader/absent", 0, 1)
    with pytest.raises(FileNotFoundError), ShardReader("/absent"):
        pass
