"""The weighted layers of a graph, and their weights as matrices: what every step of post-processing walks over.

Shapes: a weight in torch's layout is (O, I / groups, spatial...). As matrices it is (B, R, C), one matrix for each
group of a convolution and each packed projection: B = packed * groups, R = O / B rows (output channels) of
C = (I / groups) * spatial values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ghn_service.graph.architecture import ArchitectureGraph, LayerAttributes, ParameterSpec

WEIGHTED_OP_TYPES = frozenset({"conv", "sep_conv", "dil_conv"})


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


def kept_reason(layer: WeightedLayer, first_layer: int) -> str:
    """Why a step leaves a layer alone, or "" if it does not."""
    if layer.is_head:
        return "the classifier is never changed"
    if layer.number < first_layer:
        return f"before layer {first_layer}"
    return ""


def to_torch_layout(tensor: torch.Tensor, spec: ParameterSpec) -> torch.Tensor:
    """A view of a tensor of the file with output channels first."""
    return tensor.permute(spec.permutation) if spec.permutation else tensor


def to_file_layout(tensor: torch.Tensor, spec: ParameterSpec) -> torch.Tensor:
    """The inverse of ``to_torch_layout``, contiguous."""
    if not spec.permutation:
        return tensor.contiguous()
    inverse = [spec.permutation.index(axis) for axis in range(len(spec.permutation))]
    return tensor.permute(inverse).contiguous()


def as_matrices(tensor: torch.Tensor, layer: WeightedLayer) -> torch.Tensor:
    """The weight (in the file's layout) as matrices (B, R, C), in at least float32."""
    weight = to_torch_layout(tensor, layer.spec)
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return weight.reshape(layer.num_matrices, weight.shape[0] // layer.num_matrices, -1)


def from_matrices(matrices: torch.Tensor, like: torch.Tensor, layer: WeightedLayer) -> torch.Tensor:
    """The inverse of ``as_matrices``: a tensor with shape, layout and dtype of ``like``."""
    weight = matrices.reshape(layer.spec.torch_shape).to(like.dtype)
    return to_file_layout(weight, layer.spec)
