"""Architectures as graphs: the value itself, reading it from ONNX, and distances in it."""

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
from ghn_service.graph.onnx_limits import GraphLimits
from ghn_service.graph.onnx_reader import read_onnx

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
    "read_onnx",
    "shortest_distances",
]
