"""Several slices of one parameter as a single differentiable operation.

Decoders use corners of one large weight matrix for tensors of different sizes. Slicing it once per size would make
autograd fill and add a gradient of the whole matrix for every slice; here all slices add into one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Index = tuple[slice, ...]


def take_slices(parameter: Tensor, indices: Sequence[Index]) -> list[Tensor]:
    """``[parameter[index] for index in indices]``, with one gradient for all.

    Args:
        parameter: Values, any shape.
        indices: Slices without steps, one per leading axis.

    Returns:
        The slices, contiguous; they may share memory with ``parameter``.
    """
    if not indices:
        return []
    if not torch.is_grad_enabled() or not parameter.requires_grad:
        return [parameter[index].contiguous() for index in indices]
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
