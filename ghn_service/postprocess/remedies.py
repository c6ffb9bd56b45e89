"""The steps that change predicted weights: ``noise``, ``orthogonal`` and ``auto``.

Predicted weights are often one small block repeated, so that whole groups of channels are copies of each other and stay
so under training. Noise parts the copies; a (semi-)orthogonal weight has none; ``auto`` chooses by what it measures.

References: Knyazev 2022, "Pretraining a Neural Network before Knowing Its Architecture" (arXiv:2207.10049), for noise
and ``qr``; Higham 1986, "Computing the Polar Decomposition", theorem on the nearest orthogonal matrix, for ``polar``.

Shapes: matrices are (B, R, C), one for each packed attention projection and, but for the published rules, each group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ghn_service.postprocess.diversity import TensorDiversity, measure_diversity
from ghn_service.postprocess.options import require_at_least, require_known, require_share
from ghn_service.postprocess.weighted_layers import Change, WeightedLayer, as_matrices, from_matrices

# Copies span too few directions; this little noise picks the missing ones at random instead of leaving them to LAPACK.
TIE_BREAK = 1e-3


@dataclass(frozen=True, slots=True)
class DiversityNoise:
    """Adds Gaussian noise.

    Attributes:
        beta: Factor of the noise. The published recipes use 3e-5 with ``scale="correlation"``; with
            ``scale="relative"`` it is the share of the layer's own standard deviation (0.1 is a tenth of it).
        scale: ``correlation``: beta times the standard deviation of the row-correlation matrix, as published (a
            number between 0 and 1 that does not know the size of the weights). ``relative``: beta times the standard
            deviation of the layer's weights.
        keep_rms: Whether each matrix keeps its root mean square: with relative noise of ``beta=1`` half of its variance
            is then predicted and half random, as in warm starts that are shrunk and perturbed (arXiv:1910.08475).
        layer: First layer that is changed, counted from 1 in the order of the graph; 0 changes those in need: from the
            first tiled layer on, and earlier ones with copies or of lacking rank.
    """

    name: ClassVar[str] = "noise"
    beta: float = 3e-5
    scale: str = "correlation"
    keep_rms: bool = False
    layer: int = 0

    def __post_init__(self) -> None:
        require_at_least(self.beta, 0.0, field="beta")
        require_known(self.scale, ("correlation", "relative"), field="scale")
        require_at_least(self.layer, 0, field="layer")

    def change(self, tensor: torch.Tensor, layer: WeightedLayer, generator: torch.Generator) -> Change:
        """The noisy weight, and the standard deviation of what was added to it."""
        parts = as_matrices(tensor.float(), layer, layer.num_packed)  # (B, R, C)
        noise = torch.randn(layer.spec.torch_shape, generator=generator, device=generator.device)
        is_relative = self.scale == "relative"
        stds = [
            self.beta * (float(part.std(correction=0)) if is_relative else row_correlation_std(part)) for part in parts
        ]
        noisy = parts + parts.new_tensor(stds)[:, None, None] * noise.to(parts.device).reshape(parts.shape)
        if self.keep_rms:
            noisy = with_rms_of(parts, noisy)
        std = sum(stds) / len(stds)
        reason = f"noise of standard deviation {std:.3g} on weights of {float(parts.std(correction=0)):.3g}"
        return from_matrices(noisy, tensor, layer), reason, {"noise_std": std}


@dataclass(frozen=True, slots=True)
class Orthogonal:
    """Replaces weights by semi-orthogonal ones.

    ``qr`` is the published rule: the orthogonal factor of a QR decomposition of the whole weight as one tall matrix,
    which keeps the first columns and bends the later ones away from them. ``polar`` takes the semi-orthogonal matrix
    nearest to the prediction, U V^T, and therefore keeps most of it; groups are matrices of their own then.

    Attributes:
        method: ``qr`` (as published) or ``polar`` (nearest semi-orthogonal matrix).
        keep_rms: Whether each matrix keeps its root mean square; otherwise its singular values become 1. By default
            ``qr`` does not keep it, as published, and ``polar`` does.
        layer: First layer that is changed, counted from 1 in the order of the graph; 0 changes those in need: from the
            first tiled layer on, and earlier ones with copies or of lacking rank.
    """

    name: ClassVar[str] = "orthogonal"
    method: str = "qr"
    keep_rms: bool | None = None
    layer: int = 0

    def __post_init__(self) -> None:
        require_known(self.method, ("qr", "polar"), field="method")
        require_at_least(self.layer, 0, field="layer")
        if self.keep_rms is None:
            object.__setattr__(self, "keep_rms", self.method == "polar")

    def change(self, tensor: torch.Tensor, layer: WeightedLayer, generator: torch.Generator) -> Change:
        """The orthogonalised weight, and how much of the prediction was kept; draws nothing."""
        if self.method == "polar" and layer.is_depthwise and self.keep_rms:
            return None, "depthwise: every group has one row, and nothing to be orthogonal to", {}
        matrices = as_matrices(tensor, layer, layer.num_packed if self.method == "qr" else layer.num_matrices)
        orthogonal = orthogonalize(matrices, method=self.method, keep_rms=bool(self.keep_rms))
        overlap = overlap_with(matrices, orthogonal)
        reason = f"{self.method}: {overlap:.0%} of the prediction's direction kept"
        return from_matrices(orthogonal, tensor, layer), reason, {"overlap": overlap}


@dataclass(frozen=True, slots=True)
class Auto:
    """Chooses per layer between ``orthogonal:method=polar``, relative noise, and nothing.

    A layer whose rows are copies (tiled, duplicate, or of low numerical rank) cannot be trained apart and becomes the
    nearest semi-orthogonal matrix at its own scale, after noise that parts the rows where there are more of them than
    directions. A layer whose rows are merely alike, or a depthwise one with copies, gets that noise alone. One with
    rows as different as those of a random matrix is left as it was predicted.

    Attributes:
        copies: Share of rows that may be copies before a layer is orthogonalised.
        cosine: Mean absolute cosine between rows, above that of random rows, from which a layer gets noise.
        beta: Standard deviation of that noise, relative to that of the layer; two copies with noise of 0.2 each have a
            cosine of 0.96.
        layer: First layer that is changed, counted from 1 in the order of the graph; 0 changes those in need: from the
            first tiled layer on, and earlier ones with copies or of lacking rank.
    """

    name: ClassVar[str] = "auto"
    copies: float = 0.05
    cosine: float = 0.3
    beta: float = 0.2
    layer: int = 0

    def __post_init__(self) -> None:
        require_share(self.copies, field="copies", zero=True)
        require_share(self.cosine, field="cosine", zero=True)
        require_at_least(self.beta, 0.0, field="beta")
        require_at_least(self.layer, 0, field="layer")

    def change(self, tensor: torch.Tensor, layer: WeightedLayer, generator: torch.Generator) -> Change:
        """The repaired weight, and what was found and done."""
        # Drawn in any case, so that what one layer gets does not depend on what was found in another.
        noise = torch.randn(layer.spec.torch_shape, generator=generator, device=generator.device).to(tensor.device)
        measured = measure_diversity(tensor, layer)
        if measured.rms == 0:
            return None, "all zero: there is no scale to keep", {}
        matrices = as_matrices(tensor, layer)
        jitter = noise.reshape(matrices.shape) * matrices.std(dim=(-2, -1), correction=0, keepdim=True)
        copies, cosine = self._copies_found(measured), measured.mean_abs_cosine
        if copies and not layer.is_depthwise:
            # Equal rows of a tall matrix W are equal in its polar factor W (W^T W)^(-1/2) too: noise must part them.
            is_tall = matrices.shape[-2] > matrices.shape[-1]
            noisy = matrices + (self.beta if is_tall else TIE_BREAK) * jitter
            repaired = orthogonalize(noisy, method="polar", keep_rms=True)
            overlap = overlap_with(matrices, repaired)
            reason = f"{copies}: nearest orthogonal matrix, {overlap:.0%} of the prediction's direction kept"
            return from_matrices(repaired, tensor, layer), reason, {"overlap": overlap}
        if copies or cosine - measured.random_abs_cosine > self.cosine:
            found = copies or f"rows are alike (mean |cos| {cosine:.2f})"
            reason = f"{found}: noise of {self.beta:g} of the layer's standard deviation"
            return from_matrices(matrices + self.beta * jitter, tensor, layer), reason, {"noise_std": self.beta}
        return None, f"diverse: rank {measured.rank} of {measured.full_rank}, mean |cos| {cosine:.2f}", {}

    def _copies_found(self, measured: TensorDiversity) -> str:
        if measured.tiled_share > self.copies:
            return f"tiled: {measured.tiled_share:.0%} copies, rank {measured.rank} of {measured.full_rank}"
        if measured.near_duplicate_rows > self.copies:
            return f"{measured.near_duplicate_rows:.0%} of the rows repeat another"
        if measured.rank < (1 - self.copies) * measured.full_rank:
            return f"rank {measured.rank} of {measured.full_rank}"
        return ""


def row_correlation_std(matrix: torch.Tensor) -> float:
    """Standard deviation of all entries of the row-correlation matrix of ``matrix`` made tall, diagonal included.

    Equal to ``torch.corrcoef(matrix).std()`` without building the (R, R) matrix: with unit-length centred rows Z, the
    entries of Z Z^T sum to |Z^T 1|^2 and their squares to |Z^T Z|^2, where Z^T Z is only (C, C). Rows without any
    variance, whose correlation is undefined, count as uncorrelated.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    centred = (tall - tall.mean(dim=1, keepdim=True)).double()
    lengths = centred.norm(dim=1, keepdim=True)
    rows = torch.where(lengths > 0, centred / lengths.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    count = tall.shape[0] ** 2
    if count < 2:
        return 0.0
    total = rows.sum(dim=0).square().sum()
    squares = (rows.T @ rows).square().sum()
    return float(((squares - total**2 / count) / (count - 1)).clamp_min(0.0).sqrt())


def orthogonalize(matrices: torch.Tensor, *, method: str, keep_rms: bool) -> torch.Tensor:
    """Semi-orthogonal matrices (B, R, C) made from ``matrices`` (B, R, C), float32 or float64.

    With ``keep_rms``, each is scaled to the root mean square of its matrix; one of zeros stays zero then.
    """
    is_wide = matrices.shape[-2] < matrices.shape[-1]
    tall = matrices.mT if is_wide else matrices
    if method == "polar":
        u, _, vh = torch.linalg.svd(tall, full_matrices=False)
        factor: torch.Tensor = u @ vh
    else:
        q, r = torch.linalg.qr(tall)
        factor = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)
    factor = factor.mT if is_wide else factor
    return with_rms_of(matrices, factor) if keep_rms else factor


def with_rms_of(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Matrices ``after`` (B, R, C), each scaled to the root mean square of its counterpart ``before``."""
    sizes, wanted = (matrices.square().mean(dim=(-2, -1), keepdim=True).sqrt() for matrices in (after, before))
    return after * (wanted / sizes.clamp_min(torch.finfo(after.dtype).tiny))


def overlap_with(before: torch.Tensor, after: torch.Tensor) -> float:
    """Cosine between two tensors of equal shape, taken as vectors; 0 where one of them is zero."""
    return float(torch.nn.functional.cosine_similarity(before.reshape(1, -1), after.reshape(1, -1)))
