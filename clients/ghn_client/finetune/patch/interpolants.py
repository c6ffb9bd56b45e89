"""Side networks that take given values at N of K samples and zero at the others, in closed form.

``own_directions``: every changed sample along a direction of its own, where one neuron is often enough; its slopes are
flat, so it holds in float32. ``shared_line``: all samples on one line, a piecewise-linear interpolant; at most
``min(3 N, K - 1)`` neurons. ``three_layers``: one line, two hidden layers, about ``4 sqrt(2 N)`` neurons per output.
The constructions, and the constants, are derived by us; the orders are those of arXiv:2408.00359.

    center (D,)   centred (K, D) samples less the center   changed (N,) indices   values (N, C) to add there
    t (K,) projections   p changed samples   M neurons   reach in (0, 1]   all in float64
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ghn_client.finetune.patch.capacity import three_layer_layout, two_layer_neurons
from ghn_client.finetune.side_network import ClosedFormSideNetwork

#: Of the bumps of three layers: 3 is needed (|s| >= 2 with an offset of up to 1); the rest is room for rounding.
STEEPNESS = 3.03
#: The four neurons of a signed bump: shifts of s, and their output weights.
BUMP_SHIFTS = (2.0, 1.0, -1.0, -2.0)
BUMP_WEIGHTS = (1.0, -2.0, 2.0, -1.0)

Knots = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Line:
    """One direction along which all samples are told apart."""

    center: torch.Tensor  # (D,) what is subtracted from samples first
    direction: torch.Tensor  # (D,) unit vector
    projections: torch.Tensor  # (K,) of all samples


def neighbour_gaps(projections: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Distance from each sample with an index in ``positions`` (N,) to its nearest other one along (K,), (N,)."""
    order = projections.argsort()
    ordered = projections[order]
    infinite = ordered.new_full((1,), torch.inf)
    steps = torch.cat([infinite, ordered.diff(), infinite])
    nearest = torch.minimum(steps[:-1], steps[1:])
    gaps = torch.empty_like(nearest)
    gaps[order] = nearest
    return gaps[positions]


def best_line(
    center: torch.Tensor, centred: torch.Tensor, changed: torch.Tensor, *, draws: int, generator: torch.Generator
) -> Line:
    """Of ``draws`` random directions, the one whose smallest gap round a changed sample is the largest.

    Only gaps next to a changed sample matter; kept samples may coincide.
    """
    scale = centred.std(0, correction=0).clamp_min(1e-12)
    best, largest = None, centred.new_tensor(-torch.inf)
    for start in range(0, draws, 32):
        raw = torch.randn(centred.shape[1], min(32, draws - start), generator=generator, dtype=torch.float64).to(
            centred.device
        )
        directions = raw / scale[:, None]
        directions = directions / directions.norm(dim=0)
        for direction, projections in zip(directions.T, (centred @ directions).T.contiguous(), strict=True):
            spread = projections.std(correction=0).clamp_min(1e-300)
            gap = (neighbour_gaps(projections, changed) / spread).min()
            if best is None or gap > largest:
                best, largest = Line(center, direction, projections), gap
    assert best is not None
    return best


def own_directions(
    center: torch.Tensor, centred: torch.Tensor, changed: torch.Tensor, values: torch.Tensor, *, reach: float
) -> ClosedFormSideNetwork:
    """One hinge or one bump per changed sample, each along the direction in which that sample stands out.

    A sample that is extreme along its direction takes one neuron, ``relu(t - b)``; any other takes a bump of three,
    which goes to ``reach`` of the way to the nearest other sample; smaller touches fewer unseen inputs.
    """
    directions = _outstanding_directions(centred, changed)
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


