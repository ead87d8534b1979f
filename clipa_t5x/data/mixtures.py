"""Mixtures of tasks with rates, read at any position.

Samples come in cycles of `CYCLE`. In each, every component has its exact share of places, in an
order of its own; a component goes through its own sequence of epochs as if it were alone, and skips
nothing. So which component's which sample stands at an index is found without any that came before.
"""

import copy
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from clipa_t5x.data import bad_records, captions, sources
from clipa_t5x.errors import UserError

# Rates that are given in thousandths come out exactly.
CYCLE = 1000
# Draws of `captions.uniform` that nothing else uses.
_PLACE_STREAM, _SEED_STREAM = 2001, 2002


def shares(rates: Mapping[str, float], cycle: int = CYCLE) -> dict[str, int]:
    """Places of each component in a cycle, whose sum is `cycle`: the largest remainders get more.

    Raises:
      UserError: a rate is no positive number, or too small for a place.
    """
    for name, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < np.inf:
            raise UserError(
                f"the rate of {name!r} in the mixture is {rate!r}; it must be a number above 0: "
                "leave the task out if it is to give nothing."
            )
    exact = np.asarray(list(rates.values()), np.float64)
    exact = exact / exact.sum() * cycle
    # Rounded, so that 0.7 of 1000 is 700 whatever the last bit of the quotient.
    places = np.floor(np.round(exact, 6)).astype(np.int64)
    most = np.argsort(places - exact, kind="stable")
    places[most[: cycle - places.sum()]] += 1
    for name, number in zip(rates, places, strict=True):
        if not number:
            raise UserError(
                f"the rate of {name!r} in the mixture is {rates[name]} of {sum(rates.values())}, "
                f"less than one sample in {cycle}: raise it, or leave the task out."
            )
    return {name: int(number) for name, number in zip(rates, places, strict=True)}


def check_alike(tasks: Sequence[seqio.Task]) -> None:
    """Refuses tasks whose examples differ in kind: a batch holds those of all.

    Raises:
      UserError: names the first that differ, and what in.
    """
    first = tasks[0]
    for task in tasks[1:]:
        for what, one, other in (
            ("output features", first.output_features, task.output_features),
            ("preprocessors", first.preprocessors, task.preprocessors),
        ):
            if difference := _difference(one, other):
                raise UserError(
                    f"the tasks {first.name!r} and {task.name!r} of the mixture differ in their "
                    f"{what}: {difference}. Give both the same vocabulary, text_reduction and "
                    "image_preprocessor."
                )


