"""The networks to train and evaluate on: where they come from, their endless stream, and networks ready to train on.

Networks are numbered; candidate ``index`` is always the same network and is kept or left out by a number drawn from
``(seed, index)`` alone. So the state of a stream is the next index.
"""

from __future__ import annotations

import functools
import gzip
import json
import logging
import os
import random
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from ghn_architectures.architecture import CANONICAL, Architecture, Configuration, Interface
from ghn_architectures.generator import sample_architecture
from ghn_architectures.registry import reference_architecture
from ghn_client.atomic_file import write_file
from ghn_client.batchnorm import use_batch_statistics
from ghn_service.errors import GhnServiceError, TrainingError
from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.features import GraphFeatures, build_features
from ghn_service.training.precision import avoid_slow_layers
from ghn_service.training.processes import work_through
from ghn_service.training.settings import SamplingSettings

logger = logging.getLogger(__name__)
REFERENCE = "reference"
_TOO_MANY_REJECTED = 10_000

ArchitectureSource = Callable[[int], Architecture]


_costs: dict[Architecture, int] = {}


def multiply_adds(architecture: Architecture) -> int:
    """Multiply-adds of one image, kept: finding them takes as long as finding the architecture."""
    if architecture not in _costs:
        _costs[architecture] = architecture.multiply_adds
    return _costs[architecture]


@functools.lru_cache(maxsize=65536)
def find_network(split: str, name: str, interface: Interface) -> Architecture:
    """The network ``name`` of a split of the generator, a number, or of the registry (split ``reference``).

    Raises:
        InvalidOptionError: There is no such split or network.
        TrainingError: It does not run on images of this size.
    """
    if split == REFERENCE:
        return reference_architecture(name, interface)
    architecture = sample_architecture(split, int(name), **asdict(interface))
    if interface.image_size != CANONICAL.image_size:  # random layers need not fit every size of image: run shapes
        shape = interface.input_shape
        try:
            with torch.device("meta"), torch.no_grad():
                architecture.build(initialize=False).eval()(torch.empty(2, *shape))
        except RuntimeError as error:
            raise TrainingError(f"{architecture.name} does not run on images of shape {shape}: {error}") from error
    return architecture


@dataclass(frozen=True)
class Pool:
    """The first ``size`` networks of a split, over and over: drawing one costs as much as a little training."""

    split: str
    interface: Interface
    size: int

    def __call__(self, index: int) -> Architecture:
        """Network number ``index``, modulo the size of the pool."""
        return find_network(self.split, str(index % self.size), self.interface)


def training_pools(settings: Mapping[str, Any], earlier: Mapping[str, int]) -> dict[str, int]:
    """Size of the pool per split that a run and those whose weights it began with were trained on, its own first.

    Pools of one split are its first networks, so the largest holds all. ``settings`` are those of a run, as in a card
    or a state, and ``earlier`` the pools before it; the size is 0 where the settings do not say it.
    """
    sampling = settings.get("sampling", {})
    split, size = str(sampling.get("split", "train")), int(sampling.get("pool", 0))
    return {split: size} | dict(earlier) | {split: max(size, earlier.get(split, 0))}


