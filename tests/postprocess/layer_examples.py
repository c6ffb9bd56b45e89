"""Small architectures and weights for the tests of post-processing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ghn_service.graph.architecture import ArchitectureGraph, LayerAttributes, Node, ParameterSpec
from ghn_service.parameters import PREDICTED, ParameterSet


@dataclass(frozen=True)
class ExampleLayer:
    """One weighted layer of an example network, its shape in the file's layout."""

    name: str
    shape: tuple[int, ...]
    permutation: tuple[int, ...] = ()
    is_head: bool = False
    attributes: LayerAttributes = field(default_factory=LayerAttributes)


def chain_graph(layers: Sequence[ExampleLayer]) -> ArchitectureGraph:
    """A network that is a chain of weighted layers, each followed by a bias."""
    nodes = [Node("input", "input")]
    for layer in layers:
        op_type = "sep_conv" if layer.attributes.groups > 1 else "conv"
        spec = ParameterSpec(layer.name, layer.shape, layer.permutation)
        bias = ParameterSpec(layer.name.replace("weight", "bias"), (spec.torch_shape[0],))
        nodes.append(Node(op_type, layer.name, spec, is_head=layer.is_head, layer=layer.attributes))
        nodes.append(Node("bias", bias.name, bias, is_head=layer.is_head))
    edges = tuple((index, index + 1) for index in range(len(nodes) - 1))
    return ArchitectureGraph(tuple(nodes), edges)


def random_parameters(graph: ArchitectureGraph, *, seed: int = 0) -> ParameterSet:
    """Gaussian values for every tensor of a graph."""
    generator = torch.Generator().manual_seed(seed)
    specs = {spec.name: spec for spec in graph.parameters()}
    tensors = {name: torch.randn(spec.shape, generator=generator) * 0.1 for name, spec in specs.items()}
    return ParameterSet(specs, tensors, dict.fromkeys(specs, PREDICTED))


def with_tensor(parameters: ParameterSet, name: str, tensor: torch.Tensor) -> ParameterSet:
    """The same parameters with one tensor replaced."""
    tensors = {key: tensor if key == name else value for key, value in parameters.items()}
    return ParameterSet(parameters.specs, tensors, parameters.origins)


def tiled_weight(rows: int, columns: int, block: int, *, seed: int = 0) -> torch.Tensor:
    """A (rows, columns) matrix that repeats a square Gaussian block of ``block`` channels."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(block, block, generator=generator)
    return small.repeat(-(-rows // block), -(-columns // block))[:rows, :columns]


PLAIN = (
    ExampleLayer("stem.weight", (8, 3, 3, 3)),
    ExampleLayer("wide.weight", (4, 8, 3, 3)),
    ExampleLayer("hidden.weight", (20, 4)),
    ExampleLayer("head.weight", (5, 20), is_head=True),
)
