"""One layer of a target expressed by one block of a frozen network; see ``express.py`` for the construction.

W (groups, o, p) target      B (groups, n, p) inner      A (groups, o, n) outer      all in float64
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ghn_client.errors import InfeasibleError
from ghn_client.finetune.capacity import express_width
from ghn_client.finetune.express_domain import Domain, norm_map
from ghn_client.finetune.express_solve import GainSolution, relative_residual, solve_gains
from ghn_client.finetune.frozen_network import BlockPair, opposite_channels

EXACT, LEAST_SQUARES = "exact", "least_squares"
#: Shifts are rounded to float32; enlarged by this they stay above what the ball needs.
ROUNDING_MARGIN = 2.0**-22


@dataclass(frozen=True, eq=False)
class ExpressedLayer:
    """The solution for one layer: ``norm1`` is ``gains * y + shift1``, ``norm2`` is ``y + shift2``; all float64.

    Attributes:
        pair: The layer and its block.
        weight: (groups, o, p) of the target, its BatchNorm folded in.
        bias: (groups, o).
        inner: B (groups, n, p).
        outer: A (groups, o, n).
        gains: (groups, n).
        shift1: (groups, n).
        shift2: (groups, o).
        solutions: One per group.
    """

    pair: BlockPair
    weight: torch.Tensor
    bias: torch.Tensor
    inner: torch.Tensor
    outer: torch.Tensor
    gains: torch.Tensor
    shift1: torch.Tensor
    shift2: torch.Tensor
    solutions: Sequence[GainSolution]


def solve_layer(pair: BlockPair, domain: Domain, *, mode: str) -> ExpressedLayer:
    """Gains and shifts of one block.

    Args:
        pair: The layer and its block.
        domain: Where the inner ReLU must stay linear; with mean and covariance of the inputs for least squares.
        mode: ``exact`` or ``least_squares``.

    Raises:
        InfeasibleError: ``exact`` is asked for and impossible.
    """
    weight, bias = target_map(pair)
    inner, outer = matrices(pair)
    solutions, shift2 = [], bias.clone()
    for group in range(len(weight)):
        solution = solve_gains(outer[group], inner[group], weight[group]) if mode == EXACT else None
        if solution is not None and not solution.full_rank:
            raise InfeasibleError(_why_infeasible(pair))
        if solution is None:
            solution = _least_squares(outer[group], inner[group], weight[group], domain.covariance[group])
            missing = weight[group] - (outer[group] * solution.gains) @ inner[group]
            shift2[group] += missing @ domain.center[group]
        solutions.append(solution)
    gains = torch.stack([solution.gains for solution in solutions])
    scaled = gains[:, :, None] * inner
    reach = balanced(outer, (1.0 + ROUNDING_MARGIN) * domain.radius[:, None] * scaled.norm(dim=2))
    shift1 = (reach - (scaled @ domain.center[:, :, None])[:, :, 0]).float().double()
    shift2 = shift2 - (outer @ shift1[:, :, None])[:, :, 0]  # takes back what shift1 is after rounding
    return ExpressedLayer(pair, weight, bias, inner, outer, gains, shift1, shift2, solutions)


def balanced(outer: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """``reach`` with equal values in the pairs of channels whose columns of A are opposite, so that they cancel.

    Args:
        outer: A (groups, o, n).
        reach: (groups, n), raised where needed.
    """
    first, second = opposite_channels(reach.shape[1])
    opposite = (outer[:, :, first] == -outer[:, :, second]).all(dim=1)
    larger = torch.maximum(reach[:, first], reach[:, second])
    result = reach.clone()
    result[:, first] = torch.where(opposite, larger, reach[:, first])
    result[:, second] = torch.where(opposite, larger, reach[:, second])
    return result


def _least_squares(
    outer: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor, covariance: torch.Tensor
) -> GainSolution:
    """Gains that minimise the error of the outputs on the measured inputs, ``||(A diag(g) B - W) S^(1/2)||``."""
    level = 1e-9 * covariance.diagonal().mean().clamp_min(1e-12)
    root = torch.linalg.cholesky(
        covariance + level * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    )
    solution = solve_gains(outer, inner @ root, weight @ root)
    return GainSolution(
        solution.gains,
        solution.condition,
        relative_residual(outer, solution.gains, inner @ root, weight @ root),
        solution.full_rank,
    )


def sizes(pair: BlockPair) -> tuple[int, int, int, int]:
    """Groups, outputs per group o, fan-in p, channels per group n."""
    groups = pair.layer.groups if isinstance(pair.layer, nn.Conv2d) else 1
    return (
        groups,
        pair.layer.weight.shape[0] // groups,
        pair.layer.weight[0].numel(),
        pair.inner.weight.shape[0] // groups,
    )


def matrices(pair: BlockPair) -> tuple[torch.Tensor, torch.Tensor]:
    """B (groups, n, p) and A (groups, o, n) in float64."""
    groups, outputs, fan_in, channels = sizes(pair)
    inner = pair.inner.weight.detach().double().reshape(groups, channels, fan_in)
    return inner, pair.outer.weight.detach().double().reshape(groups, outputs, channels)


def target_map(pair: BlockPair) -> tuple[torch.Tensor, torch.Tensor]:
    """W (groups, o, p) and b (groups, o) in float64, with the folded BatchNorm."""
    groups, outputs, fan_in, _ = sizes(pair)
    weight = pair.layer.weight.detach().double().reshape(groups * outputs, fan_in)
    bias = weight.new_zeros(len(weight)) if pair.layer.bias is None else pair.layer.bias.detach().double()
    if pair.folded is not None:
        scale, shift = norm_map(pair.folded)
        weight, bias = scale[:, None] * weight, scale * bias + shift
    return weight.reshape(groups, outputs, fan_in), bias.reshape(groups, outputs)


def _why_infeasible(pair: BlockPair) -> str:
    _, outputs, fan_in, channels = sizes(pair)
    needed = outputs * fan_in
    if channels < needed:
        return (
            f"layer {pair.name!r} needs {needed:,} channels per group ({express_width(fan_in, outputs):,} advised), the"
            f" frozen block has {channels:,}; widen it or use mode='least_squares'"
        )
    return (
        f"layer {pair.name!r}: the system of {needed:,} equations has no full rank with {channels:,} channels; the"
        " frozen weights are too sparse. Widen the block, keep more weights, or use mode='least_squares'"
    )
