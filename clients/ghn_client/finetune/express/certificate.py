"""What ``express`` and ``feasibility`` report, and the bounds in it, which hold for every input on the domain.

Derived by us. For one layer, with E = A diag(g) B - W and e the error of the effective bias after rounding the norm
parameters, and u the unit roundoff of the arithmetic:

    |block(x) - layer(x)| <= ||E_i|| R + |E_i c + e_i| + (p + n + 4) u (|A| (|g| |B| (|c| + R) + |shift1|) + |shift2|)_i

In a chain an error of size d at the input of a layer grows at most by the largest absolute row sum of its weight;
ReLU and pooling do not enlarge it. The rounding term is a worst case and far above what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ghn_client.finetune.express.domain import Domain
from ghn_client.finetune.express.linear_system import ExpressedLayer
from ghn_client.finetune.express.pairing import norm_map
from ghn_client.finetune.matrix_layers import BATCH_NORM, norm_kind


@dataclass(frozen=True)
class LayerFeasibility:
    """Whether a block of the frozen network can express a layer of the target."""

    name: str  # dotted path of the layer
    needed: int  # channels per group that the theorem asks for, one per weight: fan-in times fan-out of a group
    recommended: int  # the same with a quarter more, which conditions the system well (measured by us)
    channels: int  # channels per group that the block has
    # of the system that would be solved; infinity without full rank, ``None`` where it was not computed
    condition: float | None
    short_of: str  # what is missing, in words; empty if nothing is

    @property
    def feasible(self) -> bool:
        """True where nothing is short."""
        return not self.short_of


@dataclass(frozen=True)
class Feasibility:
    """The answers for all layers; ``feasible`` if every one can be expressed exactly."""

    layers: tuple[LayerFeasibility, ...]

    @property
    def feasible(self) -> bool:
        """True where every layer is feasible."""
        return all(layer.feasible for layer in self.layers)

    def __str__(self) -> str:
        header = f"{'layer':<24}{'needed':>9}{'advised':>9}{'has':>9}{'cond':>10}  verdict"
        rows = [
            f"{layer.name:<24}{layer.needed:>9,}{layer.recommended:>9,}{layer.channels:>9,}"
            f"{'-' if layer.condition is None else format(layer.condition, '.1e'):>10}  {layer.short_of or 'exact'}"
            for layer in self.layers
        ]
        return "\n".join([header, *rows])


@dataclass(frozen=True)
class LayerCertificate:
    """How well one layer was expressed."""

    name: str  # dotted path
    channels: int  # channels n of the block
    equations: int  # weights of the layer, one equation each
    full_rank: bool  # whether the system could express any weight
    condition: float  # of the system
    largest_gain: float  # largest |gamma| before it is folded into BatchNorm
    weight_residual: float  # largest error of an expressed weight over the largest weight, before rounding
    radius: float  # of the ball round the mean input on which the inner ReLU is linear
    bound_float64: float  # bound on the error of any output of this layer on the ball, with float64 norm parameters
    bound_float32: float  # the same after the norm parameters are rounded to float32 and float32 arithmetic is used


@dataclass(frozen=True)
class ExpressCertificate:
    """The evidence that the frozen network equals the target."""

    layers: tuple[LayerCertificate, ...]  # one entry per layer
    mode: str  # ``exact`` or ``least_squares``
    num_tuned: int  # norm parameters that were set
    num_frozen: int  # frozen weights
    num_target: int  # parameters of the target
    # largest absolute output of the target on the given inputs; the errors below are relative to it
    largest_output: float
    error_float64: float  # largest measured difference, everything in float64
    error_float32: float  # largest measured difference of the float32 network from the float64 target
    same_predictions: float  # share of the given inputs with the same largest output (float32)
    # interval bound on the largest difference for inputs in the domain, relative like the errors; ``None`` for
    # networks that are no chain
    bound_float64: float | None
    bound_float32: float | None  # the same for the float32 network; rigorous and therefore pessimistic

    @property
    def exact(self) -> bool:
        """Full rank everywhere and at most 1e-5 relative difference in float64."""
        return all(layer.full_rank for layer in self.layers) and self.error_float64 <= 1e-5

    def __str__(self) -> str:
        rows = [
            f"{'layer':<24}{'channels':>9}{'weights':>9}{'cond':>10}{'max gain':>10}{'residual':>10}",
            *(
                f"{layer.name:<24}{layer.channels:>9,}{layer.equations:>9,}{layer.condition:>10.1e}"
                f"{layer.largest_gain:>10.1e}{layer.weight_residual:>10.1e}"
                for layer in self.layers
            ),
            (
                f"{self.mode}: {self.num_tuned:,} tuned numbers over {self.num_frozen:,} frozen weights stand for"
                f" {self.num_target:,} parameters"
            ),
            (
                f"relative difference {self.error_float64:.1e} (float64), {self.error_float32:.1e} (float32);"
                f" same predictions on {self.same_predictions:.2%}"
            ),
        ]
        if self.bound_float64 is not None and self.bound_float32 is not None:
            rows.append(f"bound on the domain {self.bound_float64:.1e} (float64), {self.bound_float32:.1e} (float32)")
        return "\n".join(rows)


#: Layers that do not enlarge an error measured in the largest absolute entry.
NON_EXPANSIVE = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Flatten, nn.Identity, nn.Dropout,
    nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip


def layer_bound(layer: ExpressedLayer, domain: Domain, dtype: torch.dtype) -> float:
    """Bound on any output of the layer, with norm parameters and arithmetic in ``dtype``."""
    gains, shift1, shift2 = (value.to(dtype).double() for value in (layer.gains, layer.shift1, layer.shift2))
    error = (layer.outer * gains[:, None, :]) @ layer.inner - layer.weight
    effective = (layer.outer @ shift1[:, :, None])[:, :, 0] + shift2 - layer.bias
    center, radius = domain.center, domain.radius[:, None]
    systematic = error.norm(dim=2) * radius + ((error @ center[:, :, None])[:, :, 0] + effective).abs()
    reach = (gains.abs()[:, :, None] * layer.inner.abs() @ center.abs()[:, :, None])[:, :, 0]
    reach = reach + radius * (gains[:, :, None] * layer.inner).norm(dim=2) + shift1.abs()
    sizes = (layer.outer.abs() @ reach[:, :, None])[:, :, 0] + shift2.abs()
    terms = layer.inner.shape[2] + layer.inner.shape[1] + 4
    rounding = terms * torch.finfo(dtype).eps / 2 * sizes
    return float((systematic + rounding).max())


def network_bound(target: nn.Module, layers: Sequence[ExpressedLayer], bounds: Sequence[float]) -> float | None:
    """Bound on any output of a chain (float64), ``None`` where ``target`` is no chain of known layers."""
    if not isinstance(target, nn.Sequential):
        return None
    solved = {id(layer.pair.layer): (layer, bound) for layer, bound in zip(layers, bounds, strict=True)}
    error, folded = 0.0, {id(layer.pair.folded) for layer in layers}
    for leaf in target.modules():
        if list(leaf.children()):
            if not isinstance(leaf, nn.Sequential):
                return None
        elif id(leaf) in solved:
            layer, own = solved[id(leaf)]
            error = error * float(layer.weight.abs().sum(2).max()) + own
        elif norm_kind(leaf) == BATCH_NORM:
            error = error if id(leaf) in folded else error * float(norm_map(leaf)[0].abs().max())
        elif not isinstance(leaf, NON_EXPANSIVE):
            return None
    return error
