"""Products with slices of one large parameter, without a gradient or a copy of the whole for each slice.

Decoders use corners of one large weight matrix for tensors of different sizes. Slicing it once per size would make
autograd fill and add a gradient of the whole matrix for every slice; with ``take_slices`` all slices add into one. A
product needs its slice in one piece of memory; without gradients ``sliced_linear`` copies only a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Index = tuple[slice, ...]
MAX_COPIED_ELEMENTS = 4 * 2**20


def sliced_linear(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer whose outputs have several axes, for a weight that may be a slice of a larger one.

    Args:
        features: (..., inputs).
        weight: (*outputs, inputs).
        bias: (*outputs).

    Returns:
        (..., *outputs).
    """
    if torch.is_grad_enabled() or weight.is_contiguous():
        return torch.unflatten(functional.linear(features, weight.flatten(0, -2), bias.flatten()), -1, bias.shape)
    out = features.new_empty(*features.shape[:-1], *bias.shape)
    axis = features.dim() - 1
    rows = max(1, MAX_COPIED_ELEMENTS // weight[0].numel())
    for start in range(0, len(weight), rows):
        some = slice(start, start + rows)
        product = functional.linear(features, weight[some].flatten(0, -2), bias[some].flatten())
        product = torch.unflatten(product, -1, bias[some].shape)
        out.narrow(axis, start, len(bias[some])).copy_(product)
    return out


def layer_slices(layer: nn.Linear, outputs: tuple[int, ...], indices: Sequence[Index]) -> list[tuple[Tensor, Tensor]]:
    """Weight (*slice, inputs) and bias (*slice) of some outputs of a layer whose outputs have several axes.

    Args:
        layer: The whole layer.
        outputs: Sizes of the axes of its outputs; -1 for one of them.
        indices: Slices along these axes.
    """
    weights = take_slices(torch.unflatten(layer.weight, 0, outputs), indices)
    return list(zip(weights, take_slices(torch.unflatten(layer.bias, 0, outputs), indices), strict=True))


def take_slices(parameter: Tensor, indices: Sequence[Index]) -> list[Tensor]:
    """``[parameter[index] for index in indices]``, with one gradient for all.

    Args:
        parameter: Values, any shape.
        indices: Slices without steps, one per leading axis.

    Returns:
        The slices; they share memory with ``parameter`` where no gradient is wanted.
    """
    if not indices:
        return []
    if not torch.is_grad_enabled() or not parameter.requires_grad:
        return [parameter[index] for index in indices]
    return list(_TakeSlices.apply(parameter, tuple(indices)))  # type: ignore[no-untyped-call]


class _TakeSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, indices: tuple[Index, ...]) -> tuple[Tensor, ...]:
        ctx.indices, ctx.shape = indices, parameter.shape
        ctx.set_materialize_grads(False)
        return tuple(parameter[index].clone(memory_format=torch.contiguous_format) for index in indices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        total: Tensor | None = None
        for index, gradient in zip(ctx.indices, gradients, strict=True):
            if gradient is None:
                continue
            if total is None:
                total = gradient.new_zeros(ctx.shape)
            total[index].add_(gradient)
        return total, None
