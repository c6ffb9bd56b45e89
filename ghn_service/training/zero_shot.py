"""Accuracy of networks with predicted weights and no training, under two protocols.

``batch``: BatchNorm normalises each batch of 64 test images with its own statistics, as in the published evaluations
(Knyazev et al. 2021, section 5). ``recalibrated``: running statistics are measured on training images first, and each
test image is then classified on its own. Networks without BatchNorm score the same under both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ghn_service.hypernetwork.features import build_features, collate
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.training.data import ImageSet, Normalization
from ghn_service.training.sampling import (
    ArchitectureSource,
    TargetArchitecture,
    find_candidate,
    to_channels_last,
    use_batch_statistics,
)

PUBLISHED_BATCH = 64


@torch.no_grad()
def predict_module(hypernetwork: GraphHyperNetwork, architecture: TargetArchitecture, *, seed: int) -> nn.Module:
    """The architecture's network with predicted weights; what is not predicted has its own seeded initial values."""
    module = initial_module(architecture, seed=seed)
    features = build_features(architecture.graph(), hypernetwork.config)
    predicted = hypernetwork(collate([features]).to(hypernetwork.device), seed=seed)[0]
    load_tensors(module, predicted)
    return module


def initial_module(architecture: TargetArchitecture, *, seed: int) -> nn.Module:
    """The architecture's network as it builds itself, with seeded initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return architecture.build()


@torch.no_grad()
def he_module(architecture: TargetArchitecture, *, seed: int) -> nn.Module:
    """The architecture's network with He initialisation: the baseline of every comparison.

    Weights with two axes or more get ``N(0, 2 / fan_in)`` (He et al. 2015, arXiv:1502.01852), biases 0; normalisation
    layers, position embeddings and other parameters keep the network's own initial values. The classifier gets
    ``N(0, 1 / fan_in)``, as no ReLU follows it.
    """
    module = initial_module(architecture, seed=seed)
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
    right = 0
    for start in range(0, len(images), batch_size):
        pixels = normalization.apply(images.images[start : start + batch_size])
        logits = module(pixels.contiguous(memory_format=torch.channels_last))
        right += int((logits.argmax(1) == images.labels[start : start + batch_size]).sum())
    return right / len(images)


def batch_accuracy(module: nn.Module, images: ImageSet, normalization: Normalization) -> float:
    """Accuracy under the protocol ``batch``; ``module`` itself is not changed.

    A last batch of another size is left out, as its statistics would be of another quality.
    """
    copied = use_batch_statistics(copy.deepcopy(module)).eval()
    whole = len(images) - len(images) % PUBLISHED_BATCH or len(images)
    return accuracy(copied, images.subset(torch.arange(whole)), normalization, batch_size=PUBLISHED_BATCH)


@torch.no_grad()
def recalibrate(module: nn.Module, images: ImageSet, normalization: Normalization, *, batch_size: int = 64) -> None:
    """Measures running statistics of every BatchNorm layer afresh, as the mean over batches of ``images``."""
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not norms:
        return
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative mean
    was_training = module.training
    module.train()
    accuracy(module, images, normalization, batch_size=batch_size)
    module.train(was_training)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum


def recalibrated_accuracy(
    module: nn.Module, training: ImageSet, images: ImageSet, normalization: Normalization
) -> float:
    """Accuracy under the protocol ``recalibrated``; ``module`` itself is not changed.

    Args:
        module: The network.
        training: Training images for the statistics.
        images: Images to classify.
        normalization: Channel statistics.
    """
    copied = copy.deepcopy(module)
    recalibrate(copied, training, normalization)
    return accuracy(copied.eval(), images, normalization, batch_size=250)


def make_validation(
    source: ArchitectureSource, indices: Sequence[int], images: ImageSet, normalization: Normalization
) -> Callable[[GraphHyperNetwork], dict[str, float]]:
    """A function that scores a hypernetwork on fixed networks and images, under the protocol ``batch``.

    Args:
        source: Networks that training never sees.
        indices: Which of them.
        images: Images that training never sees.
        normalization: Channel statistics.
    """

    def validate(hypernetwork: GraphHyperNetwork) -> dict[str, float]:
        scores = []
        for index in indices:
            architecture = find_candidate(source, index)
            if architecture is None:
                continue
            module = predict_module(hypernetwork, architecture, seed=index)
            scores.append(batch_accuracy(to_channels_last(module), images, normalization))
        if not scores:
            return {}
        return {
            "accuracy": sum(scores) / len(scores),
            "best": max(scores),
            "worst": min(scores),
        }

    return validate
