"""Which directions of its input a low-rank layer should keep, given the activation that follows.

Once the subspace is chosen, everything else is known in closed form: row w is best replaced by its projection, at the
length that is best for the activation. What is left is a smooth function of the subspace alone,

    L(A) = sum_i min_b loss(|w_i|, b, rho_i),   rho_i^2 |w_i|^2 = s_i = p_i (A^T A)^-1 p_i^T,   P = W A,

whose gradient needs no sampling and costs two products of matrices (envelope theorem: the best b does not contribute):

    dL/dA = 2 (W^T - A B^T) D B,   B = P (A^T A)^-1,   D = diag(dL/ds).

Reference: Vodrahalli et al. 2022 (arXiv:2202.00834) for the problem; Golub and Pereyra 1973 for projecting the other
variables out; Nocedal 1980 for the quasi-Newton recursion.

Shapes: rows W (m, k), basis A (k, r) with any scale and angles; only its span matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ghn_service.postprocess.low_rank.kernels import ActivationKernel

SMALLEST_COSINE = 1e-6
BACKTRACKING = 0.3
MAX_BACKTRACKS = 4

Secant = tuple[torch.Tensor, torch.Tensor, float]
"""How far L-BFGS moved, how much the gradient turned, and the product of both."""


@dataclass(frozen=True, slots=True)
class SubspaceLoss:
    """The loss of a subspace relative to the second moment of the layer's output, and its gradient by the basis (k, r).

    ``step`` is a natural first step along the gradient: the inverse of the curvature that swapping an average direction
    of the subspace for an average one outside would have.
    """

    value: float
    gradient: torch.Tensor
    step: float


def subspace_loss(rows: torch.Tensor, basis: torch.Tensor, kernel: ActivationKernel) -> SubspaceLoss:
    """The loss of the subspace that A (k, r), of full column rank, spans, with everything else at its best."""
    tiny = torch.finfo(rows.dtype).tiny
    target = rows.norm(dim=1)
    projected = rows @ basis
    coefficients = torch.linalg.solve(basis.mT @ basis, projected.mT).mT  # B (m, r)
    kept = (coefficients * projected).sum(dim=1).clamp_min(0.0)  # s (m,)
    cosine = (kept.sqrt() / target.clamp_min(tiny)).clamp(SMALLEST_COSINE, 1.0)
    length = kernel.best_length(target, cosine)
    whole = float(kernel.second_moment(target).sum()) or 1.0
    by_cosine = kernel.loss_by_cosine(target, length, cosine)
    by_kept = torch.where(target > 0, by_cosine / (2 * cosine * target.square()).clamp_min(tiny), 0.0) / whole
    weighted = by_kept[:, None] * coefficients
    gradient = 2 * (rows.mT @ weighted - basis @ (coefficients.mT @ weighted))
    value = float(kernel.loss(target, length, cosine).sum()) / whole
    energy = float(kept.sum())
    gap = energy / basis.shape[1] - float(target.square().sum()) / rows.shape[1]
    mean_slope = abs(float((by_kept * kept).sum())) / energy if energy > 0 else 0.0
    curvature = 2 * mean_slope * gap
    return SubspaceLoss(value, gradient, 1 / curvature if curvature > 0 else 0.0)


def improve_subspace(
    rows: torch.Tensor, basis: torch.Tensor, kernel: ActivationKernel, *, steps: int, tolerance: float
) -> torch.Tensor:
    """L-BFGS on the loss of the subspace; the result is never worse than the start.

    Args:
        rows: W (m, k).
        basis: The start (k, r), of full column rank.
        kernel: The activation that follows.
        steps: Most steps.
        tolerance: The share of the loss that a step must save for there to be another.
    """
    here = subspace_loss(rows, basis, kernel)
    first_step = here.step
    secants: list[Secant] = []
    for _ in range(steps):
        descent = _descent(here.gradient, secants, first_step)
        size = 1.0
        for _ in range(MAX_BACKTRACKS):
            candidate = basis - size * descent
            there = subspace_loss(rows, candidate, kernel)
            if there.value < here.value:
                break
            size *= BACKTRACKING
        else:
            return basis
        moved, turned = candidate - basis, there.gradient - here.gradient
        product = float((moved * turned).sum())
        if product > 0:  # the curvature is positive
            secants.append((moved, turned, product))
        gain, basis, here = here.value - there.value, candidate, there
        if gain < tolerance * here.value:
            break
    return basis


def _descent(gradient: torch.Tensor, secants: Sequence[Secant], first_step: float) -> torch.Tensor:
    """The two-loop recursion: the inverse Hessian, as far as it is known, times the gradient."""
    direction, factors = gradient, []
    for moved, turned, product in reversed(secants):
        factors.append(float((moved * direction).sum()) / product)
        direction = direction - factors[-1] * turned
    scale = first_step
    if secants:
        _, turned, product = secants[-1]
        scale = product / float(turned.square().sum())
    direction = direction * scale
    for (moved, turned, product), factor in zip(secants, reversed(factors), strict=True):
        direction = direction + (factor - float((turned * direction).sum()) / product) * moved
    return direction
