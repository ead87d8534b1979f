import dataclasses
from collections.abc import Callable
from typing import Any


def gelu(x, approximate=True):
    return x


@dataclasses.dataclass
class Tower:
    width: int
    depth: int = 2
    act: Callable = gelu
    dtype: Any = complex
    rates: tuple = (0.1,)
    pooling: Any = None


@dataclasses.dataclass
class Pooling:
    kind: str = "last"


@dataclasses.dataclass
class Clip:
    image: Tower
    text: Tower
    temperature: float = 0.07
