"""Step ``noise``: breaks the symmetry of weights that were predicted alike.

Reference: Knyazev 2022, "Pretraining a Neural Network before Knowing Its Architecture" (arXiv:2207.10049): Gaussian
noise whose standard deviation is beta times the standard deviation of the rows' correlation coefficients.

Shapes: a matrix of a layer is tall (R, C) with R >= C, transposed where needed, so that its rows are correlated.
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

SCALES = ("correlation", "relative")


@dataclass(frozen=True, slots=True)
class DiversityNoise:
    """Adds Gaussian noise to every weighted layer but the classifier.

    Attributes:
        beta: Factor of the noise. The published recipes use 3e-5 with ``scale="correlation"``; with
            ``scale="relative"`` it is the share of the layer's own standard deviation (0.1 is a tenth of it).
        scale: ``correlation``: beta times the standard deviation of the row-correlation matrix, as published (a
            number between 0 and 1 that does not know the size of the weights). ``relative``: beta times the standard
            deviation of the layer's weights.
        layer: First layer that is changed, counted from 1 in the order of the graph; 0 changes all.
    """

    beta: float = 3e-5
    scale: str = "correlation"
    layer: int = 0

    def __post_init__(self) -> None:
        require_at_least(self.beta, 0.0, field="beta")
        require_known(self.scale, SCALES, field="scale")
        require_at_least(self.layer, 0, field="layer")

    def apply(
        self, parameters: ParameterSet, graph: ArchitectureGraph, *, generator: torch.Generator
    ) -> tuple[ParameterSet, StepRecord]:
        """Returns the noisy parameters, and what was added to each layer."""

        def change(tensor: torch.Tensor, layer: WeightedLayer) -> Change:
            if reason := layer.kept_reason(self.layer):
                return None, reason, {}
            parts = as_matrices(tensor.float(), layer, layer.num_packed)  # (B, R, C)
            noise = torch.randn(layer.spec.torch_shape, generator=generator, device=generator.device)
            measure = row_correlation_std if self.scale == "correlation" else _std
            stds = [self.beta * measure(part) for part in parts]
            noisy = parts + parts.new_tensor(stds)[:, None, None] * noise.to(parts.device).reshape(parts.shape)
            std = sum(stds) / len(stds)
            reason = f"noise of standard deviation {std:.3g} on weights of {_std(parts):.3g}"
            return from_matrices(noisy, tensor, layer), reason, {"noise_std": std}

        return change_layers(parameters, graph, change, name="noise", options=asdict(self))


def _std(weight: torch.Tensor) -> float:
    return float(weight.std(correction=0))


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
