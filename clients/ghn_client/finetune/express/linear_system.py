"""The linear algebra of ``express``: gains g with ``A diag(g) B = W``, and the shifts that go with them, per layer.

All of it in float64. Groups of a convolution are solved one by one.

    W (groups, o, p) target   B (groups, n, p) inner   A (groups, o, n) outer   g (groups, n) gains   p = fan-in
    M (n, o p) = column-wise Khatri-Rao product of one A and B, transposed:  M[k, (i, j)] = A[i, k] B[k, j]

Of the gains that solve the system those are taken that minimise ``sum_k (||A_k|| ||B_k|| g_k)^2``: the terms that meet
and cancel behind A are proportional to ``||A_k|| ||B_k|| |g_k|``, hence so is the rounding error. Derived by us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ghn_client.errors import InfeasibleError
from ghn_client.finetune.express.domain import Domain
from ghn_client.finetune.express.pairing import BlockPair, express_width, opposite_channels

EXACT, LEAST_SQUARES = "exact", "least_squares"
#: Condition numbers of systems up to this size come from singular values; above it from power iteration.
EXACT_CONDITION_SIZE = 1300
#: Below this ratio of extreme singular values a system counts as rank deficient.
RANK_TOLERANCE = 1e-11
#: Shifts are rounded to float32; enlarged by this they stay above what the ball needs.
ROUNDING_MARGIN = 2.0**-22
#: Refuse systems whose matrix alone would take more than this.
MEMORY_LIMIT_BYTES = 16 * 2**30


@dataclass(frozen=True, eq=False)
class GainSolution:
    """Gains of one group of one layer."""

    gains: torch.Tensor  # (n,) float64
    condition: float  # largest over smallest singular value of M; infinity where it has no full rank
    residual: float  # largest entry of ``A diag(g) B - W`` over the largest of W
    full_rank: bool  # whether every W can be expressed


@dataclass(frozen=True, eq=False)
class ExpressedLayer:
    """The solution for one layer: ``norm1`` is ``gains * y + shift1``, ``norm2`` is ``y + shift2``; all float64."""

    pair: BlockPair  # the layer and its block
    weight: torch.Tensor  # (groups, o, p) of the target, its BatchNorm folded in
    bias: torch.Tensor  # (groups, o)
    inner: torch.Tensor  # B (groups, n, p)
    outer: torch.Tensor  # A (groups, o, n)
    gains: torch.Tensor  # (groups, n)
    shift1: torch.Tensor  # (groups, n)
    shift2: torch.Tensor  # (groups, o)
    solutions: Sequence[GainSolution]  # one per group


def shortage(pair: BlockPair, *, full_rank: bool = True) -> str:
    """What a block lacks to express its layer exactly, in words; empty if nothing."""
    _, outputs, fan_in, channels = pair.sizes
    needed = outputs * fan_in
    if channels < needed:
        return (
            f"{needed - channels:,} channels short per group: it needs {needed:,} ({express_width(fan_in, outputs):,}"
            f" advised) and has {channels:,}; widen it, or use mode='least_squares' for the best approximation"
        )
    if not full_rank:
        return (
            "no full rank: the frozen weights are too sparse for this width; widen the block, keep more weights, or use"
            " mode='least_squares'"
        )
    return memory_shortage(pair)


def memory_shortage(pair: BlockPair) -> str:
    """Whether the system would take too much memory, in words; empty if not."""
    _, outputs, fan_in, channels = pair.sizes
    needed = 8 * outputs * fan_in * channels
    if needed <= MEMORY_LIMIT_BYTES:
        return ""
    return (
        f"the system of {outputs * fan_in:,} x {channels:,} takes {needed / 2**30:.0f} GiB in float64, the limit is"
        f" {MEMORY_LIMIT_BYTES / 2**30:.0f} GiB; express a narrower layer"
    )


def solve_layer(pair: BlockPair, domain: Domain, *, mode: str) -> ExpressedLayer:
    """Gains and shifts of one block, whose inner ReLU stays linear on ``domain``.

    Raises:
        InfeasibleError: ``exact`` is asked for and impossible.
    """
    weight, bias = pair.target_map()
    inner, outer = pair.matrices()
    solutions, shift2 = [], bias.clone()
    for group, (a, b, w) in enumerate(zip(outer, inner, weight, strict=True)):
        if mode == EXACT:
            solution = solve_gains(a, b, w)
            if not solution.full_rank:
                raise InfeasibleError(f"layer {pair.name!r}: {shortage(pair, full_rank=False)}")
        else:  # the error of the outputs on the measured inputs is ||(A diag(g) B - W) S^(1/2)||
            covariance = domain.covariance[group]
            level = 1e-9 * covariance.diagonal().mean().clamp_min(1e-12)
            root = torch.linalg.cholesky(covariance + level * torch.eye(len(covariance)).to(covariance))
            solution = solve_gains(a, b @ root, w @ root)
            shift2[group] += (w - (a * solution.gains) @ b) @ domain.center[group]
        solutions.append(solution)
    gains = torch.stack([solution.gains for solution in solutions])
    scaled = gains[:, :, None] * inner
    reach = _balanced(outer, (1.0 + ROUNDING_MARGIN) * domain.radius[:, None] * scaled.norm(dim=2))
    shift1 = (reach - (scaled @ domain.center[:, :, None])[:, :, 0]).float().double()
    shift2 = shift2 - (outer @ shift1[:, :, None])[:, :, 0]  # takes back what shift1 is after rounding
    return ExpressedLayer(pair, weight, bias, inner, outer, gains, shift1, shift2, solutions)


def _balanced(outer: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """``reach`` (groups, n), raised to be equal where two columns of A are opposite, so that both cancel."""
    first, second = opposite_channels(reach.shape[1])
    opposite = (outer[:, :, first] == -outer[:, :, second]).all(dim=1)
    larger = torch.maximum(reach[:, first], reach[:, second])
    result = reach.clone()
    for channels in (first, second):
        result[:, channels] = torch.where(opposite, larger, reach[:, channels])
    return result


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

    Of A (o, n), B (n, p) and W (o, p); B and W are whitened by the caller for least squares in function space.
    """
    system, lengths = unit_rows(outer, inner)
    wanted = weight.flatten()[:, None]
    channels, equations = system.shape
    orthogonal, triangle = torch.linalg.qr(system) if channels >= equations else (system, system.new_zeros(1, 1))
    condition = triangular_condition(triangle)
    if not condition < 1.0 / RANK_TOLERANCE:
        gains = torch.linalg.lstsq(system.T, wanted, driver="gelsd").solution[:, 0] / lengths
        return GainSolution(gains, float("inf"), _relative_residual(outer, gains, inner, weight), False)

    def smallest(right: torch.Tensor) -> torch.Tensor:
        half: torch.Tensor = torch.linalg.solve_triangular(triangle.T, right, upper=False)
        return (orthogonal @ half).squeeze(1) / lengths

    gains = smallest(wanted)
    missing = weight - (outer * gains) @ inner
    gains = gains + smallest(missing.flatten()[:, None])  # one step of iterative refinement
    return GainSolution(gains, condition, _relative_residual(outer, gains, inner, weight), True)


def _relative_residual(outer: torch.Tensor, gains: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor) -> float:
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
