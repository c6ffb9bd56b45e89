"""What exporters compute from parameters, computed again, so that a filled file means what its parameters mean.

torch's default optimisation replaces a class token by its copies along the batch axis, and a table of relative position
biases (arXiv:2103.14030) by what its index reads from it. Both follow from the two shapes.

Legend: H heads, w rows and columns of a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def as_stored(parameter: torch.Tensor, shape: Sequence[int]) -> torch.Tensor | None:
    """What the exporter computed from ``parameter``, as a tensor of shape ``shape``; None if that is not known.

    Args:
        parameter: The parameter in its own shape: ``shape`` itself, one that is repeated along axes to get it, or
            ((2w - 1)^2, H).
        shape: The shape in the file; for a table ([1,] H, w^2, w^2), (w^2, w^2, H) or (w^4, H).
    """
    target = tuple(shape)
    if tuple(parameter.shape) == target:
        return parameter
    pairs = zip(parameter.shape, target, strict=False)
    if parameter.dim() == len(target) and all(own in (1, stored) for own, stored in pairs):
        return parameter.expand(target)
    return _looked_up(parameter, target) if parameter.dim() == 2 else None


def _looked_up(table: torch.Tensor, target: tuple[int, ...]) -> torch.Tensor | None:
    entries, heads = table.shape
    side = (math.isqrt(entries) + 1) // 2
    area = side * side
    if (2 * side - 1) ** 2 != entries or math.prod(target) != heads * area * area:
        return None
    flat = table[_relative_positions(side).to(table.device)]
    square = flat.reshape(area, area, heads)
    if target == (area * area, heads):
        return flat
    if target == (area, area, heads) and area != heads:
        return square
    if target in ((heads, area, area), (1, heads, area, area)):
        return square.permute(2, 0, 1).reshape(target)
    return None


def _relative_positions(side: int) -> torch.Tensor:
    """Row of the table for every pair of positions of a window, (w^4,): first the row difference, then the column's."""
    place = torch.arange(side)
    difference = place[:, None] - place[None, :] + side - 1  # (w, w), from 0 to 2w - 2
    rows = difference[:, None, :, None] * (2 * side - 1)
    columns = difference[None, :, None, :]
    return (rows + columns).reshape(-1)
