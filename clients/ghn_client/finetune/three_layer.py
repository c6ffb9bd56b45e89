"""Side networks with two hidden layers: about ``4 sqrt(2 N)`` neurons per output, whatever the number of samples.

The changed samples are cut along one direction into G groups of J. Unit j of the second layer serves the j-th sample
p of every group: on group l its input is ``s_j(t) = a (t - p) - delta / V`` with ``a = 3.03 / gap``, so that every
other sample of that group lies at ``|s| >= 2``. Between groups ``s_j`` is joined linearly inside a gap without
samples. The signed bump ``phi(s) = relu(s + 2) - 2 relu(s + 1) + 2 relu(s - 1) - relu(s - 2)`` is ``-s`` on [-1, 1]
and 0 for ``|s| >= 2``.

The construction and its constant are derived by us; the order is that of arXiv:2408.00359.
"""

from __future__ import annotations

import math

import torch

from ghn_client.finetune.capacity import three_layer_layout
from ghn_client.finetune.projection import Separation, neighbour_gaps
from ghn_client.finetune.side_network import ClosedFormSideNetwork

#: 3 is needed (|s| >= 2 with an offset of up to 1); the rest is room for rounding.
STEEPNESS = 3.03
#: The four neurons of a signed bump: shifts of s, and their output weights.
BUMP_SHIFTS = (2.0, 1.0, -1.0, -2.0)
BUMP_WEIGHTS = (1.0, -2.0, 2.0, -1.0)

Pieces = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def three_layer(
    center: torch.Tensor, separation: Separation, changed: torch.Tensor, values: torch.Tensor, *, reach: float
) -> ClosedFormSideNetwork:
    """The network that has ``values`` at the changed samples and zero at all others.

    Every output gets a network of its own for the samples whose value it changes; first layers are stacked.

    Args:
        center: (D,) what was subtracted from the samples.
        separation: Direction and projections t (K,).
        changed: (N,) indices of the changed samples.
        values: (N, C).
        reach: How far bumps go towards the nearest sample, in (0, 1].
    """
    outputs = [index for index in range(values.shape[1]) if bool((values[:, index] != 0).any())]
    knots, mixings, biases, weights = [], [], [], []
    for index in outputs:
        mine = values[:, index] != 0
        first, mixing, bias, weight = one_output(separation.projections, changed[mine], values[mine, index], reach)
        knots.append(first)
        mixings.append(mixing)
        biases.append(bias)
        row = values.new_zeros(values.shape[1], len(weight))
        row[index] = weight
        weights.append(row)
    all_knots = torch.cat(knots)
    return ClosedFormSideNetwork(
        center=center,
        directions=separation.direction[None],
        select=torch.zeros(len(all_knots), dtype=torch.long, device=all_knots.device),
        knots=all_knots,
        mixing=(torch.block_diag(*mixings), torch.cat(biases)),  # type: ignore[no-untyped-call]
        output_weight=torch.cat(weights, dim=1),
        output_bias=values.new_zeros(values.shape[1]),
    )


def one_output(t: torch.Tensor, changed: torch.Tensor, values: torch.Tensor, reach: float) -> Pieces:
    """First-layer knots (M1,), second-layer weight (M2, M1) and bias (M2,), output weight (M2,) of one output.

    Args:
        t: (K,) projections of all samples.
        changed: (n,) indices of the samples with a value.
        values: (n,) none of them zero.
        reach: As in :func:`three_layer`.
    """
    order = t[changed].argsort()
    points, heights = t[changed][order], values[order]
    gaps = neighbour_gaps(t, changed)[order]
    span = torch.clamp_min(t.max() - t.min(), 1e-6)
    gaps = torch.minimum(gaps, span)
    slopes = STEEPNESS / (reach * gaps)
    largest = heights.abs().max()
    offsets = -slopes * points - heights / largest  # s = slope * t + offset on the group of the point
    groups, per_group = three_layer_layout(len(points))
    line_slopes = t.new_zeros(groups, per_group)
    line_offsets = t.new_full((groups, per_group), 4.0)  # a unit without a point stays at s = 4, where phi is 0
    index = torch.arange(len(points), device=t.device)
    line_slopes[index // per_group, index % per_group] = slopes
    line_offsets[index // per_group, index % per_group] = offsets
    used = math.ceil(len(points) / per_group)
    joints = [_widest_gap(t, points[g * per_group - 1], points[g * per_group]) for g in range(1, used)]
    start = t.min() - 0.1 * span
    knots, changes, level = _join(start, joints, line_slopes[:used], line_offsets[:used])
    shifts, weights = t.new_tensor(BUMP_SHIFTS), t.new_tensor(BUMP_WEIGHTS)
    mixing = changes.repeat_interleave(4, dim=0)
    bias = (level[:, None] + shifts).flatten()
    return knots, mixing, bias, (largest * weights).repeat(per_group)


def _widest_gap(t: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The widest interval without samples between two changed samples, drawn in by a tenth on either side."""
    between = t[(t >= left) & (t <= right)].sort().values
    widest = int(between.diff().argmax())
    low, high = between[widest], between[widest + 1]
    return low + 0.1 * (high - low), high - 0.1 * (high - low)


def _join(
    start: torch.Tensor,
    joints: list[tuple[torch.Tensor, torch.Tensor]],
    slopes: torch.Tensor,
    offsets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Knots (M1,), slope changes (J, M1) and level left of all knots (J,) of the J joined lines.

    Args:
        start: Where the first line begins; left of it every line is level.
        joints: G - 1 intervals inside which the lines of one group go over into those of the next.
        slopes: (G, J).
        offsets: (G, J).
    """
    knots, changes = [start], [slopes[0]]
    for group, (low, high) in enumerate(joints):
        before = slopes[group] * low + offsets[group]
        after = slopes[group + 1] * high + offsets[group + 1]
        bridge = (after - before) / (high - low)
        knots += [low, high]
        changes += [bridge - slopes[group], slopes[group + 1] - bridge]
    return torch.stack(knots), torch.stack(changes, dim=1), slopes[0] * start + offsets[0]
