"""The networks to train and evaluate on: splits of the generator, and the registry's reference networks."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn

from ghn_architectures.architecture import CANONICAL, Architecture
from ghn_architectures.generator import sample_architecture
from ghn_architectures.interface import Interface
from ghn_architectures.registry import ARCHITECTURES, reference_architecture
from ghn_service.errors import TrainingError
from ghn_service.graph.architecture import ArchitectureGraph
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

    @property
    def interface(self) -> Interface:
        """The same sizes as the generator wants them."""
        return Interface(self.num_classes, self.in_channels, self.image_size)


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
        """Network number ``index``, modulo the size of the pool.

        Raises:
            TrainingError: It does not run on images of this size.
        """
        return _sample(self.split, index % self.size, self.task)


@dataclass(frozen=True)
class SampledNetwork:
    """A network of the generator with its cost, which takes as long to find as the network itself.

    Attributes:
        architecture: The network.
        multiply_adds: Multiply-adds of one image.
    """

    architecture: Architecture
    multiply_adds: int

    @property
    def family(self) -> str:
        """Name of the family in the generator."""
        return self.architecture.family

    def build(self, *, initialize: bool = True) -> nn.Module:
        """The network as a torch module."""
        return self.architecture.build(initialize=initialize)

    def graph(self) -> ArchitectureGraph:
        """The network's graph."""
        return self.architecture.graph()


@functools.lru_cache(maxsize=65536)
def _sample(split: str, index: int, task: Task) -> SampledNetwork:
    architecture = sample_architecture(
        split, index, num_classes=task.num_classes, in_channels=task.in_channels, image_size=task.image_size
    )
    if task.image_size != CANONICAL.image_size:
        _check_it_runs(architecture)
    return SampledNetwork(architecture, architecture.multiply_adds)


def _check_it_runs(architecture: Architecture) -> None:
    """Runs shapes, not values, through a network: random ones need not fit every size of image.

    Raises:
        TrainingError: Its layers do not fit together for this size.
    """
    shape = architecture.interface.input_shape
    try:
        with torch.device("meta"), torch.no_grad():
            architecture.build(initialize=False).eval()(torch.empty(2, *shape))
    except RuntimeError as error:
        raise TrainingError(f"{architecture.name} does not run on images of shape {shape}: {error}") from error


def reference_names() -> tuple[str, ...]:
    """Names of the registry's networks."""
    return tuple(ARCHITECTURES)


def find_network(split: str, name: str, task: Task) -> TargetArchitecture:
    """The network ``name`` of a split: a number, or a name in the registry for ``reference``.

    Raises:
        InvalidOptionError: There is no such split or network.
    """
    if split != REFERENCE:
        return _sample(split, int(name), task)
    return reference_architecture(name, task.interface)
