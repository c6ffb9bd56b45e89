"""Handlers of operators without weights: views, activations, constants, pools."""

from __future__ import annotations

import dataclasses

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


def read_view(context: ReadContext, node: OnnxNode) -> None:
    """Operators that show the same elements in another shape or type."""
    data = context.start(node)[0]
    if data.flow or not data.views:
        context.emit(node, data)
    elif context.names.is_alias(node) and node.inputs[0] in context.file.initializers:
        context.emit(node, _alias(context, node, data))
    else:
        context.emit(node, Value(views=tuple(_seen(context, node, view) for view in data.views)))


def _alias(context: ReadContext, node: OnnxNode, data: Value) -> Value:
    """The older exporter merges equal tensors and gives each its own name back with an Identity."""
    root, name = data.views[0].source, node.outputs[0]
    kind = context.kind_of(name, root.shape)
    source = context.new_source(name, root.shape, kind=kind, initializer=root.initializer)
    return Value(views=(View.of(source),)) if source is not None else data


def _seen(context: ReadContext, node: OnnxNode, view: View) -> View:
    if node.op_type == "Transpose":
        return view.transposed(node.integers("perm"))
    if node.op_type == "Reshape":
        return view.reshaped(_reshaped(view.shape, context.file.integers(node.inputs[1])))
    if node.op_type in ("Squeeze", "Unsqueeze", "Flatten"):
        axes = node.integers("axes") or (context.file.integers(node.inputs[1]) if len(node.inputs) > 1 else None)
        return view.reshaped(_resized(node, view.shape, axes))
    if node.op_type == "Expand":
        return view.derived(keeps_shape=False)
    return view


def _reshaped(shape: tuple[int, ...] | None, target: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if shape is None or target is None:
        return None
    sizes = [shape[axis] if size == 0 and axis < len(shape) else size for axis, size in enumerate(target)]
    known, total = 1, 1
    for size in sizes:
        known *= size if size != -1 else 1
    for size in shape:
        total *= size
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


def read_first(context: ReadContext, node: OnnxNode) -> None:
    """Operators whose first operand is the data and whose other operands are sizes, indices or limits."""
    data = context.start(node)
    value = context.joined(data[:1])
    context.emit(node, dataclasses.replace(value, spatial=None))


def read_activation(context: ReadContext, node: OnnxNode) -> None:
    """Element-wise functions of one value; a sigmoid makes a gate."""
    data = context.start(node)[0]
    if not data.flow:
        context.emit(node, context.joined([data]))
        return
    label = _ACTIVATION_LABELS.get(node.op_type)
    if label == "leaky_relu":
        label = leaky_relu_name(node.real("alpha", 0.01))
    if label is not None:
        context.note_activation(data, label)
    is_gate = node.op_type in ("Sigmoid", "HardSigmoid") or (node.op_type == "Clip" and data.shifted)
    gate = node.inputs[0] if is_gate else data.gate
    context.emit(node, Value(flow=data.flow, gate=gate, attention=data.attention, spatial=data.spatial))


def read_constant(context: ReadContext, node: OnnxNode) -> None:
    """Constant: integers are read where they are needed; a float tensor may be a weight written as a literal."""
    context.start(node)
    attribute = node.attributes.get("value")
    context.emit(node, CONSTANT)
    if attribute is not None and attribute.t.data_type in FLOAT_TYPES:
        shape = tuple(attribute.t.dims)
        source = context.new_source(node.outputs[0], shape, kind="CONSTANT", is_literal=True) if shape else None
        if source is not None:
            context.emit(node, Value(views=(View.of(source),)))


def read_filled(context: ReadContext, node: OnnxNode) -> None:
    """ConstantOfShape: shape arithmetic in torch's exports, a weight without values elsewhere."""
    context.start(node)
    context.emit(node, CONSTANT)
    attribute = node.attributes.get("value")
    is_float = attribute is None or attribute.t.data_type in FLOAT_TYPES
    shape = context.file.integers(node.inputs[0]) if is_float and not context.file.is_torch else None
    if shape:
        kind = "CONSTANT" if all(size == 1 for size in shape) else ""
        source = context.new_source(node.outputs[0], shape, kind=kind)
        if source is not None:
            context.emit(node, Value(views=(View.of(source),)))


def read_nothing(context: ReadContext, node: OnnxNode) -> None:
    """Operators whose result carries no data that could be differentiated: shapes, indices, comparisons, noise."""
    context.start(node)
    context.emit(node, CONSTANT)


def read_max_pool(context: ReadContext, node: OnnxNode) -> None:
    """MaxPool over two axes: a node. Over other axes, data passes."""
    _read_pool(context, node, "max_pool")


def read_average_pool(context: ReadContext, node: OnnxNode) -> None:
    """AveragePool over two axes: a node, which the passes may find to be adaptive pooling."""
    raw, spatial = _read_pool(context, node, "avg_pool")
    if raw is None:
        return
    raw.from_adaptive = _ADAPTIVE_CLASSES.get(context.names.module_class(node))
    tiles = (node.integers("strides") or (1, 1)) == raw.window and not any(node.integers("pads"))
    raw.covers_input = tiles or spatial == (1, 1)


def _read_pool(context: ReadContext, node: OnnxNode, op_type: str) -> tuple[RawNode | None, tuple[int, ...] | None]:
    """The node of a pooling window over two axes, or ``None`` where data only passes; and the size behind it."""
    data = context.start(node)[0]
    window = node.integers("kernel_shape")
    spatial = convolved(node, data.spatial, window)
    if len(window) != 2 or not data.flow:
        context.emit(node, Value(flow=data.flow, spatial=spatial))
        return None, spatial
    raw = RawNode(op_type, 0, name=node.label, predecessors=set(data.flow), window=(window[0], window[1]))
    context.emit(node, Value(flow=frozenset({context.add(raw)}), spatial=spatial))
    return raw, spatial


def read_global_pool(context: ReadContext, node: OnnxNode) -> None:
    """GlobalAveragePool and ReduceMean: a node, except inside a written-out normalisation."""
    data = context.start(node)[0]
    if not data.flow or node.outputs[0] in context.patterns.norm_means:
        context.emit(node, context.joined([data]))
        return
    raw = RawNode("glob_avg", 0, name=node.label, predecessors=set(data.flow))
    context.emit(node, Value(flow=frozenset({context.add(raw)}), spatial=(1, 1)))


def read_prelu(context: ReadContext, node: OnnxNode) -> None:
    """PRelu: the slope gets a fallback."""
    data = context.start(node)
    context.fall_back(node, 1, "prelu", literal=True)
    context.note_activation(data[0], "prelu")
    context.emit(node, context.joined(data[:1]))
