"""One decision for all processes of a run, from what each of them saw.

It goes through the key-value store of jax's coordination service, not through the devices: it may
be reached in a thread beside training, and carries text.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import distributed  # jax has no public door to its key-value store.

_ROUNDS: collections.Counter[str] = collections.Counter()


def agree(
    name: str, seen: str, decide: Callable[[Sequence[str]], str], timeout_secs: int = 3600
) -> str:
    """What process 0 decides, on every process; also a barrier: none returns before all are here.

    Args:
      name: of what is decided. Every process reaches the decisions of a name in the same order, and
        those of different names in any.
      seen: this process's word on it.
      decide: called on process 0 with every process's word, by process index. It must not raise:
        the others would wait in vain.
      timeout_secs: how long to wait for the others.

    Raises:
      jax.errors.JaxRuntimeError: a process did not come in time.
    """
    if jax.process_count() == 1:
        return decide([seen])
    _ROUNDS[name] += 1
    client: Any = distributed.global_state.client
    round_ = f"clipa_t5x/{name}/{_ROUNDS[name]}"
    timeout_ms = 1000 * timeout_secs
    if jax.process_index() != 0:
        client.key_value_set(f"{round_}/{jax.process_index()}", seen)
        return client.blocking_key_value_get(f"{round_}/decision", timeout_ms)
    others = [
        client.blocking_key_value_get(f"{round_}/{i}", timeout_ms)
        for i in range(1, jax.process_count())
    ]
    decision = decide([seen, *others])
    client.key_value_set(f"{round_}/decision", decision)
    # Who is here has read the decision before this one.
    client.key_value_delete(f"clipa_t5x/{name}/{_ROUNDS[name] - 1}/")
    return decision


def first_word(seen: Sequence[str]) -> str:
    """A decision: the first word that is not empty, '' where none of them says anything."""
    return next(filter(None, seen), "")


def same_for_all(name: str, value: Callable[[], str]) -> str:
    """Process 0's value on every process; the others do not compute it."""
    return agree(name, "", lambda _: value())
