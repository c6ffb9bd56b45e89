"""Bounds on the difference between an expressed network and its target, valid for every input on the domain.

Derived by us. For one layer, with E = A diag(g) B - W and e the error of the effective bias after rounding the norm
parameters, and u the unit roundoff of the arithmetic:

    |block(x) - layer(x)| <= ||E_i|| R + |E_i c + e_i| + (p + n + 4) u (|A| (|g| |B| (|c| + R) + |shift1|) + |shift2|)_i

In a chain an error of size d at the input of a layer grows at most by the largest absolute row sum of its weight;
ReLU and pooling do not enlarge it. The rounding term is a worst case and far above what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ghn_client.finetune.express.domain import Domain
from ghn_client.finetune.express.linear_system import ExpressedLayer
from ghn_client.finetune.express.pairing import norm_map
from ghn_client.finetune.matrix_layers import BATCH_NORM, norm_kind

#: Layers that do not enlarge an error measured in the largest absolute entry.
NON_EXPANSIVE = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Flatten, nn.Identity, nn.Dropout,
    nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip


def layer_bound(layer: ExpressedLayer, domain: Domain, dtype: torch.dtype) -> float:
    """Bound on any output of the layer, with norm parameters and arithmetic in ``dtype``."""
    gains, shift1, shift2 = (value.to(dtype).double() for value in (layer.gains, layer.shift1, layer.shift2))
    error = (layer.outer * gains[:, None, :]) @ layer.inner - layer.weight
    effective = (layer.outer @ shift1[:, :, None])[:, :, 0] + shift2 - layer.bias
    center, radius = domain.center, domain.radius[:, None]
    systematic = error.norm(dim=2) * radius + ((error @ center[:, :, None])[:, :, 0] + effective).abs()
    reach = (gains.abs()[:, :, None] * layer.inner.abs() @ center.abs()[:, :, None])[:, :, 0]
    reach = reach + radius * (gains[:, :, None] * layer.inner).norm(dim=2) + shift1.abs()
    sizes = (layer.outer.abs() @ reach[:, :, None])[:, :, 0] + shift2.abs()
    terms = layer.inner.shape[2] + layer.inner.shape[1] + 4
    rounding = terms * torch.finfo(dtype).eps / 2 * sizes
    return float((systematic + rounding).max())


def network_bound(target: nn.Module, layers: Sequence[ExpressedLayer], bounds: Sequence[float]) -> float | None:
    """Bound on any output of a chain, or ``None`` where the target is no chain of known layers.

    Args:
        target: The target, in float64.
        layers: Its solved layers, in order.
        bounds: One per layer.
    """
    if not isinstance(target, nn.Sequential):
        return None
    solved = {id(layer.pair.layer): (layer, bound) for layer, bound in zip(layers, bounds, strict=True)}
    error, folded = 0.0, {id(layer.pair.folded) for layer in layers}
    for leaf in target.modules():
        if list(leaf.children()):
            if not isinstance(leaf, nn.Sequential):
                return None
        elif id(leaf) in solved:
            layer, own = solved[id(leaf)]
            error = error * float(layer.weight.abs().sum(2).max()) + own
        elif norm_kind(leaf) == BATCH_NORM:
            error = error if id(leaf) in folded else error * float(norm_map(leaf)[0].abs().max())
        elif not isinstance(leaf, NON_EXPANSIVE):
            return None
    return error
