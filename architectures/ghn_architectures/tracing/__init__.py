"""The graph of a network from its own ``forward``, run once on a symbol instead of a tensor.

No export and no arithmetic: tracing a network of a hundred layers takes a few milliseconds, so that a hypernetwork can
be trained on graphs made on the fly. Because the very ``forward`` that computes is the one that is traced, a graph
cannot disagree with its network; that it agrees with the graph read from the network's ONNX file is tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ghn_architectures.tracing import operations as _operations  # noqa: F401  (registers the rules)
from ghn_architectures.tracing.symbol import Recorder, Symbol, parameter_spec
from ghn_service.graph.architecture import ArchitectureGraph, BufferSpec
from ghn_service.graph.passes import build_graph, simplify
from ghn_service.graph.raw_graph import INPUT, GraphLimits


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
    recorder = Recorder(module)
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        output = module(Symbol(recorder, (1, *input_shape), INPUT, 0))
    finally:
        for child in training:
            child.training = True
    recorder.graph.outputs = [output.flow]
    skeleton = simplify(recorder.graph, GraphLimits())
    raws = [recorder.graph.nodes[index] for index in skeleton.order]
    kept = {use.source.name for raw in raws for use in (raw.weight, raw.norm_bias) if use is not None}
    others = []
    for source in recorder.sources.values():
        if source.name not in kept:
            rules = [use.role for use in source.uses if use.role != "node"]
            others.append(parameter_spec(source, rules[0] if rules else "truncated_normal"))
    graph = build_graph(recorder.graph, skeleton, other_parameters=others, buffers=_buffers(module))
    return Trace(graph, recorder.multiply_adds, recorder.activation_elements)


def _buffers(module: nn.Module) -> Iterator[BufferSpec]:
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            is_stored = buffer is not None and name not in child._non_persistent_buffers_set
            if is_stored and buffer.is_floating_point():
                yield BufferSpec(f"{prefix}.{name}" if prefix else name, tuple(buffer.shape), name)
