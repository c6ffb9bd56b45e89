"""What every rank of a layer would cost in accuracy, from one decomposition of its weight.

The rows of the rank-r projection have squared lengths that are cumulative sums over singular directions, and lengths
are all that the kernel needs. So one decomposition gives the error of every rank, without building any factors.

Shapes: W (m, d), full rank k = min(m, d).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ghn_service.postprocess.kernels import ActivationKernel, activation_kernel
from ghn_service.postprocess.low_rank import SPECTRAL, truncated_svd


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Row lengths of every truncation of one weight.

    Attributes:
        target: Lengths (m,) of the rows of W.
        squared_lengths: (m, k): entry (i, r - 1) is the squared length of row i of the rank-r projection.
        energies: Squared singular values (k,), descending.
    """

    target: torch.Tensor
    squared_lengths: torch.Tensor
    energies: torch.Tensor

    @property
    def full_rank(self) -> int:
        """K = min(m, d)."""
        return self.energies.numel()

    def kept_energy(self, rank: int) -> float:
        """Share of the squared singular values that rank ``rank`` keeps; 1 for a weight of zeros."""
        total = float(self.energies.sum())
        return float(self.energies[:rank].sum()) / total if total > 0 else 1.0

    def function_error(self, rank: int, *, kernel: ActivationKernel, method: str, normalized: bool = False) -> float:
        """Loss of the layer's function at a rank, relative to the second moment of its output.

        Args:
            rank: From 1 to the full rank.
            kernel: The activation that follows.
            method: ``spectral`` keeps the lengths of the projection; every other method rescales its rows.
            normalized: Whether a normalisation gives every row its length back whatever the factors are.
        """
        tiny = torch.finfo(self.target.dtype).tiny
        lengths = torch.minimum(self.squared_lengths[:, rank - 1].double().clamp_min(0.0).sqrt(), self.target)
        cosine = torch.where(self.target > 0, lengths / self.target.clamp_min(tiny), 1.0)
        whole = float(kernel.second_moment(self.target).sum())
        if normalized:
            loss = kernel.loss(self.target, self.target, cosine)
        else:
            loss = kernel.loss(self.target, lengths, cosine)
            if method != SPECTRAL:
                loss = torch.minimum(loss, kernel.loss(self.target, kernel.best_length(self.target, cosine), cosine))
        return float(loss.sum()) / whole if whole > 0 else 0.0


def weight_spectrum(matrix: torch.Tensor) -> Spectrum:
    """Decomposes a matrix (m, d)."""
    left, values, _ = truncated_svd(matrix, min(matrix.shape))
    squared_lengths = (left * values).square().cumsum(dim=1)
    return Spectrum(matrix.double().norm(dim=1), squared_lengths, values.double().square())


def error_curve(
    weight: torch.Tensor, ranks: list[int], *, activation: str, method: str, normalized: bool = False
) -> list[float]:
    """The relative function error of a weight (m, d) or (m, channels, kernel...) at each of ``ranks``."""
    spectrum = weight_spectrum(weight.flatten(1).float())
    kernel = activation_kernel(activation)
    return [spectrum.function_error(rank, kernel=kernel, method=method, normalized=normalized) for rank in ranks]


def candidate_ranks(full_rank: int, *, points: int = 32) -> list[int]:
    """At most ``points`` ranks from 1 to the full rank, evenly spread on a logarithmic scale."""
    steps = torch.logspace(0, torch.log10(torch.tensor(float(full_rank))).item(), points, dtype=torch.float64)
    return sorted({min(max(int(step), 1), full_rank) for step in steps.round().tolist()} | {full_rank})
