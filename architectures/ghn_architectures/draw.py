"""``Draw``: random choices that are the same on every machine and with every version of Python and torch."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A stream of random choices that a key decides; streams of different keys are independent.

    Only ``random.Random.random`` is used, whose sequence Python promises to keep; the methods here are our own.
    """

    def __init__(self, key: str) -> None:
        self._random = random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return self._random.random()

    def log_uniform(self, least: float, most: float) -> float:
        """A number between ``least`` and ``most`` whose logarithm is uniform."""
        return least * math.exp(self.uniform() * math.log(most / least))

    def integer(self, least: int, most: int) -> int:
        """An integer from ``least`` to ``most``, both included."""
        return least + int(self.uniform() * (most - least + 1))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform() < probability

    def choice(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[int(self.uniform() * len(options))]

    def weighted(self, weights: dict[str, float]) -> str:
        """One of the keys, with probability in proportion to its value."""
        place = self.uniform() * sum(weights.values())
        for name, weight in weights.items():
            place -= weight
            if place < 0:
                return name
        return next(reversed(weights))

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """``count`` different options."""
        rest = list(options)
        return [rest.pop(int(self.uniform() * len(rest))) for _ in range(count)]
