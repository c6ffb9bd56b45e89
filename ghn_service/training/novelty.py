"""How far predicted weights of test networks are from those of training networks, and whether copying would do.

Generators of weights have been found to repeat what they were trained on ("Generalization or Memorization?",
arXiv:2506.07998). For each predicted tensor of a test network the nearest tensor of equal shape and kind among the
predictions for training networks is found; then the test network is scored with those copies in place of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ghn_service.hypernetwork.features import Role, build_features, collate
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.training.sampling import TargetArchitecture

MIN_VALUES = 64  # smaller tensors (biases of classifiers, ...) say little
Kind = tuple[Role, tuple[int, ...]]


@dataclass(frozen=True)
class Novelty:
    """Distance of one test network's weights to training networks'.

    Attributes:
        distance: Median over tensors of ``|own - nearest| / |own|``.
        covered: Share of the network's predicted values that have a neighbour of equal shape and kind.
        copies: The nearest tensors by name, where there are any.
    """

    distance: float
    covered: float
    copies: Mapping[str, Tensor]


class KnownPredictions:
    """Predicted tensors of training networks, by kind and shape.

    Args:
        hypernetwork: What predicts.
        architectures: Training networks.
    """

    def __init__(self, hypernetwork: GraphHyperNetwork, architectures: Iterable[TargetArchitecture]) -> None:
        self.hypernetwork = hypernetwork
        collected: dict[Kind, list[Tensor]] = defaultdict(list)
        for architecture in architectures:
            for kind, _, tensor in _predict(hypernetwork, architecture):
                collected[kind].append(tensor.flatten())
        self.tensors = {kind: torch.stack(items) for kind, items in collected.items()}

    def novelty(self, architecture: TargetArchitecture) -> Novelty:
        """How far the architecture's predicted tensors are from those of the known networks."""
        distances: list[float] = []
        copies: dict[str, Tensor] = {}
        covered = total = 0
        for kind, name, tensor in _predict(self.hypernetwork, architecture):
            total += tensor.numel()
            known = self.tensors.get(kind)
            if known is None:
                continue
            gaps = torch.linalg.vector_norm(known - tensor.flatten(), dim=1)
            nearest = int(gaps.argmin())
            covered += tensor.numel()
            copies[name] = known[nearest].view_as(tensor)
            if tensor.numel() >= MIN_VALUES:
                distances.append(float(gaps[nearest] / tensor.norm().clamp_min(1e-12)))
        median = float(torch.tensor(distances).median()) if distances else float("nan")
        return Novelty(median, covered / max(total, 1), copies)


@torch.no_grad()
def _predict(hypernetwork: GraphHyperNetwork, architecture: TargetArchitecture) -> Iterable[tuple[Kind, str, Tensor]]:
    features = build_features(architecture.graph(), hypernetwork.config)
    predicted = hypernetwork(collate([features]).to(hypernetwork.device))[0]
    return [((target.role, target.shape), target.name, predicted[target.name]) for target in features.targets]
