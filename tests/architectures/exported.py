"""Graphs by the long way: export to ONNX, then read."""

from __future__ import annotations

import torch

from ghn_architectures.architecture import Architecture
from ghn_client import export_architecture
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.graph.onnx.reader import read_onnx


def exported_graph(architecture: Architecture) -> ArchitectureGraph:
    module = architecture.build(initialize=False).train()
    return read_onnx(export_architecture(module, torch.zeros(2, *architecture.interface.input_shape)))
