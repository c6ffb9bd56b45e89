"""Writes ``f + g`` as one ONNX graph: the nodes of the side network are added to a filled ONNX file of the base.

Needs the ``onnx`` package (an extra of this client).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ghn_client.errors import InvalidOptionError, MissingExtraError, UnsupportedModuleError
from ghn_client.finetune.side_network import ClosedFormSideNetwork, SideNetwork

if TYPE_CHECKING:
    import onnx as onnx_types


def merge_onnx(
    base: onnx_types.ModelProto,
    side: SideNetwork | ClosedFormSideNetwork,
    *,
    reads: str | None = None,
    adds_to: str | None = None,
    prefix: str = "side",
) -> onnx_types.ModelProto:
    """A copy of ``base`` whose output has the side network added.

    Args:
        base: Filled model with one output of logits (B, C).
        side: The side network, trained or in closed form.
        reads: Tensor that g reads: default the first graph input; for ``at="features"`` the name of the head's input.
        adds_to: Tensor that g is added to; default the first graph output.
        prefix: Of all new names; choose another one for every stacked network.

    Raises:
        MissingExtraError: ``onnx`` is not installed.
        InvalidOptionError: A tensor name does not exist, or the prefix is taken.
        UnsupportedModuleError: The side network is of another class.
    """
    onnx = _onnx()
    model: onnx_types.ModelProto = onnx.ModelProto()
    model.CopyFrom(base)
    graph = model.graph
    known = {value.name for value in (*graph.input, *graph.output)} | {
        out for node in graph.node for out in node.output
    }
    source = reads or graph.input[0].name
    target = adds_to or graph.output[0].name
    for name in (source, target):
        if name not in known:
            raise InvalidOptionError(f"the graph has no tensor {name!r}; it ends in {[o.name for o in graph.output]}")
    if any(initializer.name.startswith(f"{prefix}.") for initializer in graph.initializer):
        raise InvalidOptionError(f"the graph already has initializers named {prefix}.*; choose another prefix")
    renamed = f"{prefix}.base_output"
    for node in graph.node:
        for index, output in enumerate(node.output):
            if output == target:
                node.output[index] = renamed
    builder = _Builder(graph, prefix)
    added = _side_nodes(builder, source, side)
    graph.node.append(onnx.helper.make_node("Add", [renamed, added], [target], name=f"{prefix}.add"))
    _sort_nodes(graph)
    onnx.checker.check_model(model)
    return model


class _Builder:
    """Appends nodes and initializers with a common prefix."""

    def __init__(self, graph: Any, prefix: str) -> None:
        self.graph, self.prefix, self.count = graph, prefix, 0

    def constant(self, name: str, value: torch.Tensor) -> str:
        onnx = _onnx()
        full = f"{self.prefix}.{name}"
        array = value.detach().cpu().contiguous().numpy()
        self.graph.initializer.append(onnx.numpy_helper.from_array(array, full))
        return full

    def node(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        onnx = _onnx()
        self.count += 1
        output = f"{self.prefix}.{op_type.lower()}_{self.count}"
        self.graph.node.append(onnx.helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output


def _side_nodes(builder: _Builder, source: str, side: SideNetwork | ClosedFormSideNetwork) -> str:
    flat = builder.node("Flatten", [source], axis=1)
    if isinstance(side, SideNetwork):
        return _trained_nodes(builder, flat, side)
    if isinstance(side, ClosedFormSideNetwork):
        return _closed_form_nodes(builder, flat, side)
    raise UnsupportedModuleError(f"expected a side network of this package, got {type(side).__name__}")


def _trained_nodes(builder: _Builder, features: str, side: SideNetwork) -> str:
    for index, layer in enumerate(side.layers):
        weight = builder.constant(f"layers.{index}.weight", layer.get_parameter("weight"))
        bias = builder.constant(f"layers.{index}.bias", layer.get_parameter("bias"))
        features = builder.node("Gemm", [features, weight, bias], transB=1)
        if index + 1 < len(side.layers):
            features = builder.node("Relu", [features])
    return features


def _closed_form_nodes(builder: _Builder, features: str, side: ClosedFormSideNetwork) -> str:
    onnx = _onnx()
    double = side.center.dtype == torch.float64
    if double:
        features = builder.node("Cast", [features], to=onnx.TensorProto.DOUBLE)
    centred = builder.node("Sub", [features, builder.constant("center", side.center)])
    lines = builder.node("MatMul", [centred, builder.constant("directions", side.directions.T)])
    chosen = builder.node("Gather", [lines, builder.constant("select", side.select)], axis=1)
    hidden = builder.node("Relu", [builder.node("Sub", [chosen, builder.constant("knots", side.knots)])])
    if side.depth == 3:
        mixed = builder.node("MatMul", [hidden, builder.constant("mixing_weight", side.mixing_weight.T)])
        hidden = builder.node("Relu", [builder.node("Add", [mixed, builder.constant("mixing_bias", side.mixing_bias)])])
    output = builder.node("MatMul", [hidden, builder.constant("output_weight", side.output_weight.T)])
    output = builder.node("Add", [output, builder.constant("output_bias", side.output_bias)])
    return builder.node("Cast", [output], to=onnx.TensorProto.FLOAT) if double else output


def _sort_nodes(graph: Any) -> None:
    """Orders nodes so that each comes after those it reads (a network that is added inside may come too late)."""
    produced = {output for node in graph.node for output in node.output}
    ready: set[str] = set()
    waiting, ordered = list(graph.node), []
    while waiting:
        now = [node for node in waiting if all(name in ready or name not in produced for name in node.input)]
        assert now, "the merged graph has a cycle"
        ordered += now
        ready.update(output for node in now for output in node.output)
        taken = {id(node) for node in now}
        waiting = [node for node in waiting if id(node) not in taken]
    copies = [type(node).FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("writing ONNX needs the package onnx: pip install onnx") from error
    return onnx
