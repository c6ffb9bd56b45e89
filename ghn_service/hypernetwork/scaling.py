"""The scale of decoded values: fan-in scaling for weights, bounded values for norms and biases.

Weights are multiplied by ``sqrt(beta / fan_in)``, which keeps the variance of activations for inputs of unit variance
(He et al. 2015); beta is 1 where no ReLU follows, 2 elsewhere.

Reference: Knyazev et al. 2021 (arXiv:2110.13100), section 4.3 and appendix A.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The reference tells position grids from kernels by these two sizes; its trained checkpoints rely on it.
POSITION_GRID_MIN_SIDE = 11


def weight_scale(shape: tuple[int, ...]) -> float:
    """The factor for a weight of two or more axes.

    Args:
        shape: The whole tensor's shape in torch's layout, after tiling.
    """
    if len(shape) >= 3 and shape[0] == 1 and shape[2] >= POSITION_GRID_MIN_SIDE:
        return 1.0
    height, width = (*shape[2:], 1, 1)[:2]
    is_depthwise_or_row = len(shape) >= 3 and (shape[1] == 1 or (len(shape) >= 4 and height < width))
    beta = 1.0 if is_depthwise_or_row else 2.0
    return math.sqrt(beta / math.prod(shape[1:]))


def scale_norm_weight(values: Tensor) -> Tensor:
    """Weights of normalisations, between 0 and 2 around 1."""
    return 2 * torch.sigmoid(values / 2)


def scale_bias(values: Tensor) -> Tensor:
    """Biases, between -1 and 1."""
    return torch.tanh(values / 5)
