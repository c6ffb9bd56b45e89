r"""``Muon``: momentum whose update is brought close to an orthogonal matrix.

An update :math:`X` (m, n) is scaled to norm 1 and passed five times through the odd polynomial
:math:`X (aI + bR + cR^2)` with :math:`R = X^T X`. All of these factors are polynomials of the first :math:`R`, so they
are multiplied among themselves, (n, n), and :math:`X` is read twice in all instead of ten times. The small products are
in float32, where torch's own ``Muon`` rounds everything to bfloat16; matrices of one shape are done together.

Shapes: P matrices of one shape, m rows, n columns, m >= n.

Reference: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"
(https://kellerjordan.github.io/posts/muon).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7
LARGE = 2**18


def orthogonalize(matrices: Tensor) -> Tensor:
    """The five steps of the polynomial for P matrices.

    Args:
        matrices: (P, m, n) in float32, m >= n.

    Returns:
        (P, m, n) with singular values between about 0.7 and 1.2, apart from those that were below a hundredth of the
        largest.
    """
    norms = torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(EPSILON)
    factors = _polynomial(matrices.mT @ matrices / norms**2) / norms
    if matrices.device.type == "cpu" and matrices[0].numel() >= LARGE and torch.cpu._is_avx512_bf16_supported():
        matrices, factors = matrices.bfloat16(), factors.bfloat16()
    result: Tensor = matrices @ factors
    return result.float()


def _polynomial(gram: Tensor) -> Tensor:
    """The product of the factors of all steps, (P, n, n), from the first step's ``R``."""
    first, second, third = COEFFICIENTS
    product = gram
    for step in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=second, alpha=third)
        factor.diagonal(dim1=1, dim2=2).add_(first)
        product = factor if step == 0 else product @ factor
        if step < ITERATIONS - 1:
            gram = factor @ (factor @ gram)
    return product


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay; its state fits ``torch.optim.Muon``.

    The rate of a matrix with more rows than columns is multiplied by the square root of their ratio.

    Args:
        params: Matrices.
        lr: Learning rate.
        weight_decay: Decay per step, times the rate.
        momentum: Decay of the averaged gradient.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix with a gradient; ``closure`` is not called."""
        del closure
        for group in self.param_groups:
            parameters = [item for item in group["params"] if item.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [item.grad for item in parameters if item.grad is not None]
        momentum, rate = group["momentum"], float(group["lr"])
        buffers = [self._buffer(item) for item in parameters]
        torch._foreach_lerp_(buffers, gradients, 1.0 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)
        torch._foreach_mul_(parameters, 1.0 - rate * group["weight_decay"])
        for members in _by_shape(parameters):
            tall = torch.stack([_tall(updates[index]) for index in members])
            for index, update in zip(members, orthogonalize(tall).unbind(), strict=True):
                rows, columns = parameters[index].shape
                scaled_rate = rate * math.sqrt(max(1.0, rows / columns))
                parameters[index].add_(update if rows >= columns else update.mT, alpha=-scaled_rate)

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _tall(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def _by_shape(parameters: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the matrices that are equal in shape, or would be if transposed."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, parameter in enumerate(parameters):
        groups[tuple(sorted(parameter.shape))].append(index)
    return list(groups.values())
