"""Architectures as graphs: the value itself and distances in it. ``graph.onnx.reader`` reads them from ONNX files."""

from ghn_service.graph.architecture import (
    ArchitectureGraph,
    BufferSpec,
    LayerAttributes,
    Node,
    ParameterSpec,
    ParameterUse,
    decode_graph,
    encode_graph,
)
from ghn_service.graph.distances import shortest_distances
from ghn_service.graph.raw_graph import GraphLimits

__all__ = [
    "ArchitectureGraph",
    "BufferSpec",
    "GraphLimits",
    "LayerAttributes",
    "Node",
    "ParameterSpec",
    "ParameterUse",
    "decode_graph",
    "encode_graph",
    "shortest_distances",
]
