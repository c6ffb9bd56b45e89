"""A request for low-rank factors, what it means for each layer, and what became of the layer.

Whether a method can help is read from the graph: factors are fitted to the activation that follows the layer; where
none follows, spectral factors are optimal; where a normalisation sits in between, it cancels the length of rows, and
with it all that distinguishes ``function`` from ``spectral``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ghn_service.postprocess.kernels import has_kernel
from ghn_service.postprocess.layers import WeightedLayer
from ghn_service.postprocess.low_rank import FUNCTION, FUNCTION_OPTIMIZED, SPECTRAL
from ghn_service.postprocess.options import require_known
from ghn_service.postprocess.rank_allocation import RankRule

OUTPUT_METHODS = (SPECTRAL, FUNCTION, FUNCTION_OPTIMIZED)


@dataclass(frozen=True, slots=True)
class LowRank:
    """Asks for factors instead of dense weights.

    Attributes:
        rule: How ranks are chosen.
        method: How factors are computed: ``spectral``, ``function`` or ``function_optimized``.
    """

    rule: RankRule
    method: str = FUNCTION

    def __post_init__(self) -> None:
        require_known(self.method, OUTPUT_METHODS, field="low_rank.method")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one layer is factored, before its rank is known.

    Attributes:
        method: The method that makes sense for this layer.
        activation: The activation that its factors are fitted to.
        note: Why the method differs from the one asked for, or "".
        dense_reason: Why the layer stays dense whatever the rank, or "".
    """

    method: str
    activation: str
    note: str = ""
    dense_reason: str = ""


@dataclass(frozen=True, slots=True)
class FactorRecord:
    """What became of one weighted layer.

    Attributes:
        parameter: Name of the weight.
        number: Position of the layer in the network, from 1.
        rank: Rank of its factors; 0 where it stays dense.
        method: How the factors were computed.
        activation: The activation that they were fitted to; "" for none.
        normalized: Whether a normalisation sits between the layer and the activation.
        note: What the user should know about this layer; a sentence or "".
        function_error: Relative error of the layer's function with these factors.
        parameters: Values of the weight before.
        factored_parameters: Values of weight or factors after.
        multiply_adds: Multiply-adds per example before; 0 where the number of positions is unknown.
        factored_multiply_adds: The same after.
        shape: Shape of the weight in torch's layout.
        permutation: The axis of the file that each of torch's axes is; empty if the file has torch's layout.
        factors: Names of the two factors, the one that is applied first first; empty where dense.
    """

    parameter: str
    number: int
    rank: int
    method: str
    activation: str
    normalized: bool
    note: str
    function_error: float
    parameters: int
    factored_parameters: int
    multiply_adds: int
    factored_multiply_adds: int
    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    factors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LowRankRecord:
    """What became of a network.

    Attributes:
        method: The method asked for.
        rule: The rule asked for.
        layers: One record for each weighted layer.
    """

    method: str
    rule: RankRule
    layers: tuple[FactorRecord, ...]

    @property
    def num_factored(self) -> int:
        """Layers that have factors now."""
        return sum(layer.rank > 0 for layer in self.layers)


def encode_low_rank_record(record: LowRankRecord) -> dict[str, Any]:
    """The record as values that ``json`` writes: enough to use the factors without the request."""
    layers = [
        {
            **dataclasses.asdict(layer),
            "shape": list(layer.shape),
            "permutation": list(layer.permutation),
            "factors": list(layer.factors),
        }
        for layer in record.layers
    ]
    return {"method": record.method, "rule": dataclasses.asdict(record.rule), "layers": layers}


def plan_layer(layer: WeightedLayer, method: str) -> LayerPlan:
    """The method that makes sense for a layer, given the one asked for, and what to tell the user."""
    attributes = layer.attributes
    if layer.is_head:
        return LayerPlan(SPECTRAL, "", dense_reason="the classifier stays dense")
    if attributes.groups > 1:
        return LayerPlan(SPECTRAL, "", dense_reason="a grouped convolution stays dense")
    name = attributes.activation
    if method == SPECTRAL:
        return LayerPlan(SPECTRAL, name if has_kernel(name) else "")
    if not name or attributes.packed > 1:
        return LayerPlan(SPECTRAL, "", "no activation follows directly: spectral factors are optimal")
    if not has_kernel(name):
        return LayerPlan(SPECTRAL, "", f"no kernel for activation {name!r}: spectral factors")
    if attributes.normalized:
        note = "a normalisation cancels the length of rows: the gain over spectral factors is nil"
        return LayerPlan(SPECTRAL, name, note)
    return LayerPlan(method, name)
