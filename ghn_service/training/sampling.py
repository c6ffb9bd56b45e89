"""Target networks for training: an endless, resumable stream with balanced cost.

Networks are numbered; candidate ``index`` is always the same network and is kept or left out by a number drawn from
``(seed, index)`` alone. So the state of the stream is the next index.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ghn_service.errors import GhnServiceError, TrainingError
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.features import GraphFeatures, build_features
from ghn_service.training.passes import avoid_slow_layers
from ghn_service.training.schedule import largest_macs
from ghn_service.training.settings import SamplingSettings

logger = logging.getLogger(__name__)
_TOO_MANY_REJECTED = 10_000


class TargetArchitecture(Protocol):
    """An architecture that can be trained on: what ``ghn_architectures.generator`` makes."""

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one image."""
        ...

    @property
    def family(self) -> str:
        """Name of the kind of network."""
        ...

    def build(self, *, initialize: bool = True) -> nn.Module:
        """The network as a torch module; its parameters have the names that the graph gives them.

        Args:
            initialize: Whether weights get initial values; otherwise they are whatever memory held.
        """
        ...

    def graph(self) -> ArchitectureGraph:
        """The architecture's graph."""
        ...


ArchitectureSource = Callable[[int], TargetArchitecture]


@dataclass(frozen=True, eq=False)
class TargetNetwork:
    """A target network ready for predicted weights.

    Attributes:
        index: Number of the candidate in its split.
        module: The network in training mode; its BatchNorm layers use the statistics of the batch.
        features: What the hypernetwork reads.
        constants: Parameters that are not predicted, and buffers.
        multiply_adds: Cost of one image.
    """

    index: int
    module: nn.Module
    features: GraphFeatures
    constants: dict[str, Tensor]
    multiply_adds: int


def use_batch_statistics(module: nn.Module) -> nn.Module:
    """Makes every BatchNorm layer of ``module`` normalise with the batch's own statistics, in every mode."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return module


def to_channels_last(module: nn.Module) -> nn.Module:
    """Brings a module's weights into the memory order that convolutions are fastest with; returns it."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def prepare(index: int, architecture: TargetArchitecture, config: GHNConfig, device: torch.device) -> TargetNetwork:
    """Builds a network and its features; what is not predicted has the network's own seeded initial values.

    Where everything is predicted, no initial value is computed.

    Raises:
        TrainingError: The graph names a parameter that the network does not have.
    """
    graph = architecture.graph()
    features = build_features(graph, config)
    names = {target.name for target in features.targets}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(index)
        module = _build(architecture, is_all_predicted=all(spec.name in names for spec in graph.parameters()))
    own = dict(module.named_parameters())
    if missing := sorted(names - set(own)):
        raise TrainingError(f"network {index}: the graph names parameters that the module lacks: {missing[:5]}")
    constants = {name: tensor.detach().to(device) for name, tensor in own.items() if name not in names}
    constants.update({name: tensor.to(device) for name, tensor in module.named_buffers()})
    return TargetNetwork(index, module, features, constants, architecture.multiply_adds)


def _build(architecture: TargetArchitecture, *, is_all_predicted: bool) -> nn.Module:
    """The module in training mode; without memory of its own where nothing but predicted tensors is needed."""
    if is_all_predicted:
        with torch.device("meta"):
            module = avoid_slow_layers(use_batch_statistics(architecture.build(initialize=False))).train()
        if not any(True for _ in module.buffers()):
            return module
    module = architecture.build(initialize=not is_all_predicted)
    return avoid_slow_layers(use_batch_statistics(module)).train()


def find_candidate(source: ArchitectureSource, index: int) -> TargetArchitecture | None:
    """Candidate ``index`` with its cost known; ``None`` where it cannot be made (for this size of image)."""
    try:
        candidate = source(index)
        return candidate if candidate.multiply_adds > 0 else None
    except (GhnServiceError, RuntimeError) as error:  # torch raises the latter where layers do not fit together
        logger.warning("candidate %d cannot be made and is left out: %s", index, error)
        return None


class NetworkStream:
    """Candidates in order, thinned by cost.

    Args:
        source: Gives candidate ``index``.
        settings: Limits and balance.
        seed: Seed of the thinning.
        next_index: Where to start.
    """

    def __init__(
        self, source: ArchitectureSource, settings: SamplingSettings, *, seed: int = 0, next_index: int = 0
    ) -> None:
        self.source = source
        self.settings = settings
        self.seed = seed
        self.next_index = next_index

    def take(self, count: int, progress: float) -> list[tuple[int, TargetArchitecture]]:
        """The next ``count`` networks that pass, with their numbers.

        Args:
            count: Networks wanted.
            progress: Progress of the run, 0 to 1; decides the size limit.

        Raises:
            TrainingError: The limits let nothing pass.
        """
        candidates = self._passing(largest_macs(progress, self.settings))
        return [next(candidates) for _ in range(count)]

    def _passing(self, largest: float) -> Iterator[tuple[int, TargetArchitecture]]:
        rejected = 0
        while rejected < _TOO_MANY_REJECTED:
            index = self.next_index
            self.next_index += 1
            candidate = self._candidate(index)
            if candidate is not None and self._is_kept(index, candidate, largest):
                rejected = 0
                yield index, candidate
            rejected += 1
        raise TrainingError(
            f"none of {rejected} architectures is within {largest:.3g} multiply-adds; raise sampling.largest_macs"
        )

    def _candidate(self, index: int) -> TargetArchitecture | None:
        return find_candidate(self.source, index)

    def _is_kept(self, index: int, candidate: TargetArchitecture, largest: float) -> bool:
        cost = candidate.multiply_adds
        if cost > largest:
            return False
        share = min(1.0, self.settings.budget_macs / cost) * self.settings.keep.get(candidate.family, 1.0)
        return share >= 1.0 or random.Random(f"{self.seed}/{index}").random() < share
