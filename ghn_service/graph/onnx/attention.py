"""Handlers of attention, embedding tables and recurrence."""

from __future__ import annotations

from ghn_service.graph.onnx.file import OnnxNode
from ghn_service.graph.onnx.values import ReadContext, Value
from ghn_service.graph.raw_graph import NOTHING, RawNode


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