class DrawnPool:
    """A pool whose networks were drawn by all processors at once and are kept in a file of ``folder``.

    Drawing takes 30 ms of processor time each, too long where a GPU waits. A file of another generator is made anew.
    """

    def __init__(self, pool: Pool, folder: Path, *, workers: int | None = None) -> None:
        sizes = "-".join(map(str, asdict(pool.interface).values()))
        self.pool, self.path = pool, folder / f"pool-{pool.split}-{pool.size}-{sizes}.json.gz"
        self._networks = self._read() or self._draw(workers or os.cpu_count() or 1)

    def __call__(self, index: int) -> Architecture:
        """Network number ``index``, modulo the size of the pool.

        Raises:
            TrainingError: It cannot be made for this size of image.
        """
        network = self._networks[index % self.pool.size]
        if network is None:
            raise TrainingError(f"network {index} of {self.pool.split} cannot be made for {self.pool.interface}")
        return network

    def _draw(self, workers: int) -> list[Architecture | None]:
        rows: list[Any] = [None] * self.pool.size
        tasks = [range(first, self.pool.size, 4 * workers) for first in range(4 * workers)]
        for task, found in work_through(_draw_networks, tasks, start=partial(_itself, self.pool), workers=workers):
            rows[task.start :: task.step] = found
        write_file(self.path, gzip.compress(json.dumps(rows).encode(), mtime=0))
        return [row and _decode_network(row, self.pool.interface) for row in rows]

    def _read(self) -> list[Architecture | None]:
        try:
            rows = json.loads(gzip.decompress(self.path.read_bytes()))
            networks = [row and _decode_network(row, self.pool.interface) for row in rows]
        except FileNotFoundError:
            return []
        except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError) as error:
            logger.warning("ignoring a broken file %s: %s", self.path.name, error)
            return []
        samples = range(0, self.pool.size, max(1, self.pool.size // 8))
        return networks if all(networks[index] == find_candidate(self.pool, index) for index in samples) else []


def _itself(pool: Pool) -> Pool:
    return pool


def _draw_networks(pool: Pool, indices: range) -> list[Any]:
    """Family, configuration, name and cost of the networks with these numbers; None for what cannot be made."""
    return [network and _encode_network(network) for network in (find_candidate(pool, index) for index in indices)]


def _encode_network(network: Architecture) -> list[Any]:
    fields = TypeAdapter(type(network.configuration)).dump_python(network.configuration, mode="json")
    return [network.family, network.configuration.family, fields, network.name, multiply_adds(network)]


def _decode_network(row: Sequence[Any], interface: Interface) -> Architecture:
    family, kind, fields, name, cost = row
    configuration = CONFIGURATIONS[kind].validate_python(fields)
    network = Architecture(family, configuration, interface, name)
    _costs[network] = cost
    return network


CONFIGURATIONS = {
    kind.family: TypeAdapter(kind)
    for kind in Configuration.__subclasses__()
    if getattr(sys.modules[kind.__module__], kind.__name__) is kind  # not what a decorator replaced
}


@dataclass(frozen=True, eq=False)
class PreparedNetwork:
    """A network to train on, ready for predicted weights.

    Its BatchNorm layers use the statistics of the batch; ``constants`` are parameters that are not predicted, and
    buffers.
    """

    index: int
    module: nn.Module
    features: GraphFeatures
    constants: dict[str, Tensor]


def to_channels_last(module: nn.Module) -> nn.Module:
    """Brings a module's weights into the memory order that convolutions are fastest with; returns it."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def prepare_network(index: int, architecture: Architecture, config: GHNConfig, device: torch.device) -> PreparedNetwork:
    """Builds a network and its features; what is not predicted has the network's own seeded initial values.

    Where everything is predicted, no initial value is computed.

    Raises:
        TrainingError: The graph names a parameter that the network does not have.
    """
    graph = architecture.graph()
    features = build_features(graph, config)
    names = {target.name for target in features.targets}
    is_all_predicted = all(spec.name in names for spec in graph.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(index)
        # nothing but predicted tensors is needed: a module without memory of its own
        with torch.device("meta") if is_all_predicted else nullcontext():
            module = architecture.build(initialize=not is_all_predicted)
        use_batch_statistics(module)
        if is_all_predicted and any(True for _ in module.buffers()):
            module = use_batch_statistics(architecture.build(initialize=False))
    avoid_slow_layers(module).train()
    own = dict(module.named_parameters())
    if missing := sorted(names - set(own)):
        raise TrainingError(f"network {index}: the graph names parameters that the module lacks: {missing[:5]}")
    constants = {name: tensor.detach().to(device) for name, tensor in own.items() if name not in names}
    constants.update({name: tensor.to(device) for name, tensor in module.named_buffers()})
    return PreparedNetwork(index, module, features, constants)


def find_candidate(source: ArchitectureSource, index: int) -> Architecture | None:
    """Candidate ``index`` with its cost known; ``None`` where it cannot be made (for this size of image)."""
    try:
        candidate = source(index)
        return candidate if multiply_adds(candidate) > 0 else None
    except (GhnServiceError, RuntimeError) as error:  # torch raises the latter where layers do not fit together
        logger.warning("candidate %d cannot be made and is left out: %s", index, error)
        return None


def largest_macs(progress: float, settings: SamplingSettings) -> float:
    """Multiply-adds of the largest target network at a progress: grows geometrically from small to large networks."""
    if settings.growth == 0 or progress >= settings.growth:
        return settings.largest_macs
    share = progress / settings.growth
    return float(settings.start_macs ** (1.0 - share) * settings.largest_macs**share)


class NetworkStream:
    """Candidates in order, thinned by cost with a seed of its own."""

    def __init__(
        self, source: ArchitectureSource, settings: SamplingSettings, *, seed: int = 0, next_index: int = 0
    ) -> None:
        self.source, self.settings, self.seed, self.next_index = source, settings, seed, next_index

    def take(self, count: int, progress: float) -> list[tuple[int, Architecture]]:
        """The next ``count`` networks that pass at this progress of the run (0 to 1), with their numbers.

        Raises:
            TrainingError: The limits let nothing pass.
        """
        largest = largest_macs(progress, self.settings)
        taken: list[tuple[int, Architecture]] = []
        rejected = 0
        while len(taken) < count:
            index, self.next_index = self.next_index, self.next_index + 1
            candidate = find_candidate(self.source, index)
            if candidate is not None and self._is_kept(index, candidate, largest):
                taken.append((index, candidate))
                rejected = 0
            elif (rejected := rejected + 1) == _TOO_MANY_REJECTED:
                raise TrainingError(
                    f"none of {rejected} architectures is within {largest:.3g} multiply-adds; "
                    "raise sampling.largest_macs"
                )
        return taken

    def _is_kept(self, index: int, candidate: Architecture, largest: float) -> bool:
        cost = multiply_adds(candidate)
        if cost > largest:
            return False
        share = min(1.0, self.settings.budget_macs / cost) * self.settings.keep.get(candidate.family, 1.0)
        return share >= 1.0 or random.Random(f"{self.seed}/{index}").random() < share