def _outstanding_directions(centred: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """For every changed sample the direction in which it stands out most from the cloud, ``Sigma^-1 z``, (N, D).

    In many dimensions a sample is nearly always the extreme one along its own whitened direction, so that a single
    neuron sees it alone (a linear discriminant of one sample against the rest; derived by us). A thousandth of
    the mean variance is added to the covariance.
    """
    covariance = centred.T @ centred / max(len(centred) - 1, 1)
    level = 1e-3 * covariance.diagonal().mean().clamp_min(1e-12)
    identity = torch.eye(centred.shape[1], dtype=centred.dtype, device=centred.device)
    factor = torch.linalg.cholesky(covariance + level * identity)
    directions = torch.cholesky_solve(centred[changed].T, factor).T
    unit: torch.Tensor = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return unit


def shared_line(line: Line, changed: torch.Tensor, values: torch.Tensor, *, reach: float) -> ClosedFormSideNetwork:
    """The piecewise-linear interpolant along one line, knots being neurons; ``reach`` grows where neurons are short."""
    t = line.projections
    bound = two_layer_neurons(len(changed), len(t))
    knots, heights = bump_knots(t, changed, values, reach)
    if len(knots) > bound:
        knots, heights = bump_knots(t, changed, values, 1.0)
    open_end = False
    if len(knots) > bound:
        knots, heights = bump_knots(t, changed, values, 1.0, outer=False)
        open_end = bool(knots[-1] >= t.max())  # no sample lies beyond: it may go on straight, without a last neuron
    slopes, zero = heights.diff(dim=0) / knots.diff()[:, None], heights.new_zeros(1, heights.shape[1])
    weights = torch.cat([zero, slopes] if open_end else [zero, slopes, zero]).diff(dim=0)
    knots = knots[:-1] if open_end else knots
    assert len(knots) <= bound <= len(t)
    return ClosedFormSideNetwork(
        center=line.center,
        directions=line.direction[None],
        select=torch.zeros(len(knots), dtype=torch.long, device=knots.device),
        knots=knots,
        output_weight=weights.T.contiguous(),
        output_bias=heights[0].clone(),
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
    step = torch.clamp_min((t[-1] - t[0]) / max(len(t) - 1, 1), 1e-6) if len(t) > 1 else t.new_tensor(1.0)
    beyond = torch.stack([t[0] - step, t[-1] + step])[torch.stack([flags[0], flags[-1]]) & outer]
    positions = torch.cat([t[flags], zero_left, zero_right, beyond])
    zeros = height.new_zeros(len(positions) - int(flags.sum()), values.shape[1])
    heights = torch.cat([height[flags], zeros])
    ordered = positions.argsort(stable=True)
    positions, heights = positions[ordered], heights[ordered]
    fresh = torch.ones(len(positions), dtype=torch.bool, device=positions.device)
    fresh[1:] = positions[1:] > positions[:-1]  # a kept sample between two changed ones is one knot when reach is 1
    return positions[fresh], heights[fresh]


def three_layers(line: Line, changed: torch.Tensor, values: torch.Tensor, *, reach: float) -> ClosedFormSideNetwork:
    """The network with two hidden layers that has ``values`` (N, C) at the changed samples and zero at all others.

    The changed samples are cut along the line into G groups of J. Unit j of the second layer serves the j-th sample p
    of every group: on group l its input is ``s_j(t) = a (t - p) - delta / V`` with ``a = 3.03 / gap``, so that every
    other sample of that group lies at ``|s| >= 2``. Between groups ``s_j`` is joined linearly inside a gap without
    samples. The signed bump ``phi(s) = relu(s + 2) - 2 relu(s + 1) + 2 relu(s - 1) - relu(s - 2)`` is ``-s`` on
    [-1, 1] and 0 for ``|s| >= 2``. Every output gets a network of its own for the samples whose value it changes;
    first layers are stacked.
    """
    knots, mixings, biases, weights = [], [], [], []
    for index in (values != 0).any(dim=0).nonzero()[:, 0].tolist():
        mine = values[:, index] != 0
        first, mixing, bias, weight = _one_output(line.projections, changed[mine], values[mine, index], reach)
        knots.append(first)
        mixings.append(mixing)
        biases.append(bias)
        weights.append(values.new_zeros(values.shape[1], len(weight)))
        weights[-1][index] = weight
    all_knots = torch.cat(knots)
    return ClosedFormSideNetwork(
        center=line.center,
        directions=line.direction[None],
        select=torch.zeros(len(all_knots), dtype=torch.long, device=all_knots.device),
        knots=all_knots,
        mixing=(torch.block_diag(*mixings), torch.cat(biases)),  # type: ignore[no-untyped-call]
        output_weight=torch.cat(weights, dim=1),
        output_bias=values.new_zeros(values.shape[1]),
    )


def _one_output(
    t: torch.Tensor, changed: torch.Tensor, values: torch.Tensor, reach: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """First-layer knots (M1,), second-layer weight (M2, M1) and bias (M2,), output weight (M2,) of one output."""
    order = t[changed].argsort()
    points, heights = t[changed][order], values[order]
    span = torch.clamp_min(t.max() - t.min(), 1e-6)
    gaps = torch.minimum(neighbour_gaps(t, changed)[order], span)
    slopes = STEEPNESS / (reach * gaps)
    largest = heights.abs().max()
    offsets = -slopes * points - heights / largest  # s = slope * t + offset on the group of the point
    groups, per_group = three_layer_layout(len(points))
    line_slopes = t.new_zeros(groups, per_group)
    line_offsets = t.new_full((groups, per_group), 4.0)  # a unit without a point stays at s = 4, where phi is 0
    index = torch.arange(len(points), device=t.device)
    line_slopes[index // per_group, index % per_group] = slopes
    line_offsets[index // per_group, index % per_group] = offsets
    start = t.min() - 0.1 * span  # left of it every line is level
    knots, changes = [start], [line_slopes[0]]
    for group in range(1, math.ceil(len(points) / per_group)):
        low, high = _widest_gap(t, points[group * per_group - 1], points[group * per_group])
        before = line_slopes[group - 1] * low + line_offsets[group - 1]
        after = line_slopes[group] * high + line_offsets[group]
        bridge = (after - before) / (high - low)
        knots += [low, high]
        changes += [bridge - line_slopes[group - 1], line_slopes[group] - bridge]
    level = line_slopes[0] * start + line_offsets[0]
    bias = (level[:, None] + t.new_tensor(BUMP_SHIFTS)).flatten()
    mixing = torch.stack(changes, dim=1).repeat_interleave(4, dim=0)
    return torch.stack(knots), mixing, bias, (largest * t.new_tensor(BUMP_WEIGHTS)).repeat(per_group)


def _widest_gap(t: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Knots:
    """The widest interval without samples between two changed samples, drawn in by a tenth on either side."""
    between = t[(t >= left) & (t <= right)].sort().values
    widest = int(between.diff().argmax())
    low, high = between[widest], between[widest + 1]
    return low + 0.1 * (high - low), high - 0.1 * (high - low)
