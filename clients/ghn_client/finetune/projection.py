"""Directions along which samples are told apart: random ones for all samples, and one of its own for every sample.

X  (K, D) samples      Z  (K, D) centred samples      t = Z u  their projections, all in float64
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Separation:
    """One direction, and how far each changed sample is from all others along it.

    Attributes:
        direction: (D,) float64.
        projections: (K,) of all samples.
        gaps: (N,) distance of each changed sample to its nearest other sample, over the spread of the projections.
    """

    direction: torch.Tensor
    projections: torch.Tensor
    gaps: torch.Tensor


def neighbour_gaps(projections: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Distance from each chosen sample to the nearest other one along a line, (N,).

    Args:
        projections: (K,).
        positions: (N,) indices of the chosen samples.
    """
    order = projections.argsort()
    ordered = projections[order]
    infinite = ordered.new_full((1,), torch.inf)
    steps = torch.cat([infinite, ordered.diff(), infinite])
    nearest = torch.minimum(steps[:-1], steps[1:])
    gaps = torch.empty_like(nearest)
    gaps[order] = nearest
    return gaps[positions]


def best_shared_direction(
    centred: torch.Tensor, changed: torch.Tensor, *, draws: int, generator: torch.Generator, chunk: int = 32
) -> Separation:
    """Of ``draws`` random directions, the one whose smallest gap round a changed sample is the largest.

    Only gaps next to a changed sample matter; kept samples may coincide.

    Args:
        centred: (K, D) float64.
        changed: (N,) indices of the changed samples.
        draws: Directions to try.
        generator: Source of the directions.
        chunk: Directions per matrix product.
    """
    scale = centred.std(0, correction=0).clamp_min(1e-12)
    best: Separation | None = None
    for start in range(0, draws, chunk):
        count = min(chunk, draws - start)
        raw = torch.randn(centred.shape[1], count, generator=generator, dtype=torch.float64).to(centred.device)
        directions = raw / scale[:, None]
        directions = directions / directions.norm(dim=0)
        for direction, projections in zip(directions.T, (centred @ directions).T.contiguous(), strict=True):
            gaps = neighbour_gaps(projections, changed) / projections.std(correction=0).clamp_min(1e-300)
            if best is None or gaps.min() > best.gaps.min():
                best = Separation(direction, projections, gaps)
    assert best is not None
    return best


def own_directions(centred: torch.Tensor, changed: torch.Tensor, *, ridge: float = 1e-3) -> torch.Tensor:
    """For every changed sample the direction in which it stands out most from the cloud, ``Sigma^-1 z``, (N, D).

    In many dimensions a sample is nearly always the extreme one along its own whitened direction, so that a single
    neuron sees it alone (a linear discriminant of one sample against the rest; derived by us).

    Args:
        centred: (K, D) float64.
        changed: (N,) indices.
        ridge: Added to the covariance, times its mean variance.
    """
    dimension = centred.shape[1]
    covariance = centred.T @ centred / max(len(centred) - 1, 1)
    level = ridge * covariance.diagonal().mean().clamp_min(1e-12)
    factor = torch.linalg.cholesky(
        covariance + level * torch.eye(dimension, dtype=centred.dtype, device=centred.device)
    )
    directions = torch.cholesky_solve(centred[changed].T, factor).T
    unit: torch.Tensor = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return unit
