"""Handlers of operators without weights: views, activations, constants, pools."""

from __future__ import annotations

import dataclasses
import math

from ghn_service.graph.architecture import leaky_relu_name
from ghn_service.graph.onnx.file import FLOAT_TYPES, OnnxNode
from ghn_service.graph.onnx.layers import convolved
from ghn_service.graph.onnx.values import CONSTANT, ReadContext, Value, View
from ghn_service.graph.raw_graph import RawNode

_ADAPTIVE_CLASSES = {"AdaptiveAvgPool2d": True, "AvgPool2d": False}
_ACTIVATION_LABELS = {
    "Relu": "relu", "LeakyRelu": "leaky_relu", "Elu": "elu", "Selu": "selu", "Celu": "celu", "Gelu": "gelu",
    "Erf": "gelu", "Sigmoid": "sigmoid", "HardSigmoid": "hardsigmoid", "HardSwish": "hardswish", "Mish": "mish",
    "Softplus": "softplus", "Softsign": "softsign", "Tanh": "tanh", "Clip": "relu6", "Swish": "silu",
    "ThresholdedRelu": "relu", "FastGelu": "gelu", "QuickGelu": "gelu", "BiasGelu": "gelu",
}  # fmt: skip


def read_view(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Operators that show the same elements in another shape or type."""
    value = data[0]
    if value.flow or not value.views:
        return value
    if context.names.is_alias(node) and node.inputs[0] in context.file.initializers:
        # The older exporter merges equal tensors and gives each its own name back with an Identity.
        root, name = value.views[0].source, node.outputs[0]
        kind = context.kind_of(name, root.shape)
        source = context.new_source(name, root.shape, kind=kind, initializer=root.initializer)
        return Value(views=(View.of(source),)) if source is not None else value
    return Value(views=tuple(_seen(context, node, view) for view in value.views))


def _seen(context: ReadContext, node: OnnxNode, view: View) -> View:
    if node.op_type == "Transpose":
        return view.transposed(node.integers("perm"))
    operand = context.file.integers(node.inputs[1]) if len(node.inputs) > 1 else None  # older versions: an attribute
    if node.op_type == "Reshape":
        return view.reshaped(_reshaped(view.shape, node.integers("shape") or operand))
    if node.op_type in ("Squeeze", "Unsqueeze", "Flatten"):
        return view.reshaped(_resized(node, view.shape, node.integers("axes") or operand))
    return View(view.source, None, None) if node.op_type == "Expand" else view


def _reshaped(shape: tuple[int, ...] | None, target: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if shape is None or target is None:
        return None
    sizes = [shape[axis] if size == 0 and axis < len(shape) else size for axis, size in enumerate(target)]
    known, total = math.prod(size for size in sizes if size != -1), math.prod(shape)
    if min(sizes, default=1) < -1 or sizes.count(-1) > 1 or known < 1 or total % known:
        return None
    result = tuple(total // known if size == -1 else size for size in sizes)
    return result if -1 in sizes or known == total else None


def _resized(node: OnnxNode, shape: tuple[int, ...] | None, axes: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    if node.op_type == "Flatten":
        return _reshaped(shape, (-1, shape[-1])) if len(shape) == 2 else None
    if node.op_type == "Squeeze":
        drop = {axis % len(shape) for axis in axes} if axes and shape else set(range(len(shape)))
        return tuple(size for axis, size in enumerate(shape) if size != 1 or axis not in drop)
    if axes is None or len(axes) > 16:
        return None
    rank = len(shape) + len(axes)
    added = {axis % rank for axis in axes}
    rest = iter(shape)
    return tuple(1 if axis in added else next(rest, 1) for axis in range(rank))


def read_first(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Operators whose first operand is the data and whose other operands are sizes, indices or limits."""
    return dataclasses.replace(context.joined(data[:1]), spatial=None)


def read_activation(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Element-wise functions of one value; a sigmoid makes a gate."""
    value = data[0]
    if not value.flow:
        return context.joined([value])
    label = _ACTIVATION_LABELS.get(node.op_type)
    if label == "leaky_relu":
        label = leaky_relu_name(node.attributes["alpha"].f if "alpha" in node.attributes else 0.01)
    if label is not None:
        context.graph.note_activation(value.flow, context.level, label)
    is_gate = node.op_type in ("Sigmoid", "HardSigmoid") or (node.op_type == "Clip" and value.shifted)
    gate = node.inputs[0] if is_gate else value.gate
    return Value(flow=value.flow, gate=gate, attention=value.attention, spatial=value.spatial)


def read_constant(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Constant: integers are read where they are needed; a float tensor may be a weight written as a literal."""
    attribute = node.attributes.get("value")
    if attribute is None or attribute.t.data_type not in FLOAT_TYPES or not attribute.t.dims:
        return CONSTANT
    source = context.new_source(node.outputs[0], tuple(attribute.t.dims), kind="CONSTANT", is_literal=True)
    return CONSTANT if source is None else Value(views=(View.of(source),))


def read_filled(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """ConstantOfShape: shape arithmetic in torch's exports, a weight without values elsewhere."""
    attribute = node.attributes.get("value")
    is_float = attribute is None or attribute.t.data_type in FLOAT_TYPES
    shape = context.file.integers(node.inputs[0]) if is_float and not context.file.is_torch else None
    if not shape:
        return CONSTANT
    source = context.new_source(node.outputs[0], shape, kind="CONSTANT" if all(size == 1 for size in shape) else "")
    return CONSTANT if source is None else Value(views=(View.of(source),))


def read_nothing(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Operators whose result carries no data that could be differentiated: shapes, indices, comparisons, noise."""
    return CONSTANT


def read_window_pool(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """MaxPool and AveragePool over two axes: a node, which the passes may find to be adaptive pooling.

    Over other axes, data passes.
    """
    flow = data[0].flow
    window = node.integers("kernel_shape")
    spatial = convolved(node, data[0].spatial, window)
    if len(window) != 2 or not flow:
        return Value(flow=flow, spatial=spatial)
    op_type = "max_pool" if node.op_type == "MaxPool" else "avg_pool"
    raw = RawNode(op_type, context.level, name=node.label, predecessors=set(flow), window=(window[0], window[1]))
    if op_type == "avg_pool":
        raw.from_adaptive = _ADAPTIVE_CLASSES.get(context.names.module_class(node))
        tiles = (node.integers("strides") or (1, 1)) == raw.window and not any(node.integers("pads"))
        raw.covers_input = tiles or spatial == (1, 1)
    return Value(flow=frozenset({context.graph.add(raw)}), spatial=spatial)


def read_global_pool(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """GlobalAveragePool and ReduceMean: a node, except inside a written-out normalisation."""
    if not data[0].flow or node.outputs[0] in context.patterns.norm_means:
        return context.joined(data[:1])
    raw = RawNode("glob_avg", context.level, name=node.label, predecessors=set(data[0].flow))
    return Value(flow=frozenset({context.graph.add(raw)}), spatial=(1, 1))


def read_prelu(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """PRelu: the slope gets a fallback."""
    context.fall_back(node, 1, "prelu", literal=True)
    context.graph.note_activation(data[0].flow, context.level, "prelu")
    return context.joined(data[:1])
