"""The graph of a network from its own ``forward``, run once on a symbol instead of a tensor.

No export and no arithmetic: tracing a network of a hundred layers takes a few milliseconds, so that a hypernetwork can
be trained on graphs made on the fly. Because the very ``forward`` that computes is the one that is traced, a graph
cannot disagree with its network; that it agrees with the graph read from the network's ONNX file is tested.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ghn_architectures.tracing import operations as _operations  # noqa: F401  (registers the rules)
from ghn_architectures.tracing.finish import finish
from ghn_architectures.tracing.recorder import INPUT, Recorder
from ghn_architectures.tracing.symbol import Symbol
from ghn_service.graph.architecture import ArchitectureGraph


@dataclass(frozen=True, slots=True)
class Trace:
    """What tracing a network gives.

    Attributes:
        graph: The architecture.
        multiply_adds: Multiplications with addition for one example.
        activation_elements: Elements written for one example; with ``multiply_adds`` a measure of time.
    """

    graph: ArchitectureGraph
    multiply_adds: int
    activation_elements: int


@torch.no_grad()
def trace(module: nn.Module, input_shape: tuple[int, ...]) -> Trace:
    """The graph and the cost of ``module`` on one input of ``input_shape`` (C, H, W).

    The module is left as it was.

    Raises:
        UnsupportedArchitectureError: ``forward`` uses a function without a rule.
    """
    recorder = Recorder({id(parameter): name for name, parameter in module.named_parameters()})
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        output = module(Symbol(recorder, (1, *input_shape), frozenset((INPUT,)), 0))
    finally:
        for child in training:
            child.training = True
    graph = finish(recorder, module, output.sources)
    return Trace(graph, recorder.multiply_adds, recorder.activation_elements)
