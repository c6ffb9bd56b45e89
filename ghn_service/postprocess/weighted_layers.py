"""The weighted layers of a graph, their weights as matrices, and the records of what steps made of them.

Shapes: a weight in torch's layout is (O, I / groups, spatial...). As matrices it is (B, R, C), one matrix for each
group of a convolution and each packed projection: B = packed * groups, R = O / B rows (output channels) of
C = (I / groups) * spatial values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ghn_service.graph.architecture import ArchitectureGraph, LayerAttributes, ParameterSpec

WEIGHTED_OP_TYPES = frozenset({"conv", "sep_conv", "dil_conv"})
CHANGED = "changed"
KEPT = "kept"


@dataclass(frozen=True, slots=True)
class WeightedLayer:
    """One convolution, linear layer or attention projection of a network.

    Attributes:
        number: Position among the weighted layers in the order of the graph, from 1, as the published recipes count.
        spec: The weight.
        attributes: What the layer does.
        is_head: Whether this is the classifier.
    """

    number: int
    spec: ParameterSpec
    attributes: LayerAttributes
    is_head: bool

    @property
    def name(self) -> str:
        """Name of the weight."""
        return self.spec.name

    @property
    def num_packed(self) -> int:
        """How many projections the weight holds one below the other; 1 for most."""
        count = max(self.attributes.packed, 1)
        return count if self.spec.torch_shape[0] % count == 0 else 1

    @property
    def num_matrices(self) -> int:
        """B: how many independent matrices the weight holds (groups times packed projections)."""
        count = max(self.attributes.groups, 1) * max(self.attributes.packed, 1)
        return count if self.spec.torch_shape[0] % count == 0 else 1

    @property
    def is_depthwise(self) -> bool:
        """Whether every group has a single output channel, so that no two rows share their inputs."""
        return self.attributes.groups > 1 and self.spec.torch_shape[0] == self.num_matrices


def weighted_layers(graph: ArchitectureGraph) -> Iterator[WeightedLayer]:
    """Every layer with a weight of at least two axes, in the order of the graph."""
    number = 0
    for node in graph.nodes:
        if node.op_type not in WEIGHTED_OP_TYPES or node.weight is None or len(node.weight.shape) < 2:
            continue
        number += 1
        yield WeightedLayer(number, node.weight, node.layer or LayerAttributes(), node.is_head)


def to_torch_layout(tensor: torch.Tensor, spec: ParameterSpec) -> torch.Tensor:
    """A view of a tensor of the file with output channels first."""
    return tensor.permute(spec.permutation) if spec.permutation else tensor


def as_matrices(tensor: torch.Tensor, layer: WeightedLayer, count: int = 0) -> torch.Tensor:
    """The weight (in the file's layout) as ``count`` (default ``num_matrices``) matrices (B, R, C), from float32 up."""
    weight = to_torch_layout(tensor, layer.spec)
    weight = weight if weight.dtype == torch.float64 else weight.float()
    count = count or layer.num_matrices
    return weight.reshape(count, weight.shape[0] // count, -1)


def from_matrices(matrices: torch.Tensor, like: torch.Tensor, layer: WeightedLayer) -> torch.Tensor:
    """The inverse of ``as_matrices``: a contiguous tensor with shape, layout and dtype of ``like``."""
    weight, permutation = matrices.reshape(layer.spec.torch_shape).to(like.dtype), layer.spec.permutation
    axes = [permutation.index(axis) for axis in range(len(permutation))]
    return (weight.permute(axes) if axes else weight).contiguous()


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What a step did to one layer.

    Attributes:
        parameter: Name of the weight.
        number: Position of the layer in the network, from 1.
        outcome: ``changed`` or ``kept``.
        reason: Why, in words.
        values: Numbers that belong to it, such as the standard deviation of the noise.
    """

    parameter: str
    number: int
    outcome: str
    reason: str
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a step did to a network.

    Attributes:
        name: Name of the step.
        options: Its options, those left at their default included.
        layers: One record for each weighted layer, in the order of the graph.
    """

    name: str
    options: Mapping[str, Any]
    layers: tuple[LayerRecord, ...]


Change = tuple[torch.Tensor | None, str, Mapping[str, float]]
"""What a step makes of a layer: its new weight in the file's layout (None to keep it), why, and numbers about it."""
