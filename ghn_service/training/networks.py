"""The networks to train and evaluate on: splits of the generator, and the registry's reference networks."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from architectures.generator import sample_architecture
from ghn_service.errors import InvalidOptionError
from ghn_service.training.sampling import TargetArchitecture

REFERENCE = "reference"


@dataclass(frozen=True)
class Task:
    """Sizes of the networks' input and output.

    Attributes:
        num_classes: Classes.
        in_channels: Channels of an image.
        image_size: Rows and columns of an image.
    """

    num_classes: int = 10
    in_channels: int = 3
    image_size: int = 32


@dataclass(frozen=True)
class Pool:
    """The first ``size`` networks of a split, over and over: drawing a network costs as much as training it a little.

    Attributes:
        split: Name of a split of the generator.
        task: Sizes of input and output.
        size: Number of different networks.
    """

    split: str
    task: Task
    size: int

    def __call__(self, index: int) -> TargetArchitecture:
        """Network number ``index``, modulo the size of the pool."""
        return _sample(self.split, index % self.size, self.task)


@functools.lru_cache(maxsize=65536)
def _sample(split: str, index: int, task: Task) -> TargetArchitecture:
    return sample_architecture(
        split, index, num_classes=task.num_classes, in_channels=task.in_channels, image_size=task.image_size
    )


def reference_names() -> tuple[str, ...]:
    """Names of the registry's networks."""
    from architectures.registry import ARCHITECTURES

    return tuple(ARCHITECTURES)


def network_names(split: str, count: int) -> tuple[str, ...]:
    """Names of the first ``count`` networks of a split; all of the registry for ``reference``."""
    return reference_names() if split == REFERENCE else tuple(str(index) for index in range(count))


def find_network(split: str, name: str, task: Task) -> TargetArchitecture:
    """The network ``name`` of a split: a number, or a name in the registry for ``reference``.

    Raises:
        InvalidOptionError: There is no such split or network.
    """
    if split != REFERENCE:
        return _sample(split, int(name), task)
    from architectures.registry import ARCHITECTURES

    if name not in ARCHITECTURES:
        raise InvalidOptionError(f"no reference network is called {name!r}; known are {', '.join(ARCHITECTURES)}")
    return _registered(name, task)
