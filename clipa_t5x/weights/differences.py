"""How the arrays of a file or checkpoint differ from a model's, in words that help to mend it."""

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from clipa_t5x.weights import architecture
from clipa_t5x.weights.layouts import Shape, Shapes

# How many differences are shown, and among how many names the nearest is looked for.
_SHOWN, _SEARCHED = 8, 4096


def of_models(
    there: Shapes, here: Mapping[str, Sequence[Shape]], model: Shapes | None = None
) -> str:
    """Says which options of a model and which parameters differ.

    Args:
      there: shapes by name, of the file.
      here: by name, the shapes that would do.
      model: shapes of the model's parameters as they are here, where `here` is in another layout.

    Returns:
      'is of a different model (options): so many parameters differ: the first of them', or ''
      where nothing differs.
    """
    arrays = of_arrays(there, here, "parameters")
    if not arrays:
        return ""
    own = {name: shapes[0] for name, shapes in here.items()} if model is None else model
    options = architecture.compare(architecture.options(there), architecture.options(own))
    return f"is of a different model{f' ({options})' if options else ''}: {arrays}"


def of_arrays(there: Shapes, here: Mapping[str, Sequence[Shape]], noun: str) -> str:
    """'3 parameters differ: ...' with the nearest names; '' where nothing differs."""
    count = sum(1 for _ in _differences(there, here))
    shown = "; ".join(itertools.islice(_in_words(there, here), _SHOWN))
    return f"{count} {noun} differ: {shown}{'; ...' * (count > _SHOWN)}" if count else ""


def _differences(
    there: Shapes, here: Mapping[str, Sequence[Shape]]
) -> Iterator[tuple[str, Shape | None, Shape | None]]:
    """(name, shape there, shape here), None where there is none; what is missing comes first."""
    yield from ((name, None, shapes[0]) for name, shapes in here.items() if name not in there)
    yield from ((name, tuple(shape), None) for name, shape in there.items() if name not in here)
    for name, shapes in here.items():
        if name in there and tuple(there[name]) not in map(tuple, shapes):
            yield name, tuple(there[name]), tuple(shapes[0])


def _in_words(there: Shapes, here: Mapping[str, Sequence[Shape]]) -> Iterator[str]:
    missing = [name for name in here if name not in there]
    unknown = [name for name in there if name not in here]
    for name, shape_there, shape_here in _differences(there, here):
        if shape_there is None:
            yield f"{name} is missing there{_nearest(name, unknown)}"
        elif shape_here is None:
            yield f"{name} is unknown here{_nearest(name, missing)}"
        else:
            yield f"{name} is {shape_there} there and {shape_here} here"


def _nearest(name: str, others: Iterable[str]) -> str:
    """Of the names that only the other side has, the one that might be meant."""
    close = difflib.get_close_matches(name, list(itertools.islice(others, _SEARCHED)), n=1)
    return f" (nearest: {close[0]})" if close else ""
