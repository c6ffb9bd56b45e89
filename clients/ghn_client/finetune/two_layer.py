"""Side networks with one hidden layer that take given values at N of K samples and zero at the others.

``shared_direction``: all samples on one line, a piecewise-linear interpolant; at most ``min(3 N, K - 1)`` neurons.
``own_direction``: every changed sample along a direction of its own, where one neuron is often enough; its slopes are
far smaller, so it holds in float32 where the shared line needs float64. Both constructions, and the constants, are
derived by us; the order is that of arXiv:2408.00359.

    t (K,) projections   p changed samples   V (N, C) wanted values   M neurons
"""

from __future__ import annotations

import torch

from ghn_client.finetune.capacity import two_layer_neurons
from ghn_client.finetune.projection import Separation, neighbour_gaps, own_directions
from ghn_client.finetune.side_network import ClosedFormSideNetwork

Knots = tuple[torch.Tensor, torch.Tensor]


def shared_direction(
    center: torch.Tensor, separation: Separation, changed: torch.Tensor, values: torch.Tensor, *, reach: float
) -> ClosedFormSideNetwork:
    """The piecewise-linear interpolant along one direction.

    Args:
        center: (D,) what was subtracted from the samples.
        separation: Direction and projections.
        changed: (N,) indices of the changed samples.
        values: (N, C) values there; zero at every other sample.
        reach: How far bumps go towards the nearest kept sample, in (0, 1]; smaller touches fewer unseen inputs.
    """
    samples, bound = len(separation.projections), two_layer_neurons(len(changed), len(separation.projections))
    knots, heights = bump_knots(separation.projections, changed, values, reach)
    if len(knots) > bound:
        knots, heights = bump_knots(separation.projections, changed, values, 1.0)
    open_end = False
    if len(knots) > bound:
        knots, heights = bump_knots(separation.projections, changed, values, 1.0, outer=False)
        open_end = bool(knots[-1] >= separation.projections.max())  # no sample lies beyond: it may go on as it likes
    weights, bias = _slope_changes(knots, heights, open_end=open_end)
    if open_end:
        knots = knots[:-1]
    assert len(knots) <= bound <= samples
    return ClosedFormSideNetwork(
        center=center,
        directions=separation.direction[None],
        select=torch.zeros(len(knots), dtype=torch.long, device=knots.device),
        knots=knots,
        output_weight=weights.T.contiguous(),
        output_bias=bias,
    )


def bump_knots(
    projections: torch.Tensor, changed: torch.Tensor, values: torch.Tensor, reach: float, *, outer: bool = True
) -> Knots:
    """Positions (M,) and heights (M, C) between which the interpolant is linear; it is zero outside them.

    A run of n neighbouring changed samples takes n + 2 knots, so that an isolated one takes 3. Without
    ``outer`` the function does not return to zero beyond an outermost sample that changes.
    """
    is_changed = torch.zeros(len(projections), dtype=torch.bool, device=projections.device)
    is_changed[changed] = True
    height = projections.new_zeros(len(projections), values.shape[1])
    height[changed] = values
    order = projections.argsort()
    t, flags, height = projections[order], is_changed[order], height[order]
    left = torch.roll(flags, -1) & ~flags  # a kept sample whose right neighbour changes
    right = torch.roll(flags, 1) & ~flags
    left[-1], right[0] = False, False
    zero_left = torch.lerp(torch.roll(t, -1)[left], t[left], reach)  # exactly the kept sample when reach is 1
    zero_right = torch.lerp(torch.roll(t, 1)[right], t[right], reach)
    edges = _outer_zeros(t, flags) if outer else t.new_zeros(0)
    positions = torch.cat([t[flags], zero_left, zero_right, edges])
    zeros = height.new_zeros(len(positions) - int(flags.sum()), values.shape[1])
    heights = torch.cat([height[flags], zeros])
    ordered = positions.argsort(stable=True)
    positions, heights = positions[ordered], heights[ordered]
    fresh = torch.ones(len(positions), dtype=torch.bool, device=positions.device)
    fresh[1:] = positions[1:] > positions[:-1]  # a kept sample between two changed ones is one knot when reach is 1
    return positions[fresh], heights[fresh]


def _outer_zeros(t: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    """Where the interpolant returns to zero beyond the outermost samples, if those are changed."""
    step = (t[-1] - t[0]) / max(len(t) - 1, 1) if len(t) > 1 else t.new_tensor(1.0)
    step = torch.clamp_min(step, 1e-6)
    outer = [t[0] - step] if bool(flags[0]) else []
    outer += [t[-1] + step] if bool(flags[-1]) else []
    return torch.stack(outer) if outer else t.new_zeros(0)


def _slope_changes(knots: torch.Tensor, heights: torch.Tensor, *, open_end: bool) -> Knots:
    """Output weights (M, C), the change of slope at every knot, and the output bias (C,).

    The function is level left of the first knot, and right of the last one, unless it has an ``open_end``: then it
    goes on straight and the last knot costs no neuron. That reaches ``K - 1`` when all labels change.
    """
    slopes = heights.diff(dim=0) / knots.diff()[:, None]
    zero = heights.new_zeros(1, heights.shape[1])
    if open_end:
        return torch.cat([zero, slopes]).diff(dim=0), heights[0].clone()
    return torch.cat([zero, slopes, zero]).diff(dim=0), heights[0].clone()


def own_direction(
    center: torch.Tensor, centred: torch.Tensor, changed: torch.Tensor, values: torch.Tensor, *, reach: float
) -> ClosedFormSideNetwork:
    """One hinge or one bump per changed sample, each along the direction in which that sample stands out.

    A sample that is extreme along its direction takes one neuron, ``relu(t - b)``; any other takes a bump of three.

    Args:
        center: (D,) what was subtracted from the samples.
        centred: (K, D) float64.
        changed: (N,) indices of the changed samples.
        values: (N, C) values there.
        reach: As in :func:`shared_direction`.
    """
    directions = own_directions(centred, changed)
    select, knots, weights = [], [], []
    for index, (position, direction) in enumerate(zip(changed.tolist(), directions, strict=True)):
        projections = centred @ direction
        top = projections.topk(min(2, len(projections)))
        if int(top.indices[0]) == position and len(projections) > 1:
            width = reach * (top.values[0] - top.values[1])
            positions, slopes = [top.values[0] - width], [1.0 / width]
        else:
            own = projections[position]
            width = reach * neighbour_gaps(projections, changed.new_tensor([position]))[0]
            width = torch.clamp_max(width, projections.std(correction=0) + 1.0)
            positions, slopes = [own - width, own, own + width], [1.0 / width, -2.0 / width, 1.0 / width]
        select += [index] * len(positions)
        knots += positions
        weights += [slope * values[index] for slope in slopes]
    return ClosedFormSideNetwork(
        center=center,
        directions=directions,
        select=torch.tensor(select, device=centred.device),
        knots=torch.stack(knots),
        output_weight=torch.stack(weights, dim=1),
        output_bias=values.new_zeros(values.shape[1]),
    )