def _difference(one: Any, other: Any) -> str:
    """Where two things first differ and what they are there; '' if they do not."""
    if isinstance(one, seqio.utils.Feature) and isinstance(other, seqio.utils.Feature):
        one, other = vars(one), vars(other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        parts = ((key, _difference(one.get(key), other.get(key))) for key in {**one, **other})
        return next((f"{key} {part}" for key, part in parts if part), "")
    a, b = _describe(one), _describe(other)
    return "" if a == b else f"{a} and {b}"


def _describe(thing: Any) -> str:
    """A text that is the same for things that do the same, as far as one can see."""
    if isinstance(thing, functools.partial):
        arguments = [*map(_describe, thing.args)]
        arguments += [f"{k}={_describe(v)}" for k, v in sorted(thing.keywords.items())]
        return f"{_describe(thing.func)}({', '.join(arguments)})"
    if isinstance(thing, list | tuple):
        return ", ".join(map(_describe, thing))
    if isinstance(thing, seqio.Vocabulary):
        return f"{type(thing).__name__}({getattr(thing, 'path', thing.vocab_size)})"
    if isinstance(thing, seqio.utils.Feature):
        return type(thing).__name__
    return getattr(thing, "__qualname__", None) or repr(thing)


def seed_of(name: str, seed: int) -> int:
    """The seed of a component: tasks over the same records are not in the same order."""
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    draw = captions.uniform(np.asarray([[seed, word]], np.int64), _SEED_STREAM)
    return int(draw[0] * 2.0**53)


class MixtureSource:
    """The samples of several tasks' sources: a `sources.PositionalSource`."""

    def __init__(self, tasks: Sequence[seqio.Task], rates: Mapping[str, float]):
        """Describes the mixture; touches no file.

        Args:
          tasks: the components, over positional sources.
          rates: how often each is taken, by the tasks' names; their sum may be any.

        Raises:
          UserError: see `shares` and `check_alike`.
        """
        check_alike(tasks)
        self.records = bad_records.BadRecords()
        self._shares = shares({task.name: rates[task.name] for task in tasks})
        self._sources: dict[str, Any] = {}
        for task in tasks:
            # What is bad here is the mixture's, not that of others who read the same task.
            source: Any = copy.copy(task.source)
            source.records = self.records
            self._sources[task.name] = source

    def feature_names(self) -> Sequence[str]:
        """Those of `sources.EXAMPLE_SPEC` that the examples of all components have."""
        names = [set(source.feature_names()) for source in self._sources.values()]
        return [name for name in sources.EXAMPLE_SPEC if all(name in known for known in names)]

    def num_input_examples(self, split: str) -> int:
        """Number of records in a split of all components."""
        return sum(source.num_input_examples(split) for source in self._sources.values())

    def num_classes(self, split: str) -> int | None:
        """How many classes the labels of all components tell apart, where they agree on it."""
        found = {source.num_classes(split) for source in self._sources.values()}
        return found.pop() if len(found) == 1 else None

    def identity(self, split: str) -> dict[str, Any]:
        """What the order depends on beside the seed: the shares, and every component's own."""
        facts = {"mixture": ", ".join(f"{name} {n}" for name, n in self._shares.items())}
        for name, source in self._sources.items():
            facts |= {f"{name}/{key}": value for key, value in source.identity(split).items()}
        return facts

    def places(self, indices: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of components, places in their own sequences) of indices: int64 [n] all."""
        components, own = np.empty_like(indices), np.empty_like(indices)
        cycles = indices // CYCLE
        share = np.asarray(list(self._shares.values()))
        for cycle in np.unique(cycles):
            where = np.flatnonzero(cycles == cycle)
            slots = indices[where] - cycle * CYCLE
            order, ranks = self._cycle(seed, int(cycle))
            components[where] = order[slots]
            own[where] = cycle * share[order[slots]] + ranks[slots]
        return components, own

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _cycle(self, seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """(component, how many of it came before in this cycle) of each place of a cycle."""
        keys = np.stack([np.full(CYCLE, seed), cycle * CYCLE + np.arange(CYCLE)], axis=1)
        shuffled = np.argsort(captions.uniform(keys, _PLACE_STREAM), kind="stable")
        numbers = list(self._shares.values())
        order = np.repeat(np.arange(len(numbers)), numbers)[shuffled]
        ranks = np.empty_like(order)
        for component, share in enumerate(numbers):
            ranks[order == component] = np.arange(share)
        return order, ranks

    def examples_at(
        self,
        split: str,
        indices: np.ndarray,
        *,
        shuffle: bool,
        seed: int,
        replace_bad: bool = True,
        attempt: int = 0,
    ) -> dict[str, np.ndarray]:
        """The examples at global indices, as `sources.ImageTextSource.examples_at`.

        Bad records are replaced by others of the same component.
        """
        components, own = self.places(indices, seed)
        result: dict[str, np.ndarray] = {}
        for number, (name, source) in enumerate(self._sources.items()):
            where = np.flatnonzero(components == number)
            if not len(where):
                continue
            found = source.examples_at(
                split, own[where], shuffle=shuffle, seed=seed_of(name, seed),
                replace_bad=replace_bad, attempt=attempt,
            )  # fmt: skip
            for key, values in found.items():
                if key not in result:
                    result[key] = np.empty((len(indices), *values.shape[1:]), values.dtype)
                result[key][where] = values
        return {**result, "index": indices}

    def where(self, split: str, index: int, *, shuffle: bool, seed: int, attempt: int = 0) -> str:
        """The task, and the shard and the number in it of a sample's record."""
        components, own = self.places(np.asarray([index], np.int64), seed)
        name = list(self._sources)[int(components[0])]
        place = {"shuffle": shuffle, "seed": seed_of(name, seed), "attempt": attempt}
        return f"{self._sources[name].where(split, int(own[0]), **place)} of task {name}"


@functools.lru_cache(maxsize=16)
def source_of(mixture: seqio.Mixture) -> MixtureSource:
    """The source of a SeqIO mixture; the same for the same object.

    Mixtures within it count by their tasks.

    Raises:
      UserError: its tasks differ in kind, or a rate is out of range.
    """
    return MixtureSource(
        mixture.tasks, {task.name: mixture.get_rate(task) for task in mixture.tasks}
    )
