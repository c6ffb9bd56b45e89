"""What ``express`` and ``feasibility`` report: per layer and for the network, as dataclasses, JSON and text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class LayerFeasibility:
    """Whether a block of the frozen network can express a layer of the target.

    Attributes:
        name: Dotted path of the layer.
        needed: Channels per group that the theorem asks for, one per weight: fan-in times fan-out of a group.
        recommended: The same with a quarter more, which conditions the system well (measured by us).
        channels: Channels per group that the block has.
        condition: Of the system that would be solved; infinity without full rank, ``None`` where it was not computed.
        system_bytes: Memory for the system in float64.
        short_of: What is missing, in words; empty if nothing is.
    """

    name: str
    needed: int
    recommended: int
    channels: int
    condition: float | None
    system_bytes: int
    short_of: str

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
    """How well one layer was expressed.

    Attributes:
        name: Dotted path.
        channels: Channels n of the block.
        equations: Weights of the layer, one equation each.
        full_rank: Whether the system could express any weight.
        condition: Of the system.
        largest_gain: Largest |gamma| before it is folded into BatchNorm.
        weight_residual: Largest error of an expressed weight over the largest weight, before rounding.
        radius: Of the ball round the mean input on which the inner ReLU is linear.
        bound_float64: Bound on the error of any output of this layer on the ball, with float64 norm parameters.
        bound_float32: The same after the norm parameters are rounded to float32 and float32 arithmetic is used.
    """

    name: str
    channels: int
    equations: int
    full_rank: bool
    condition: float
    largest_gain: float
    weight_residual: float
    radius: float
    bound_float64: float
    bound_float32: float


@dataclass(frozen=True)
class ExpressCertificate:
    """The evidence that the frozen network equals the target.

    Attributes:
        layers: One entry per layer.
        mode: ``exact`` or ``least_squares``.
        num_tuned: Norm parameters that were set.
        num_frozen: Frozen weights.
        num_target: Parameters of the target.
        largest_output: Largest absolute output of the target on the given inputs; the errors below are relative to it.
        error_float64: Largest measured difference, everything in float64.
        error_float32: Largest measured difference of the float32 network from the float64 target.
        same_predictions: Share of the given inputs with the same largest output (float32).
        bound_float64: Interval bound on the largest difference for inputs in the domain, relative like the errors;
            ``None`` for networks that are no chain.
        bound_float32: The same for the float32 network; rigorous and therefore pessimistic.
    """

    layers: tuple[LayerCertificate, ...]
    mode: str
    num_tuned: int
    num_frozen: int
    num_target: int
    largest_output: float
    error_float64: float
    error_float32: float
    same_predictions: float
    bound_float64: float | None
    bound_float32: float | None

    @property
    def exact(self) -> bool:
        """Full rank everywhere and at most 1e-5 relative difference in float64."""
        return all(layer.full_rank for layer in self.layers) and self.error_float64 <= 1e-5

    def to_json(self) -> str:
        """All fields and ``exact``."""
        return json.dumps({**asdict(self), "exact": self.exact})

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
