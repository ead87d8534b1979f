import sys

import experiments
import pytest

from clipa_t5x import agreement


def test_one_process_agrees_with_itself():
    assert agreement.agree("name", "word", lambda seen: f"{seen}") == "['word']"
    assert agreement.same_for_all("name", lambda: "value") == "value"


@pytest.mark.parametrize("seen, word", [([], ""), (["", ""], ""), (["", "b", "c"], "b")])
def test_the_first_word(seen, word):
    assert agreement.first_word(seen) == word


# Names in another order on each process, one of them in a thread, and each more than once.
AGREEING = """
import sys, threading
import jax
from clipa_t5x import agreement

address, count, index = (a.partition("=")[2] for a in sys.argv[1:])
jax.distributed.initialize(address, int(count), int(index))
me = jax.process_index()

def background():
    for i in range(20):
        word = agreement.agree("beside", f"{i}:{me}", ",".join)
        assert word == f"{i}:0,{i}:1", word

thread = threading.Thread(target=background)
thread.start()
for i in range(20):
    assert agreement.agree("main", "" if me == i % 2 else f"not {me}", agreement.first_word) == (
        f"not {1 - i % 2}"
    )
    assert agreement.same_for_all("one", lambda: f"{i} of {me}") == f"{i} of 0"
    assert agreement.same_for_all("empty", str) == ""
thread.join()
client = agreement.distributed.global_state.client
assert agreement.same_for_all("end", str) == ""
left = client.key_value_dir_get("clipa_t5x/main/")
assert len(left) <= 2, left  # Old words are forgotten.
"""


def test_two_processes_agree(tmp_path):
    experiments.run_processes([sys.executable, "-c", AGREEING], str(tmp_path), 2, num_devices=1)
