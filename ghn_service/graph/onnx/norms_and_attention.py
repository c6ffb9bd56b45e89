"""Handlers of normalisation layers, attention, embedding tables and recurrence."""

from __future__ import annotations

from ghn_service.graph.onnx.context import ReadContext
from ghn_service.graph.onnx.node import OnnxNode
from ghn_service.graph.onnx.values import Value
from ghn_service.graph.raw_graph import NOTHING, RawNode

_BUFFER_SLOTS = {3: "running_mean", 4: "running_var"}


def read_batch_norm(context: ReadContext, node: OnnxNode) -> None:
    """BatchNormalization: one node for weight and bias; the statistics are buffers."""
    data = context.start(node)
    for index, slot in _BUFFER_SLOTS.items():
        for view in data[index].views if index < len(data) else ():
            context.use(node, index, view, "buffer", slot=slot)
    if not data[0].flow and data[0].views:  # a weight that is standardised before it is used
        context.fall_back(node, 1, "ones")
        context.fall_back(node, 2, "zeros")
        context.emit(node, context.joined(data[:1]))
    else:
        _read_norm(context, node, "bn", data[0], literal=True)


def read_layer_norm(context: ReadContext, node: OnnxNode) -> None:
    """LayerNormalization: one node for weight and bias; without weights, nothing."""
    data = context.start(node)
    _read_norm(context, node, "ln", data[0], literal=False)


def read_other_norm(context: ReadContext, node: OnnxNode) -> None:
    """Group, instance and RMS normalisation: outside the vocabulary, so ones and zeros."""
    data = context.start(node)
    context.fall_back(node, 1, "ones")
    context.fall_back(node, 2, "zeros")
    context.emit(node, Value(flow=data[0].flow, normalized="other", spatial=data[0].spatial))


def _read_norm(context: ReadContext, node: OnnxNode, op_type: str, data: Value, *, literal: bool) -> None:
    view = context.weight(node, 1, literal=literal)
    if view is None or not view.source.is_vector:
        context.fall_back(node, 1, "ones", literal=literal)
        context.fall_back(node, 2, "zeros", literal=literal)
        context.emit(node, Value(flow=data.flow, normalized="layer" if op_type == "ln" else "other"))
        return
    weight = context.use(node, 1, view, "node", slot="weight", is_scale=True)
    bias_view = context.weight(node, 2, literal=literal)
    bias = context.use(node, 2, bias_view, "node", slot="bias") if bias_view is not None else None
    name = weight.torch_name or view.source.name
    raw = RawNode(op_type, 0, 0, name, set(data.flow), weight, bias)
    context.emit(node, Value(flow=frozenset({context.add(raw)}), spatial=data.spatial))


def read_skip_norm(context: ReadContext, node: OnnxNode) -> None:
    """SkipLayerNormalization of ONNX Runtime: two branches meet, then a layer normalisation."""
    data = context.start(node)
    flow = context.graph.union([value.flow for value in data[:2]])
    index = context.add(RawNode("sum", 0, 0, node.label, set(flow)))
    context.fall_back(node, 4, "zeros")
    total = frozenset({index})
    view = context.weight(node, 2, literal=False)
    if view is None or node.op_type != "SkipLayerNormalization":
        context.fall_back(node, 2, "ones")
        context.emit(node, Value(flow=total))
        return
    weight = context.use(node, 2, view, "node", slot="operand", is_scale=True)
    bias_view = context.weight(node, 3, literal=False)
    bias = context.use(node, 3, bias_view, "node", slot="operand") if bias_view is not None else None
    norm = context.add(RawNode("ln", 0, 1, view.source.name, set(total), weight, bias))
    context.emit(node, Value(flow=frozenset({norm})))
    if len(node.outputs) > 3 and node.outputs[3]:
        context.values[node.outputs[3]] = Value(flow=total)


def attended(context: ReadContext, left: Value, right: Value) -> Value:
    """The product of two activations; where one is a softmax, the other is the values that it weighs.

    The values become a source of the softmax node instead of going past it, as queries and keys are already.
    """
    if not left.attention and right.attention:
        left, right = right, left
    if not left.attention:
        return Value(flow=context.graph.union([left.flow, right.flow]))
    late: set[int] = set()
    for softmax in left.attention:
        raw = context.graph.nodes[softmax]
        raw.is_attention = True
        context.graph.spend(len(right.flow))
        for index in right.flow - left.flow:
            earlier = context.graph.nodes[index].level < raw.level
            (raw.predecessors if earlier else late).add(index)
    return Value(flow=context.graph.union([left.flow, frozenset(late)]))


def read_softmax(context: ReadContext, node: OnnxNode) -> None:
    """Softmax: an attention node; the passes drop it again where it ends the network."""
    data = context.start(node)[0]
    if not data.flow:
        context.emit(node, context.joined([data]))
        return
    index = context.add(RawNode("msa", 0, name=node.label, predecessors=set(data.flow)))
    flow = frozenset({index})
    context.emit(node, Value(flow=flow, attention=flow))


def read_fused_attention(context: ReadContext, node: OnnxNode) -> None:
    """Attention as one operator (opset 23): its queries, keys and values meet in an attention node."""
    data = context.start(node)
    index = context.add(RawNode("msa", 0, name=node.label, is_attention=True))
    flow = context.graph.union([value.flow for value in data[:3]])
    context.graph.nodes[index].predecessors.update(flow)
    for position in range(len(data)):
        context.fall_back(node, position, "truncated_normal")
    context.emit(node, Value(flow=frozenset({index}) if flow else NOTHING))


def read_gather(context: ReadContext, node: OnnxNode) -> None:
    """Gather: a selection of data, an embedding table read by data, or a part of a weight."""
    table, indices = context.start(node)[:2]
    if table.flow or not indices.flow:
        context.emit(node, context.joined([table]))
        return
    view = context.weight(node, 0, literal=False)
    if view is None:
        context.emit(node, Value(flow=indices.flow))
        return
    use = context.use(node, 0, view, "node", slot="weight", axes=tuple(range(len(view.source.shape))))
    raw = RawNode("pos_enc", 0, name=view.source.name, predecessors=set(indices.flow), weight=use)
    context.emit(node, Value(flow=frozenset({context.add(raw)})))


def read_recurrent(context: ReadContext, node: OnnxNode) -> None:
    """LSTM, GRU and RNN: outside the vocabulary; data passes."""
    data = context.start(node)
    for index in range(1, min(4, len(data))):
        context.fall_back(node, index, "recurrent_uniform", literal=True)
    for index in range(4, len(data)):
        context.fall_back(node, index, "zeros")
    context.emit(node, Value(flow=data[0].flow))
