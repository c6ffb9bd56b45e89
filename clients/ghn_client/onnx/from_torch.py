"""Tuned torch modules as ONNX: values into the file that a module was made from, side networks beside its nodes."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import TopologicalSorter
from typing import Any

import onnx
import torch
from torch import fx, nn

from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.additive import AdditiveModule
from ghn_client.finetune.side_network import ClosedFormSideNetwork, SideNetwork
from ghn_client.onnx.edit import copied, graphs, tensor_proto, with_own_tensors
from ghn_client.onnx.to_torch import NAMES, TENSORS


def to_onnx(tuned: nn.Module, converted: fx.GraphModule, model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` with tuned values, and with the side networks of additive fine-tuning as nodes.

    Args:
        tuned: ``handle.merge()`` of a handle on ``converted``.
        converted: From :func:`module_from_onnx`.
        model: The file that it was made from.

    Raises:
        UnsupportedModuleError: A side network reads the features of a head that is no linear layer of the file, or
            layers that share a tensor in the file have become different.
    """
    sides: list[AdditiveModule] = []
    while isinstance(tuned, AdditiveModule):
        sides.append(tuned)
        tuned = tuned.base
    result = _with_values(tuned, converted.meta[NAMES], model)
    for index, additive in enumerate(reversed(sides)):
        reads = adds_to = None
        if additive.head is not None:
            head = additive.head.rpartition("base.")[2]
            if head not in converted.meta[TENSORS]:
                raise UnsupportedModuleError(f"the head {head!r} is no linear layer of the file; use at='logits'")
            reads, adds_to = converted.meta[TENSORS][head]
        result = merge_onnx(result, additive.side, reads=reads, adds_to=adds_to, prefix=f"side{index}")
    return result


def _with_values(module: nn.Module, names: Mapping[str, tuple[str, bool]], model: onnx.ModelProto) -> onnx.ModelProto:
    result = copied(with_own_tensors(model))
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    state, written = module.state_dict(), dict[str, torch.Tensor]()
    for path, (name, transposed) in names.items():
        value = state[path].T if transposed else state[path]
        if name in written and not torch.equal(written[name], value):
            raise UnsupportedModuleError(
                f"layers that share {name!r} in the file have become different and fit no copy of it"
            )
        written[name] = value
        tensors[name].CopyFrom(tensor_proto(name, value, tensors[name].data_type))
    return result


def merge_onnx(
    base: onnx.ModelProto,
    side: nn.Module,
    *,
    reads: str | None = None,
    adds_to: str | None = None,
    prefix: str = "side",
) -> onnx.ModelProto:
    """A copy of ``base`` whose output has the side network added.

    Args:
        base: Filled model with one output of logits (B, C).
        side: The ``SideNetwork`` or ``ClosedFormSideNetwork``.
        reads: Tensor that g reads: default the first graph input; for ``at="features"`` the name of the head's input.
        adds_to: Tensor that g is added to; default the first graph output.
        prefix: Of all new names; choose another one for every stacked network.

    Raises:
        InvalidOptionError: A tensor name does not exist, or the prefix is taken.
        UnsupportedModuleError: The side network is of another class.
    """
    model = copied(base)
    graph = model.graph
    known = {value.name for value in (*graph.input, *graph.output)}
    known |= {output for node in graph.node for output in node.output}
    source, target = reads or graph.input[0].name, adds_to or graph.output[0].name
    for name in (source, target):
        if name not in known:
            raise InvalidOptionError(f"the graph has no tensor {name!r}; it ends in {[o.name for o in graph.output]}")
    if any(initializer.name.startswith(f"{prefix}.") for initializer in graph.initializer):
        raise InvalidOptionError(f"the graph already has initializers named {prefix}.*; choose another prefix")
    renamed = f"{prefix}.base_output"
    for node in graph.node:
        node.output[:] = [renamed if output == target else output for output in node.output]
    writer = _Writer(graph, prefix)
    if isinstance(side, SideNetwork):
        added = _trained_nodes(writer, writer.node("Flatten", source, axis=1), side)
    elif isinstance(side, ClosedFormSideNetwork):
        added = _closed_form_nodes(writer, writer.node("Flatten", source, axis=1), side)
    else:
        raise UnsupportedModuleError(f"expected a side network of this package, got {type(side).__name__}")
    graph.node.append(onnx.helper.make_node("Add", [renamed, added], [target], name=f"{prefix}.add"))
    _sort_nodes(graph)
    onnx.checker.check_model(model)
    return model


class _Writer:
    """Appends nodes with a common prefix; tensors among their inputs become initializers."""

    def __init__(self, graph: onnx.GraphProto, prefix: str) -> None:
        self.graph, self.prefix, self.count = graph, prefix, 0

    def node(self, op_type: str, *inputs: str | tuple[str, torch.Tensor], **attributes: Any) -> str:
        names = []
        for item in inputs:
            if isinstance(item, tuple):
                self.graph.initializer.append(tensor_proto(f"{self.prefix}.{item[0]}", item[1]))
            names.append(item if isinstance(item, str) else f"{self.prefix}.{item[0]}")
        self.count += 1
        output = f"{self.prefix}.{op_type.lower()}_{self.count}"
        self.graph.node.append(onnx.helper.make_node(op_type, names, [output], name=output, **attributes))
        return output


def _trained_nodes(writer: _Writer, features: str, side: SideNetwork) -> str:
    for index, layer in enumerate(side.layers):
        weights = [(f"layers.{index}.{role}", layer.get_parameter(role)) for role in ("weight", "bias")]
        features = writer.node("Gemm", features, *weights, transB=1)
        if index + 1 < len(side.layers):
            features = writer.node("Relu", features)
    return features


def _closed_form_nodes(writer: _Writer, features: str, side: ClosedFormSideNetwork) -> str:
    double = side.center.dtype == torch.float64
    if double:
        features = writer.node("Cast", features, to=onnx.TensorProto.DOUBLE)
    centred = writer.node("Sub", features, ("center", side.center))
    lines = writer.node("MatMul", centred, ("directions", side.directions.T))
    chosen = writer.node("Gather", lines, ("select", side.select), axis=1)
    hidden = writer.node("Relu", writer.node("Sub", chosen, ("knots", side.knots)))
    if side.depth == 3:
        mixed = writer.node("MatMul", hidden, ("mixing_weight", side.mixing_weight.T))
        hidden = writer.node("Relu", writer.node("Add", mixed, ("mixing_bias", side.mixing_bias)))
    output = writer.node("MatMul", hidden, ("output_weight", side.output_weight.T))
    output = writer.node("Add", output, ("output_bias", side.output_bias))
    return writer.node("Cast", output, to=onnx.TensorProto.FLOAT) if double else output


def _sort_nodes(graph: onnx.GraphProto) -> None:
    """Orders nodes so that each comes after those it reads (a network that is added inside may come too late)."""
    nodes = [copied(node) for node in graph.node]
    producers = {output: index for index, node in enumerate(nodes) for output in node.output}
    reads = {index: {*node.input, *_captured(node)} for index, node in enumerate(nodes)}
    needs = {index: {producers[name] for name in names if name in producers} for index, names in reads.items()}
    del graph.node[:]
    graph.node.extend(nodes[index] for index in TopologicalSorter(needs).static_order())


def _captured(node: onnx.NodeProto) -> set[str]:
    """What the graphs inside a node read."""
    body = onnx.GraphProto(node=[node])
    return {name for inner in list(graphs(body))[1:] for part in inner.node for name in part.input}
