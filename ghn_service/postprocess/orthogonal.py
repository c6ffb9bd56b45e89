"""Step ``orthogonal``: gives the rows of every layer different directions.

Predicted weights are often one small block repeated, so that whole groups of channels are copies of each other and
stay so under training. Making the weight (semi-)orthogonal ends that. ``qr`` is the published rule: the orthogonal
factor of a QR decomposition, which keeps the first columns and bends the later ones away from them. ``polar`` takes
the semi-orthogonal matrix nearest to the prediction, U V^T, and therefore keeps most of it; groups of a convolution
are matrices of their own then, whereas the published rule reads the whole weight as one tall matrix.

Reference: Knyazev 2022, "Pretraining a Neural Network before Knowing Its Architecture" (arXiv:2207.10049), for ``qr``;
Higham 1986, "Computing the Polar Decomposition", theorem on the nearest orthogonal matrix, for ``polar``.

Shapes: matrices are (B, R, C), one for each packed attention projection and, for ``polar``, each group.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.parameters import ParameterSet
from ghn_service.postprocess.options import require_at_least, require_known
from ghn_service.postprocess.weighted_layers import (
    Change,
    StepRecord,
    WeightedLayer,
    as_matrices,
    change_layers,
    from_matrices,
)

METHODS = ("qr", "polar")


@dataclass(frozen=True, slots=True)
class Orthogonal:
    """Replaces every weight but the classifier's by a semi-orthogonal one.

    Attributes:
        method: ``qr`` (as published) or ``polar`` (nearest semi-orthogonal matrix).
        keep_rms: Whether each matrix keeps its root mean square; otherwise its singular values become 1. By default
            ``qr`` does not keep it, as published, and ``polar`` does.
        layer: First layer that is changed, counted from 1 in the order of the graph; 0 changes all.
    """

    method: str = "qr"
    keep_rms: bool | None = None
    layer: int = 0

    def __post_init__(self) -> None:
        require_known(self.method, METHODS, field="method")
        require_at_least(self.layer, 0, field="layer")

    @property
    def keeps_rms(self) -> bool:
        """``keep_rms``, with the default of the method filled in."""
        return self.method == "polar" if self.keep_rms is None else self.keep_rms

    def apply(
        self, parameters: ParameterSet, graph: ArchitectureGraph, *, generator: torch.Generator
    ) -> tuple[ParameterSet, StepRecord]:
        """Returns the orthogonalised parameters, and how much of each prediction was kept; draws nothing."""
        options = {**asdict(self), "keep_rms": self.keeps_rms}
        return change_layers(parameters, graph, self._change, name="orthogonal", options=options)

    def _change(self, tensor: torch.Tensor, layer: WeightedLayer) -> Change:
        if reason := layer.kept_reason(self.layer):
            return None, reason, {}
        if self.method == "polar" and layer.is_depthwise and self.keeps_rms:
            return None, "depthwise: every group has one row, and nothing to be orthogonal to", {}
        matrices = as_matrices(tensor, layer, layer.num_packed if self.method == "qr" else layer.num_matrices)
        orthogonal = orthogonalize(matrices, method=self.method, keep_rms=self.keeps_rms)
        overlap = overlap_with(matrices, orthogonal)
        reason = f"{self.method}: {overlap:.0%} of the prediction's direction kept"
        return from_matrices(orthogonal, tensor, layer), reason, {"overlap": overlap}


def orthogonalize(matrices: torch.Tensor, *, method: str, keep_rms: bool) -> torch.Tensor:
    """Semi-orthogonal matrices (B, R, C) made from ``matrices`` (B, R, C).

    Args:
        matrices: The matrices, float32 or float64.
        method: ``qr`` or ``polar``.
        keep_rms: Whether each result is scaled to the root mean square of its matrix. A matrix of zeros has no
            direction and no scale; it stays zero then.
    """
    is_wide = matrices.shape[-2] < matrices.shape[-1]
    tall = matrices.mT if is_wide else matrices
    if method == "polar":
        u, _, vh = torch.linalg.svd(tall, full_matrices=False)
        factor: torch.Tensor = u @ vh
    else:
        q, r = torch.linalg.qr(tall)
        factor = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)
    if keep_rms:
        before = matrices.square().mean(dim=(-2, -1), keepdim=True).sqrt()
        factor = factor * before / factor.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    return factor.mT if is_wide else factor


def overlap_with(before: torch.Tensor, after: torch.Tensor) -> float:
    """Cosine between two tensors of equal shape, taken as vectors; 0 where one of them is zero."""
    return float(torch.nn.functional.cosine_similarity(before.reshape(1, -1), after.reshape(1, -1)))
