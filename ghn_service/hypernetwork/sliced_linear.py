"""Products with slices of one large parameter, without a gradient or a copy of the whole for each slice.

Decoders use corners of one large weight matrix for tensors of different sizes. Slicing it once per size would make
autograd fill and add a gradient of the whole matrix for every slice; with ``take_slices`` all slices add into one.
A product needs its slice in one piece of memory; without gradients ``sliced_linear`` copies only a few rows at a time.
Large products read each weight about once, so that a copy would cost more than they: they take one entry of the first
axis at a time, which is in one piece already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Index = tuple[slice, ...]
MAX_COPIED_ELEMENTS = 4 * 2**20
MIN_DIRECT_ELEMENTS = 2**16
"""Weights of one entry of the first axis from which a product of its own is quicker than a copy."""


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
    if weight[0].numel() >= MIN_DIRECT_ELEMENTS and weight[0].is_contiguous():
        return torch.unflatten(_product_by_rows(features, weight.flatten(1, -2), bias.flatten(1)), -1, bias.shape[1:])
    out = features.new_empty(*features.shape[:-1], *bias.shape)
    axis = features.dim() - 1
    rows = max(1, MAX_COPIED_ELEMENTS // weight[0].numel())
    for start in range(0, len(weight), rows):
        some = slice(start, start + rows)
        product = functional.linear(features, weight[some].flatten(0, -2), bias[some].flatten())
        product = torch.unflatten(product, -1, bias[some].shape)
        out.narrow(axis, start, len(bias[some])).copy_(product)
    return out


def _product_by_rows(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Values (..., o, i), o slowest in memory, for weights (o, i, inputs) with each (i, inputs) in one piece."""
    rows = features.flatten(0, -2)  # (M, inputs)
    columns = weight.transpose(1, 2)  # (o, inputs, i)
    if weight.dtype == torch.float32:
        product = torch.baddbmm(bias[:, None], rows.expand(len(weight), *rows.shape), columns)  # (o, M, i)
    else:  # the processor's batched product of other types is many times slower than single ones
        product = rows.new_empty(len(weight), len(rows), bias.shape[1])
        for index in range(len(weight)):
            torch.addmm(bias[index], rows, columns[index], out=product[index])
    return torch.unflatten(product.transpose(0, 1), 0, features.shape[:-1])


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
