"""Step ``auto``: gives each layer the remedy that its measured diversity calls for, and says why.

A layer whose rows are copies (tiled, duplicate, or of low numerical rank) cannot be trained apart and becomes the
nearest semi-orthogonal matrix at its own scale, after noise that parts the rows where there are more of them than
directions. A layer whose rows are merely alike, or a depthwise one with copies, gets that noise alone. One with rows
as different as those of a random matrix is left as it was predicted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.parameters import ParameterSet
from ghn_service.postprocess.diversity import TensorDiversity, measure_diversity
from ghn_service.postprocess.options import require_at_least, require_share
from ghn_service.postprocess.orthogonal import orthogonalize, overlap_with
from ghn_service.postprocess.weighted_layers import (
    Change,
    StepRecord,
    WeightedLayer,
    as_matrices,
    change_layers,
    from_matrices,
)

# Copies span too few directions; this little noise picks the missing ones at random instead of leaving them to LAPACK.
TIE_BREAK = 1e-3


@dataclass(frozen=True, slots=True)
class Auto:
    """Chooses per layer between ``orthogonal:method=polar``, relative noise, and nothing.

    Attributes:
        copies: Share of rows that may be copies before a layer is orthogonalised.
        cosine: Mean absolute cosine between rows, above that of random rows, from which a layer gets noise.
        beta: Standard deviation of that noise, relative to that of the layer; two copies with noise of 0.2 each have a
            cosine of 0.96.
        layer: First layer that is changed, counted from 1 in the order of the graph; 0 changes all.
    """

    copies: float = 0.05
    cosine: float = 0.3
    beta: float = 0.2
    layer: int = 0

    def __post_init__(self) -> None:
        require_share(self.copies, field="copies", zero=True)
        require_share(self.cosine, field="cosine", zero=True)
        require_at_least(self.beta, 0.0, field="beta")
        require_at_least(self.layer, 0, field="layer")

    def apply(
        self, parameters: ParameterSet, graph: ArchitectureGraph, *, generator: torch.Generator
    ) -> tuple[ParameterSet, StepRecord]:
        """Returns the repaired parameters, and what was found and done in each layer."""

        def change(tensor: torch.Tensor, layer: WeightedLayer) -> Change:
            # Drawn for every layer, so that what one layer gets does not depend on what was found in another.
            noise = torch.randn(layer.spec.torch_shape, generator=generator, device=generator.device)
            return self._change(tensor, layer, noise.to(tensor.device))

        return change_layers(parameters, graph, change, name="auto", options=asdict(self))

    def _change(self, tensor: torch.Tensor, layer: WeightedLayer, noise: torch.Tensor) -> Change:
        if reason := layer.kept_reason(self.layer):
            return None, reason, {}
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
