"""The linear algebra of ``express``: gains g with ``A diag(g) B = W``, their conditioning, and the layer's bounds.

All of it in float64. Groups of a convolution are solved one by one.

    W (o, p) target      B (n, p) inner      A (o, n) outer      g (n,) gains      p = fan-in, o = fan-out
    M (n, o p) = column-wise Khatri-Rao product of A and B, transposed:  M[k, (i, j)] = A[i, k] B[k, j]

Of the gains that solve the system those are taken that minimise ``sum_k (||A_k|| ||B_k|| g_k)^2``: the terms that meet
and cancel behind A are proportional to ``||A_k|| ||B_k|| |g_k|``, hence so is the rounding error. Derived by us.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Condition numbers of systems up to this size come from singular values; above it from power iteration.
EXACT_CONDITION_SIZE = 1300
#: Below this ratio of extreme singular values a system counts as rank deficient.
RANK_TOLERANCE = 1e-11


@dataclass(frozen=True, eq=False)
class GainSolution:
    """Gains of one group of one layer.

    Attributes:
        gains: (n,) float64.
        condition: Largest over smallest singular value of M; infinity where it has no full rank.
        residual: Largest entry of ``A diag(g) B - W`` over the largest of W.
        full_rank: Whether every W can be expressed.
    """

    gains: torch.Tensor
    condition: float
    residual: float
    full_rank: bool


def khatri_rao(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """M (n, o p) of A (o, n) and B (n, p)."""
    return (outer.T[:, :, None] * inner[:, None, :]).flatten(1)


def unit_rows(outer: torch.Tensor, inner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """M with rows of unit length, (n, o p), and the lengths, (n,); a channel that reaches nothing keeps length 1."""
    lengths = outer.norm(dim=0) * inner.norm(dim=1)
    lengths = torch.where(lengths > 0.0, lengths, torch.ones_like(lengths))
    return khatri_rao(outer, inner) / lengths[:, None], lengths


def solve_gains(outer: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor) -> GainSolution:
    """The gains with ``A diag(g) B = W`` that round best, or the least-squares ones where there are none.

    Args:
        outer: A (o, n).
        inner: B (n, p); whitened by the caller for least squares in function space.
        weight: W (o, p), whitened likewise.
    """
    system, lengths = unit_rows(outer, inner)
    wanted = weight.flatten()[:, None]
    channels, equations = system.shape
    orthogonal, triangle = torch.linalg.qr(system) if channels >= equations else (system, system.new_zeros(1, 1))
    condition = triangular_condition(triangle)
    if not condition < 1.0 / RANK_TOLERANCE:
        gains = torch.linalg.lstsq(system.T, wanted, driver="gelsd").solution[:, 0] / lengths
        return GainSolution(gains, float("inf"), relative_residual(outer, gains, inner, weight), False)

    def smallest(right: torch.Tensor) -> torch.Tensor:
        half: torch.Tensor = torch.linalg.solve_triangular(triangle.T, right, upper=False)
        return (orthogonal @ half).squeeze(1) / lengths

    gains = smallest(wanted)
    missing = weight - (outer * gains) @ inner
    gains = gains + smallest(missing.flatten()[:, None])  # one step of iterative refinement
    return GainSolution(gains, condition, relative_residual(outer, gains, inner, weight), True)


def relative_residual(outer: torch.Tensor, gains: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor) -> float:
    """Largest entry of ``A diag(g) B - W`` over the largest of W."""
    return float(((outer * gains) @ inner - weight).abs().max() / weight.abs().max().clamp_min(1e-300))


def triangular_condition(triangle: torch.Tensor, *, iterations: int = 30) -> float:
    """Largest over smallest singular value of an upper triangular matrix; infinity where it is singular."""
    smallest_diagonal = triangle.diagonal().abs().min()
    if float(smallest_diagonal) == 0.0:
        return float("inf")
    if len(triangle) <= EXACT_CONDITION_SIZE:
        values = torch.linalg.svdvals(triangle)
        return float(values[0] / values[-1]) if float(values[-1]) > 0.0 else float("inf")
    start = torch.ones(len(triangle), 1, dtype=triangle.dtype, device=triangle.device)
    vector, inverse = start / start.norm(), start / start.norm()
    largest, smallest = 0.0, 0.0
    for _ in range(iterations):
        vector = triangle.T @ (triangle @ vector)
        largest = float(vector.norm())
        vector = vector / vector.norm()
        inverse = torch.linalg.solve_triangular(triangle.T, inverse, upper=False)
        inverse = torch.linalg.solve_triangular(triangle, inverse, upper=True)
        smallest = float(inverse.norm())
        inverse = inverse / inverse.norm()
    return float((largest * smallest) ** 0.5)


def condition_of(outer: torch.Tensor, inner: torch.Tensor) -> float:
    """Condition number of M with unit rows; infinity where there are fewer channels than weights or no full rank."""
    system, _ = unit_rows(outer, inner)
    if len(system) < system.shape[1]:
        return float("inf")
    return triangular_condition(torch.linalg.qr(system, mode="r").R)
