"""Tuned torch modules as ONNX: values into the file that a module was made from, side networks beside its nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx, nn

from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.additive import AdditiveModule
from ghn_client.finetune.side_network import ClosedFormSideNetwork, SideNetwork
from ghn_client.onnx.edit import with_own_tensors
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
        result = merge_onnx(result, additive.side, reads=reads, adds_to=adds_to, prefix=f"side{index}")  # type: ignore[arg-type]
    return result


def _with_values(module: nn.Module, names: Mapping[str, tuple[str, bool]], model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(with_own_tensors(model))
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    state, written = module.state_dict(), dict[str, np.ndarray]()
    for path, (name, transposed) in names.items():
        value = state[path].detach().cpu()
        array = (value.T if transposed else value).contiguous().numpy()
        if name in written and not np.array_equal(written[name], array):
            raise UnsupportedModuleError(
                f"layers that share {name!r} in the file have become different and fit no copy of it"
            )
        written[name] = array
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensors[name].data_type)
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(array.astype(dtype), name))
    return result


def merge_onnx(
    base: onnx.ModelProto,
    side: SideNetwork | ClosedFormSideNetwork,
    *,
    reads: str | None = None,
    adds_to: str | None = None,
    prefix: str = "side",
) -> onnx.ModelProto:
    """A copy of ``base`` whose output has the side network added.

    Args:
        base: Filled model with one output of logits (B, C).
        side: The side network, trained or in closed form.
        reads: Tensor that g reads: default the first graph input; for ``at="features"`` the name of the head's input.
        adds_to: Tensor that g is added to; default the first graph output.
        prefix: Of all new names; choose another one for every stacked network.

    Raises:
        InvalidOptionError: A tensor name does not exist, or the prefix is taken.
        UnsupportedModuleError: The side network is of another class.
    """
    model: onnx.ModelProto = onnx.ModelProto()
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
        full = f"{self.prefix}.{name}"
        array = value.detach().cpu().contiguous().numpy()
        self.graph.initializer.append(onnx.numpy_helper.from_array(array, full))
        return full

    def node(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
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
