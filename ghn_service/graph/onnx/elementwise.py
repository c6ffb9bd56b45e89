"""Handlers of arithmetic between values: branches that meet, gates, biases, scales, position embeddings."""

from __future__ import annotations

import dataclasses
import math

from ghn_service.graph.onnx.file import OnnxNode
from ghn_service.graph.onnx.folded import TABLE_LEAF, is_table, table_shape
from ghn_service.graph.onnx.layers import add_bias, meeting, out_features
from ghn_service.graph.onnx.patterns import is_constant
from ghn_service.graph.onnx.values import ReadContext, Value, View
from ghn_service.graph.raw_graph import INPUT, RawNode

_PRODUCT_ACTIVATIONS = {"sigmoid": "silu", "hardsigmoid": "hardswish", "relu6": "hardswish", "tanh": "gelu"}
_TRANSPARENT = frozenset(
    {"Identity", "Cast", "CastLike", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Dropout", "Mul", "Div", "Where",
     "Flatten", "Expand"}
)  # fmt: skip
_MAX_LOOK_AHEAD = 12


def read_add(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Add, Sum and Mean of values: two branches meet, or a bias or position embedding is added to one."""
    flowing = [value for value in data if value.flow]
    if len(flowing) == 1:
        return _add_weights(context, node, data, flowing[0])
    if node.outputs[0] in context.patterns.logit_additions and flowing:
        branches = [value for value in flowing if value.flow != INPUT] or flowing
        return Value(flow=context.graph.union([value.flow for value in branches]))
    if len({value.flow for value in flowing}) > 1:
        return meeting(context, node, "sum", flowing)
    return context.joined(data)


def read_concat(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Concat: two branches meet; a weight among them is a token."""
    flowing = [value for value in data if value.flow]
    for index, value in enumerate(data if flowing else ()):
        if not value.flow and value.views:
            context.fall_back(node, index, "truncated_normal")
    if len({value.flow for value in flowing}) > 1:
        return meeting(context, node, "concat", flowing)
    joined = context.joined(data)
    return dataclasses.replace(joined, gate="", attention=frozenset()) if flowing else joined


def read_multiply(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Mul: a squeeze-and-excitation gate, the second half of an activation, or a scale."""
    if context.patterns.ends_norm(node):
        return _normalized(context, node, data)
    flowing = [value for value in data if value.flow]
    if len(flowing) == 2:
        return _product(context, node, flowing)
    return _scale(context, node, data, flowing[0]) if len(flowing) == 1 else context.joined(data)


def read_divide(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Div and Pow: the end of a written-out normalisation, or arithmetic whose weights start at one."""
    ends_norm = context.patterns.ends_norm(node)
    return _normalized(context, node, data) if ends_norm else combine(context, node, data, "ones")


def _normalized(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """The last node of a written-out normalisation, whose scale and shift may follow."""
    if not data[0].flow and data[0].views:
        return context.joined(data)
    kind = "layer" if node.outputs[0] in context.patterns.layer_norms else "other"
    flow = context.graph.union([value.flow for value in data])
    return Value(flow=flow, normalized=kind, spatial=data[0].spatial)


def read_arithmetic(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Sub, Max, Min and the like: data passes; a weight among the operands starts at zero."""
    return combine(context, node, data, "zeros")


def read_where(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Where: data of the two alternatives passes, the condition does not."""
    if any(value.flow for value in data[1:]):
        context.fall_back(node, 1, "zeros")
        context.fall_back(node, 2, "zeros")
    return context.joined(data[1:])


def combine(context: ReadContext, node: OnnxNode, data: list[Value], rule: str) -> Value:
    """Unites the data of all operands; weights among them get the fallback ``rule``."""
    if any(value.flow for value in data):
        for index, value in enumerate(data):
            if not value.flow and value.views:
                context.fall_back(node, index, rule)
    return context.joined(data)


def _product(context: ReadContext, node: OnnxNode, factors: list[Value]) -> Value:
    first, second = factors
    if first.flow == second.flow:  # ``x * sigmoid(x)`` is SiLU, and so on
        context.graph.spend(len(first.flow))
        for index in first.flow:
            raw = context.graph.nodes[index]
            if raw.activation is not None and raw.activation[1] in _PRODUCT_ACTIVATIONS:
                raw.activation = (raw.activation[0], _PRODUCT_ACTIVATIONS[raw.activation[1]])
        return Value(flow=first.flow, spatial=first.spatial)
    if not (first.gate or second.gate):
        return context.joined(factors)
    gate, feature = (first, second) if first.gate else (second, first)
    flow = context.graph.union([gate.flow, feature.flow])
    raw = RawNode("cse", context.level, 2, node.label, set(flow), gate=gate.flow, feature=feature.flow)
    return Value(flow=frozenset({context.graph.add(raw)}), spatial=feature.spatial)


def _scale(context: ReadContext, node: OnnxNode, data: list[Value], value: Value) -> Value:
    index = next(position for position, item in enumerate(data) if item is not value)
    view = next((item for item in data[index].views if context.is_trainable(item.source)), None)
    if view is None:
        return dataclasses.replace(value, layer=-1, norm=-1, normalized="")
    if value.normalized == "layer" and view.source.is_vector and view.source.num_elements > 1:
        use = context.use(node, index, view, "node", slot="operand", is_scale=True)
        raw = RawNode("ln", context.level, 0, use.torch_name or view.source.name, set(value.flow), use)
        norm = context.graph.add(raw)
        return Value(flow=frozenset({norm}), norm=norm, spatial=value.spatial)
    context.graph.spend(len(value.flow))
    is_normalized = value.normalized or any(context.graph.nodes[item].op_type in ("bn", "ln") for item in value.flow)
    is_layer_scale = not is_normalized and view.source.is_vector and _meets_branch(context, node)
    context.fall_back(node, index, "layer_scale" if is_layer_scale else "ones")
    return Value(flow=value.flow, normalized=value.normalized, spatial=value.spatial)


def _meets_branch(context: ReadContext, node: OnnxNode) -> bool:
    """Whether a node's output is added to another branch, with nothing but views and scales in between."""
    for _ in range(_MAX_LOOK_AHEAD):
        readers = context.patterns.consumers.get(node.outputs[0], [])
        if len(readers) != 1:
            return False
        node = readers[0]
        if node.op_type in ("Add", "Sum"):
            if node.outputs[0] in context.patterns.logit_additions:
                return False
            context.graph.spend(len(node.inputs))
            return not any(is_constant(context.file, name) and not context.is_token(name) for name in node.inputs)
        if node.op_type not in _TRANSPARENT:
            return False
    return False


def _add_weights(context: ReadContext, node: OnnxNode, data: list[Value], value: Value) -> Value:
    """Adds constants and weights to a single branch."""
    result = dataclasses.replace(value, layer=-1, norm=-1, shifted=True)
    for index, operand in enumerate(data):
        if operand is value:
            continue
        if node.outputs[0] in context.patterns.logit_additions and _add_table(context, node, index, operand):
            continue
        for view in operand.views:  # a folded constant counts where it fits as the bias of the layer before
            if not context.is_trainable(view.source, literal=_fits_bias(context, view, value)):
                continue
            result = _add_weight(context, node, index, view, value)
            for part in operand.views:
                if part is not view and context.is_trainable(part.source):
                    context.use(node, index, part, "zeros")
            break
    return result


def _add_table(context: ReadContext, node: OnnxNode, index: int, operand: Value) -> bool:
    """Reads a relative position table that the exporter has already looked up; says whether it is one."""
    view = operand.views[0] if len(operand.views) == 1 else None
    shape = table_shape(view.source.shape) if view is not None else None
    if view is None or shape is None or not context.is_computed(view.source):
        return False
    if view.source.folded and not is_table(view.source.folded):
        return False
    use = context.use(node, index, view, "truncated_normal", parameter_shape=shape)
    if view.source.folded is None:
        use.torch_name = use.token = context.names.name_in_module(node, TABLE_LEAF)
        use.parameter_shape = shape if use.torch_name else ()
    return True


def _fits_bias(context: ReadContext, view: View, value: Value) -> bool:
    if value.layer < 0 or not view.source.is_vector:
        return False
    features = out_features(context, value.layer)
    return context.graph.nodes[value.layer].bias < 0 and view.source.num_elements == features


def _add_weight(context: ReadContext, node: OnnxNode, index: int, view: View, value: Value) -> Value:
    if _fits_bias(context, view, value):
        return Value(flow=add_bias(context, node, value.layer, index, view), spatial=value.spatial)
    if value.norm >= 0 and view.source.is_vector and context.graph.nodes[value.norm].norm_bias is None:
        norm_bias = context.use(node, index, view, "node", slot="operand")
        context.graph.nodes[value.norm].norm_bias = norm_bias
        return Value(flow=value.flow, spatial=value.spatial)
    if node.outputs[0] in context.patterns.logit_additions:
        context.use(node, index, view, "truncated_normal")
        return Value(flow=value.flow)
    if view.order is not None and _has_position_grid(view.source.shape) and view.shape is not None:
        # A position embedding is a node without predecessors, summed with the tokens.
        use = context.use(node, index, view, "node", slot="operand")
        raw = RawNode("pos_enc", context.level, 1, use.torch_name or view.source.name, set(), use)
        position = context.graph.add(raw)
        total = context.graph.add(RawNode("sum", context.level, 2, node.label, {*value.flow, position}))
        return Value(flow=frozenset({total}), spatial=value.spatial)
    context.use(node, index, view, "zeros" if view.source.is_vector else "truncated_normal")
    return Value(flow=value.flow, spatial=value.spatial)


def _has_position_grid(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape, added to the tokens or the image, is decoded as a position embedding.

    (1, tokens, channels) needs a square grid of positions, with or without one token more; (1, channels, height,
    width) and (tokens, channels) always do.
    """
    if len(shape) == 3 and shape[0] == 1 and min(shape[1:]) > 1:
        return shape[1] - math.isqrt(shape[1]) ** 2 in (0, 1)
    if len(shape) == 4 and shape[0] == 1:
        return min(shape[1:]) > 1
    return len(shape) == 2 and min(shape) > 1
