"""How different the rows of a weight are from each other: rank, copies, directions, and size against He.

A hypernetwork that predicts a block of 64 channels and repeats it gives a 512-channel layer of rank 64 whose rows come
in groups of identical copies; training keeps the copies identical. These measures show that, and whether a remedy
helped.

Reference: the diagnostics of Knyazev 2022 (arXiv:2207.10049); He et al. 2015 (arXiv:1502.01852) for the scale; Roy and
Vetterli 2007 for the effective rank.

Shapes: matrices are (B, R, C) as in ``layers.py``; a depthwise weight counts as one matrix of filters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ghn_service.postprocess.layers import WeightedLayer, as_matrices, to_torch_layout

DUPLICATE_COSINE = 1.0 - 1e-7
NEAR_DUPLICATE_COSINE = 0.99
TILING_TOLERANCE = 1e-6
MAX_ROWS = 1024


@dataclass(frozen=True, slots=True)
class TensorDiversity:
    """Measures of one weight.

    Attributes:
        rank: Numerical rank, summed over the matrices of the weight.
        full_rank: The rank that the shape allows.
        effective_rank: exp of the entropy of the squared singular values; copies with a little noise have a full
            numerical rank, but a low effective one.
        duplicate_rows: Share of rows that point exactly where an earlier row of their matrix points.
        near_duplicate_rows: Share of rows with an earlier row of |cosine| above 0.99.
        mean_abs_cosine: Mean absolute cosine between different rows.
        random_abs_cosine: What that is for independent Gaussian rows: sqrt(2 / (pi C)).
        spectral_norm: Largest singular value.
        spectral_norm_to_he: The same over its value for a He-normal weight of this shape.
        tiled_share: Share of values that repeat an earlier block exactly along the channel axes.
        rms: Root mean square of the values.
        singular_values: Descending, normalised by the largest, at most 64 points evenly spread; the root mean square
            over the matrices.
        rows_measured: Rows per matrix that were measured; fewer than the weight has if there are more than 1,024.
    """

    rank: int
    full_rank: int
    effective_rank: float
    duplicate_rows: float
    near_duplicate_rows: float
    mean_abs_cosine: float
    random_abs_cosine: float
    spectral_norm: float
    spectral_norm_to_he: float
    tiled_share: float
    rms: float
    singular_values: tuple[float, ...]
    rows_measured: int

    @property
    def trouble(self) -> float:
        """From 0 (as diverse as a random weight) to 1 (all copies): the worst of the measures."""
        excess = self.mean_abs_cosine - self.random_abs_cosine
        deficit = 1.0 - self.rank / max(self.full_rank, 1)
        return min(max(deficit, self.near_duplicate_rows, self.tiled_share, excess, 0.0), 1.0)


def measure_diversity(tensor: torch.Tensor, layer: WeightedLayer) -> TensorDiversity:
    """Measures one weight, given in the file's layout."""
    matrices = _matrices_to_measure(tensor, layer)
    rows = matrices.shape[-2]
    gram = matrices @ matrices.mT
    cosines = _cosines(gram)
    values = _singular_values(matrices, gram)
    tolerance = max(matrices.shape[-2:]) * torch.finfo(torch.float32).eps * values[:, :1]
    earlier = cosines.tril(-1)
    spectral_norm = float(values.max())
    return TensorDiversity(
        rank=int((values > tolerance).sum()),
        full_rank=values.numel(),
        effective_rank=_effective_rank(values),
        duplicate_rows=float((earlier > DUPLICATE_COSINE).any(dim=-1).double().mean()),
        near_duplicate_rows=float((earlier.abs() > NEAR_DUPLICATE_COSINE).any(dim=-1).double().mean()),
        mean_abs_cosine=float(earlier.abs().sum() / max(matrices.shape[0] * rows * (rows - 1) / 2, 1)),
        random_abs_cosine=math.sqrt(2 / (math.pi * matrices.shape[-1])),
        spectral_norm=spectral_norm,
        spectral_norm_to_he=spectral_norm / _he_spectral_norm(matrices),
        tiled_share=tiled_share(to_torch_layout(tensor, layer.spec)),
        rms=float(tensor.double().square().mean().sqrt()),
        singular_values=_curve(values),
        rows_measured=rows,
    )


def tiled_share(weight: torch.Tensor) -> float:
    """Share of the values of a weight (O, I, ...) that repeat an earlier block along the first two axes."""
    period = _period(weight)
    if weight.dim() > 1:
        period *= _period(weight.transpose(0, 1))
        return 1.0 - period / (weight.shape[0] * weight.shape[1])
    return 1.0 - period / weight.shape[0]


def _period(weight: torch.Tensor) -> int:
    """The smallest p < N with ``weight[i + p] == weight[i]`` for all i along the first axis (N, ...), else N."""
    size = weight.shape[0]
    tolerance = TILING_TOLERANCE * float(weight.abs().max())
    like_first = (weight - weight[:1]).abs().flatten(1).amax(dim=1) <= tolerance
    for period in torch.nonzero(like_first[1:]).flatten().tolist():
        shift = int(period) + 1
        if float((weight[shift:] - weight[:-shift]).abs().max()) <= tolerance:
            return shift
    return size


def _matrices_to_measure(tensor: torch.Tensor, layer: WeightedLayer) -> torch.Tensor:
    matrices = as_matrices(tensor, layer)
    if layer.is_depthwise:
        matrices = matrices.reshape(1, matrices.shape[0] * matrices.shape[1], -1)
    rows = matrices.shape[1]
    if rows > MAX_ROWS:
        chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:MAX_ROWS].sort().values
        matrices = matrices[:, chosen.to(matrices.device)]
    return matrices.double()


def _cosines(gram: torch.Tensor) -> torch.Tensor:
    """Cosines (B, R, R) between rows; two rows of zeros count as copies of each other."""
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    is_zero = lengths == 0
    inverse = torch.where(is_zero, 0.0, 1.0 / lengths.masked_fill(is_zero, 1.0))
    both_zero = is_zero.unsqueeze(-1) & is_zero.unsqueeze(-2)
    return torch.where(both_zero, 1.0, gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2))


def _singular_values(matrices: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Singular values (B, min(R, C)), descending, from the smaller Gram matrix in float64.

    The square root of rounding in float64 (1e-8 of the largest) is far below the tolerance of the numerical rank.
    """
    smaller = gram if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT @ matrices
    energies: torch.Tensor = torch.linalg.eigvalsh(smaller)
    return energies.flip(-1).clamp_min(0.0).sqrt()


def _effective_rank(values: torch.Tensor) -> float:
    energy = values.square()
    shares = energy / energy.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=-1)
    return float(torch.where(energy.sum(dim=-1) > 0, entropy.exp(), 0.0).sum())


def _he_spectral_norm(matrices: torch.Tensor) -> float:
    """Largest singular value to expect from He-normal (R, C): sqrt(2 / C) (sqrt R + sqrt C)."""
    rows, columns = matrices.shape[-2:]
    return math.sqrt(2 / columns) * (math.sqrt(rows) + math.sqrt(columns))


def _curve(values: torch.Tensor, points: int = 64) -> tuple[float, ...]:
    mean = values.square().mean(dim=0).sqrt()
    chosen = torch.linspace(0, mean.numel() - 1, min(points, mean.numel())).round().long()
    largest = float(mean[0]) or 1.0
    return tuple(round(float(value) / largest, 6) for value in mean[chosen.to(mean.device)])
