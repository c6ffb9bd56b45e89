"""Accuracy of networks with predicted weights and no training, under two protocols.

``batch``: BatchNorm normalises each batch of 64 test images with its own statistics, as in the published evaluations
(Knyazev et al. 2021, section 5). ``recalibrated``: running statistics are measured on training images first, and each
test image is then classified on its own. Networks without BatchNorm score the same under both.

Novelty: generators of weights have been found to repeat what they were trained on ("Generalization or Memorization?",
arXiv:2506.07998). For each predicted tensor of a test network the nearest one of equal shape and kind among the
predictions for training networks is found; then the network is scored with those copies in place of its own.

Likeness: a hypernetwork that predicts one layer per type, not one per place, gives the blocks of a stage nearly the
same weights; those of trained networks are nearly orthogonal (mean cosine about 0.02).
"""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ghn_architectures.architecture import Architecture
from ghn_client.batchnorm import recalibrate_batchnorm, use_batch_statistics
from ghn_client.finetune.images import ImageSet, Normalization
from ghn_service.graph.architecture import ArchitectureGraph, longest_paths
from ghn_service.hypernetwork.features import Role, build_features, collate
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.hypernetwork.places import BLOCK, RESOLUTION, find_places
from ghn_service.training.networks import ArchitectureSource, find_candidate, to_channels_last

logger = logging.getLogger(__name__)

PUBLISHED_BATCH = 64
NOTHING_LEARNT = 0.02  # above the share of the largest class
MIN_VALUES = 64  # smaller tensors (biases of classifiers, ...) say little about novelty
Kind = tuple[Role, tuple[int, ...]]


@torch.no_grad()
def predict_module(hypernetwork: GraphHyperNetwork, architecture: Architecture, *, seed: int) -> nn.Module:
    """The architecture's network with predicted weights; what is not predicted has its own seeded initial values."""
    module = initial_module(architecture, seed=seed)
    load_tensors(module, {name: tensor for _, name, tensor in _predict(hypernetwork, architecture, seed)})
    return module


def initial_module(architecture: Architecture, *, seed: int) -> nn.Module:
    """The architecture's network as it builds itself, with seeded initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return architecture.build()


def he_module(architecture: Architecture, *, seed: int) -> nn.Module:
    """The architecture's network with He initialisation: the baseline of every comparison."""
    return he_initialize(initial_module(architecture, seed=seed), seed=seed)


@torch.no_grad()
def he_initialize(module: nn.Module, *, seed: int) -> nn.Module:
    """Gives ``module`` He initialisation, in place; returns it.

    Weights with two axes or more get ``N(0, 2 / fan_in)`` (He et al. 2015, arXiv:1502.01852), biases 0; normalisation
    layers, position embeddings and other parameters keep the network's own initial values. The classifier gets
    ``N(0, 1 / fan_in)``, as no ReLU follows it.
    """
    generator = torch.Generator().manual_seed(seed)
    weighted = [
        layer
        for layer in module.modules()
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention))
    ]
    for layer in weighted:
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                gain = 1.0 if layer is weighted[-1] else 2.0
                std = (gain / parameter[0].numel()) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            elif "bias" in name:
                parameter.zero_()
    return module


