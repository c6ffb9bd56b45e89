"""Initial values of an untrained hypernetwork.

Embeddings are normal with standard deviation ``C ** -0.5``, distances sinusoidal, and last layers of decoders a fifth
of torch's defaults without bias, so that first predictions are close to their mean.

Reference: Knyazev et al. 2023 (arXiv:2303.04143), appendix B.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ghn_service.hypernetwork.graphormer import DistanceBias

LAST_LAYER_SHRINKAGE = 5.0


@torch.no_grad()
def initialize_parameters(module: nn.Module, generator: torch.Generator | None) -> None:
    """Draws every linear, recurrent and embedding layer of ``module`` anew.

    Args:
        module: What to initialise.
        generator: Source of randomness; None for torch's global one.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.GRUCell):
            fan = child.hidden_size if isinstance(child, nn.GRUCell) else child.in_features
            for parameter in child.parameters(recurse=False):
                parameter.uniform_(-1 / math.sqrt(fan), 1 / math.sqrt(fan), generator=generator)
        elif isinstance(child, nn.Embedding):
            std = child.embedding_dim**-0.5
            nn.init.trunc_normal_(child.weight, std=std, a=-2.0, b=2.0, generator=generator)
    for child in module.modules():
        if isinstance(child, DistanceBias):
            child.distance_embedding.weight.copy_(_sinusoids(*child.distance_embedding.weight.shape))


@torch.no_grad()
def shrink_layer(layer: nn.Linear, shrinkage: float = LAST_LAYER_SHRINKAGE) -> None:
    """Divides a layer's weight and clears its bias."""
    layer.weight.div_(shrinkage)
    layer.bias.zero_()


def _sinusoids(num_rows: int, channels: int) -> Tensor:
    """Sines and cosines of geometrically spaced frequencies, (rows, channels), as in the original transformer."""
    frequencies = torch.exp(torch.arange(0, channels, 2) * (-math.log(10_000.0) / channels))
    angles = torch.arange(num_rows)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)[:, :channels]