@torch.no_grad()
def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into the parameters of the same names."""
    parameters = dict(module.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


@torch.no_grad()
def accuracy(module: nn.Module, images: ImageSet, normalization: Normalization, *, batch_size: int) -> float:
    """Share of images that ``module`` classifies right, in the mode it is in."""
    labels = torch.split(images.labels, batch_size)
    batches = zip(_batches(images, normalization, batch_size), labels, strict=True)
    return sum(int((module(pixels).argmax(1) == wanted).sum()) for pixels, wanted in batches) / len(images)


def _batches(images: ImageSet, normalization: Normalization, size: int) -> Iterator[Tensor]:
    for pixels in torch.split(images.images, size):
        yield normalization.apply(pixels).contiguous(memory_format=torch.channels_last)


def batch_accuracy(module: nn.Module, images: ImageSet, normalization: Normalization) -> float:
    """Accuracy under the protocol ``batch``; ``module`` itself is not changed.

    A last batch of another size is left out, as its statistics would be of another quality.
    """
    copied = use_batch_statistics(copy.deepcopy(module)).eval()
    whole = len(images) - len(images) % PUBLISHED_BATCH or len(images)
    return accuracy(copied, images.first(whole), normalization, batch_size=PUBLISHED_BATCH)


def recalibrated_accuracy(
    module: nn.Module, training: ImageSet, images: ImageSet, normalization: Normalization
) -> float:
    """Accuracy under the protocol ``recalibrated``, measured on ``training``; ``module`` itself is not changed."""
    copied = copy.deepcopy(module).eval()
    recalibrate_batchnorm(copied, _batches(training, normalization, PUBLISHED_BATCH))
    return accuracy(copied, images, normalization, batch_size=250)


def make_validation(
    source: ArchitectureSource, indices: Sequence[int], images: ImageSet, normalization: Normalization
) -> Callable[[GraphHyperNetwork], dict[str, float]]:
    """A function that scores a hypernetwork under the protocol ``batch``, on images that training does not see.

    Networks of small families may be graphs that training sees too: unlike in an evaluation, none is passed over.
    It gives the networks' mean, best and worst accuracy, and the share of the largest class; it warns where the mean is
    near that share, as weights that tell no class from another are a bad start for any network.
    """
    largest = float(images.labels.bincount().max()) / max(len(images), 1)

    def validate(hypernetwork: GraphHyperNetwork) -> dict[str, float]:
        scores = []
        for index in indices:
            if architecture := find_candidate(source, index):
                module = predict_module(hypernetwork, architecture, seed=index)
                scores.append(batch_accuracy(to_channels_last(module), images, normalization))
        if not scores:
            return {}
        if fmean(scores) < largest + NOTHING_LEARNT:
            logger.warning(
                "predicted networks reach %.1f%%, and naming the largest class alone %.1f%%: train longer, or begin"
                " with --start-from",
                *(100 * fmean(scores), 100 * largest),
            )
        return {"accuracy": fmean(scores), "best": max(scores), "worst": min(scores), "largest_class": largest}

    return validate


class Novelty(NamedTuple):
    """Distance of one test network's weights to training networks'."""

    distance: float  # median over tensors of |own - nearest| / |own|
    covered: float  # share of the network's predicted values that have a neighbour of equal shape and kind
    copies: Mapping[str, Tensor]  # the nearest tensors by name, where there are any


class KnownPredictions:
    """Predicted tensors of training networks, by kind and shape."""

    def __init__(self, hypernetwork: GraphHyperNetwork, architectures: Iterable[Architecture]) -> None:
        self.hypernetwork = hypernetwork
        collected: dict[Kind, list[Tensor]] = defaultdict(list)
        for architecture in architectures:
            for kind, _, tensor in _predict(hypernetwork, architecture):
                collected[kind].append(tensor.flatten())
        self.tensors = {kind: torch.stack(items) for kind, items in collected.items()}

    def novelty(self, architecture: Architecture) -> Novelty:
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
        median = float(torch.tensor(distances).median()) if distances else math.nan
        return Novelty(median, covered / max(total, 1), copies)


@torch.no_grad()
def _predict(
    hypernetwork: GraphHyperNetwork, architecture: Architecture, seed: int = 0
) -> list[tuple[Kind, str, Tensor]]:
    """Predicted tensors with their kinds and names."""
    features = build_features(architecture.graph(), hypernetwork.config)
    predicted = hypernetwork(collate([features]).to(hypernetwork.device), seed=seed)[0]
    return [((target.role, target.shape), target.name, predicted[target.name]) for target in features.targets]


def layers_and_width(graph: ArchitectureGraph) -> tuple[int, int]:
    """Number of weighted layers (norms and biases do not count), and output channels of the first."""
    shapes = [node.weight.torch_shape for node in graph.nodes if node.layer is not None and node.weight is not None]
    return len(shapes), shapes[0][0] if shapes else 0


def likeness(graph: ArchitectureGraph, tensors: Mapping[str, Tensor]) -> float:
    """Mean cosine between weights of one role in different blocks; NaN where no role occurs twice.

    Layers share a role if type, shape and resolution are equal, and as many such layers follow in their block:
    the first layer of a stage has a shape of its own.
    """
    generation = longest_paths(graph)
    places = find_places(graph, generation).tolist()
    seen: dict[tuple[object, ...], int] = defaultdict(int)
    roles: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
    for index in sorted(range(graph.num_nodes), key=lambda index: (-generation[index], index)):
        node = graph.nodes[index]
        if node.layer is None or node.weight is None or node.is_head or node.weight.name not in tensors:
            continue
        kind = (node.op_type, node.weight.torch_shape, places[index][RESOLUTION])
        rank = seen[(*kind, places[index][BLOCK])]
        seen[(*kind, places[index][BLOCK])] += 1
        weight = tensors[node.weight.name].detach().float().flatten()
        roles[(*kind, rank)].append(weight / weight.norm().clamp_min(1e-12))
    groups = [torch.stack(members) for members in roles.values() if len(members) > 1]
    cosines = [
        # The squared norm of a sum of n unit vectors is n plus twice the sum of all cosines.
        (float(units.sum(0).square().sum()) - len(units)) / (len(units) * (len(units) - 1))
        for units in groups
    ]
    return fmean(cosines) if cosines else math.nan
