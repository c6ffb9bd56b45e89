"""Handlers of convolutions, linear layers, normalisations, attention, embedding tables and recurrence.

Shape legend: convolution weight (out, in / groups, kernel height, kernel width); linear weight (out, in) in torch,
(in, out) as the right operand of MatMul.
"""

from __future__ import annotations

import math

from ghn_service.errors import InvalidArchitectureError
from ghn_service.graph.onnx.file import OnnxNode
from ghn_service.graph.onnx.values import ReadContext, Value, View
from ghn_service.graph.raw_graph import INPUT, NOTHING, Flow, RawNode, TensorUse

_MAX_POSITIONS = 2**31
_MAX_STEP = 2**31 - 1


def read_convolution(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Conv: a weight node, then a bias node. Convolutions over other than two axes get fallback weights."""
    groups = node.integer("group", 1)
    if groups < 1:
        raise InvalidArchitectureError(f"the convolution {node.label!r} has {groups} groups; expected at least 1")
    for attribute, least in (("strides", 1), ("dilations", 1), ("pads", 0)):
        sizes = node.integers(attribute)
        if sizes and not least <= min(sizes) <= max(sizes) <= _MAX_STEP:
            raise InvalidArchitectureError(
                f"the convolution {node.label!r} has {attribute} {sizes}; expected {least} to {_MAX_STEP}"
            )
    view = context.weight(node, 1)
    if view is None:
        return context.joined(data[:2])
    kernel = view.shape if view.shape is not None else view.source.shape
    spatial = convolved(node, data[0].spatial, kernel[2:])
    if spatial is None:  # after a slice, say; then the file may state the size
        stated = context.file.value_shape(node.outputs[0])
        spatial = stated[2:] if stated is not None and len(stated) == len(kernel) else None
    if len(kernel) != 4:
        return _pass_weighted(context, node, data[0], spatial)
    dilations = node.integers("dilations") or (1, 1)
    op_type = "conv" if groups == 1 else "dil_conv" if min(dilations) > 1 else "sep_conv"
    use = context.use(node, 1, view, "node", slot="weight", axes=(0, 1, 2, 3))
    raw = RawNode(op_type, context.level, 0, use.torch_name or view.source.name, set(data[0].flow), use)
    positions = math.prod(spatial) if spatial is not None else 0
    raw.attributes = {
        "groups": groups,
        "stride": node.integers("strides") or (1, 1),
        "dilations": dilations,
        "padding": node.integers("pads") or (0, 0, 0, 0),
        "positions": positions if 0 < positions < _MAX_POSITIONS else 0,
    }
    layer = context.graph.add(raw)
    bias = context.weight(node, 2)
    is_folded = context.names.has_folded_norm(node, bias.source if bias is not None else None)
    if is_folded:
        context.folded.append(node.label)
    return _with_bias(context, node, layer, bias, 2, spatial, is_folded=is_folded)


def read_transposed_convolution(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """ConvTranspose and other layers outside the vocabulary: fallback weights, and data passes."""
    if context.weight(node, 1) is None:
        return context.joined(data[:2])
    return _pass_weighted(context, node, data[0], None)


def read_gemm(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Gemm: a weight node, then a bias node; the weight may be either factor."""
    for index, other, attribute in ((1, 0, "transB"), (0, 1, "transA")):
        view = context.weight(node, index) if data[other].flow or index == 1 else None
        if view is not None:
            is_output_first = bool(node.integer(attribute, 0)) == (index == 1)
            flow, extra = data[other].flow, data[2] if len(data) > 2 else None
            value = _read_linear(context, node, index, view, flow, is_output_first=is_output_first, bias_index=2)
            if extra is None or not extra.flow or len(view.shape or view.source.shape) != 2:
                return value
            return meeting(context, node, "sum", [Value(flow=value.flow), extra])
    return context.joined(data)


def read_matmul(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """MatMul: a linear layer if one factor is a weight; attention if one is a softmax; else a mere product."""
    left, right = data[0], data[1]
    if left.flow and right.flow:
        return _attended(context, node, left, right)
    index, other = (1, left) if not right.flow else (0, right)
    if not other.flow:  # a layer that computes on a table of coordinates, say: a buffer
        for view in data[1 - index].views:
            if not view.source.uses and view.source.kind != "PARAMETER":
                context.use(node, 1 - index, view, "buffer")
    weight = context.weight(node, index)
    if weight is None or not (other.flow or context.is_trainable(weight.source) or context.is_computed(weight.source)):
        return context.joined(data)
    rank = len(weight.shape if weight.shape is not None else weight.source.shape)
    if rank != 2:
        context.use(node, index, weight, "kaiming_normal" if rank > 2 else "ones")
        return Value(flow=other.flow or INPUT)
    is_output_first = (index == 0) != bool(node.integer("transB", 0))
    return _read_linear(context, node, index, weight, other.flow, is_output_first=is_output_first)


def read_einsum(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Einsum: a linear layer if one operand is a matrix; attention if one is a softmax."""
    flowing = [value for value in data if value.flow]
    if len(flowing) == 2:
        return _attended(context, node, *flowing)
    if len(flowing) == 1 and len(data) == 2:
        index = 1 if data[0].flow else 0
        view = context.weight(node, index)
        if view is not None:
            axes = _einsum_axes(node.text("equation"), index)
            if axes is not None and view.shape is not None and len(view.shape) == 2:
                return _read_linear(context, node, index, view, flowing[0].flow, is_output_first=axes == (0, 1))
            context.use(node, index, view, "kaiming_normal")
    return context.joined(data)


def _einsum_axes(equation: str, index: int) -> tuple[int, int] | None:
    """Order of a matrix operand's axes as (out, in); None if it is not a plain linear map."""
    sides = equation.replace(" ", "").split("->")
    terms = sides[0].split(",")
    if len(sides) != 2 or len(terms) != 2 or len(terms[index]) != 2:
        return None
    first, second = terms[index][0], terms[index][1]
    data, result = terms[1 - index], sides[1]
    if first in result and first not in data and second in data and second not in result:
        return (0, 1)
    if second in result and second not in data and first in data and first not in result:
        return (1, 0)
    return None


def add_bias(
    context: ReadContext, node: OnnxNode, layer: int, index: int, view: View, *, is_folded: bool = False
) -> Flow:
    """Gives a layer its bias node, from which data flows on; torch knows no name for a folded bias."""
    use = context.use(node, index, view, "node", slot="bias")
    if is_folded:
        use.torch_name = ""
    raw = RawNode("bias", context.level, 1, use.torch_name or view.source.name, {layer}, use)
    context.graph.nodes[layer].bias = end = context.graph.add(raw)
    return frozenset({end})


def convolved(node: OnnxNode, spatial: tuple[int, ...] | None, kernel: tuple[int, ...]) -> tuple[int, ...] | None:
    """Spatial sizes after a convolution or pooling; None where they are unknown."""
    if spatial is None or len(spatial) != len(kernel):
        return None
    rank = len(kernel)
    strides = node.integers("strides") or (1,) * rank
    dilations = node.integers("dilations") or (1,) * rank
    pads = node.integers("pads") or (0,) * (2 * rank)
    if len(strides) != rank or len(dilations) != rank or len(pads) != 2 * rank or min(strides, default=1) < 1:
        return None
    is_same, rounds_up = node.text("auto_pad").startswith("SAME"), bool(node.integer("ceil_mode", 0))
    sizes = []
    for axis, (size, stride) in enumerate(zip(spatial, strides, strict=True)):
        room = size + pads[axis] + pads[axis + rank] - dilations[axis] * (kernel[axis] - 1) - 1
        sizes.append(-(-size // stride) if is_same else (room + (stride - 1 if rounds_up else 0)) // stride + 1)
    return tuple(sizes)


def _read_linear(
    context: ReadContext,
    node: OnnxNode,
    index: int,
    view: View,
    flow: Flow,
    *,
    is_output_first: bool,
    bias_index: int = -1,
) -> Value:
    """A linear layer on ``flow``; its positions are the rows per example that it is applied to.

    Examples need not be the first axis: attention puts tokens there, or windows together with examples.
    """
    if len(view.shape if view.shape is not None else view.source.shape) != 2:
        context.use(node, index, view, "kaiming_normal")
        return Value(flow=flow)
    positions = 0
    for name in (node.outputs[0], *node.inputs):
        shape = context.file.value_shape(name)
        if shape is not None and len(shape) >= 2:
            rows, examples = math.prod(shape[:-1]), context.num_examples
            is_whole = examples > 0 and rows % examples == 0
            positions = rows // examples if is_whole else math.prod(shape[1:-1])
            break
    axes = (0, 1) if is_output_first else (1, 0)
    use = context.use(node, index, view, "node", slot="weight", axes=axes)
    raw = RawNode("conv", context.level, 0, use.torch_name or view.source.name, set(flow), use, is_linear=True)
    raw.attributes = {"positions": positions if 0 < positions < _MAX_POSITIONS else 0}
    layer = context.graph.add(raw)
    bias = context.weight(node, bias_index) if 0 <= bias_index < len(node.inputs) else None
    return _with_bias(context, node, layer, bias, bias_index, None)


def _with_bias(
    context: ReadContext,
    node: OnnxNode,
    layer: int,
    bias: View | None,
    bias_index: int,
    spatial: tuple[int, ...] | None,
    *,
    is_folded: bool = False,
) -> Value:
    """A layer's output behind the bias that it has, or had before the exporter dropped it."""
    if bias is not None:
        if bias.source.num_elements == out_features(context, layer):
            return Value(flow=add_bias(context, node, layer, bias_index, bias, is_folded=is_folded), spatial=spatial)
        context.use(node, bias_index, bias, "zeros")
    torch_name, token = context.names.dropped_bias(node) if bias is None and bias_index >= 0 else ("", "")
    if not torch_name:
        return Value(flow=frozenset({layer}), layer=layer, spatial=spatial)
    source = context.new_source(torch_name, (out_features(context, layer),), kind="PARAMETER", is_literal=True)
    assert source is not None, "a layer has at least one output feature"
    source.initializer = ""
    use = TensorUse(source, "node", context.level, node.label, bias_index, torch_name, token)
    source.uses.append(use)
    context.restored.append(torch_name)
    end = context.graph.add(RawNode("bias", context.level, 1, torch_name, {layer}, use))
    context.graph.nodes[layer].bias = end
    return Value(flow=frozenset({end}), spatial=spatial)


def out_features(context: ReadContext, layer: int) -> int:
    """Output features of a layer; 0 if it is no layer."""
    use = context.graph.nodes[layer].weight
    if use is None:
        return 0
    axis = use.permutation[0] if use.permutation else 0
    return use.source.shape[axis] if use.source.shape else 0


def _pass_weighted(context: ReadContext, node: OnnxNode, data: Value, spatial: tuple[int, ...] | None) -> Value:
    context.fall_back(node, 1, "kaiming_normal", literal=True)
    context.fall_back(node, 2, "zeros", literal=True)
    return Value(flow=data.flow or INPUT, spatial=spatial)


def meeting(context: ReadContext, node: OnnxNode, op_type: str, branches: list[Value]) -> Value:
    """A node in which branches meet."""
    flow = context.graph.union([value.flow for value in branches])
    index = context.graph.add(RawNode(op_type, context.level, 2, node.label, set(flow)))
    return Value(flow=frozenset({index}), spatial=branches[0].spatial)


def read_batch_norm(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """BatchNormalization: one node for weight and bias; the statistics are buffers."""
    for index, slot in ((3, "running_mean"), (4, "running_var")):
        for view in data[index].views if index < len(data) else ():
            context.use(node, index, view, "buffer", slot=slot)
    if data[0].flow or not data[0].views:
        return _read_norm(context, node, "bn", data[0], literal=True)
    context.fall_back(node, 1, "ones")  # a weight that is standardised before it is used
    context.fall_back(node, 2, "zeros")
    return context.joined(data[:1])


def read_layer_norm(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """LayerNormalization: one node for weight and bias; without weights, nothing."""
    return _read_norm(context, node, "ln", data[0], literal=False)


def read_other_norm(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Group, instance and RMS normalisation: outside the vocabulary, so ones and zeros."""
    context.fall_back(node, 1, "ones")
    context.fall_back(node, 2, "zeros")
    return Value(flow=data[0].flow, normalized="other", spatial=data[0].spatial)


def _read_norm(context: ReadContext, node: OnnxNode, op_type: str, data: Value, *, literal: bool) -> Value:
    view = context.weight(node, 1, literal=literal)
    if view is None or not view.source.is_vector:
        context.fall_back(node, 1, "ones", literal=literal)
        context.fall_back(node, 2, "zeros", literal=literal)
        return Value(flow=data.flow, normalized="layer" if op_type == "ln" else "other")
    weight = context.use(node, 1, view, "node", slot="weight", is_scale=True)
    bias_view = context.weight(node, 2, literal=literal)
    bias = context.use(node, 2, bias_view, "node", slot="bias") if bias_view is not None else None
    name = weight.torch_name or view.source.name
    index = context.graph.add(RawNode(op_type, context.level, 0, name, set(data.flow), weight, bias))
    return Value(flow=frozenset({index}), spatial=data.spatial)


def read_skip_norm(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """SkipLayerNormalization of ONNX Runtime: two branches meet, then a layer normalisation."""
    flow = context.graph.union([value.flow for value in data[:2]])
    total = frozenset({context.graph.add(RawNode("sum", context.level, 0, node.label, set(flow)))})
    context.fall_back(node, 4, "zeros")
    view = context.weight(node, 2, literal=False)
    if view is None or node.op_type != "SkipLayerNormalization":
        context.fall_back(node, 2, "ones")
        return Value(flow=total)
    weight = context.use(node, 2, view, "node", slot="operand", is_scale=True)
    bias_view = context.weight(node, 3, literal=False)
    bias = context.use(node, 3, bias_view, "node", slot="operand") if bias_view is not None else None
    norm = context.graph.add(RawNode("ln", context.level, 1, view.source.name, set(total), weight, bias))
    if len(node.outputs) > 3 and node.outputs[3]:
        context.values[node.outputs[3]] = Value(flow=total)
    return Value(flow=frozenset({norm}))


def _attended(context: ReadContext, node: OnnxNode, left: Value, right: Value) -> Value:
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
        raw.values |= right.flow
        raw.heads = raw.heads or _stated_heads(context, node.outputs[0], *node.inputs)
        context.graph.spend(len(right.flow))
        for index in right.flow - left.flow:
            earlier = context.graph.nodes[index].level < raw.level
            (raw.predecessors if earlier else late).add(index)
    return Value(flow=context.graph.union([left.flow, frozenset(late)]))


def read_softmax(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Softmax: an attention node; the passes drop it again where it ends the network."""
    if not data[0].flow:
        return context.joined(data[:1])
    heads = _stated_heads(context, node.inputs[0], node.outputs[0])
    raw = RawNode("msa", context.level, name=node.label, predecessors=set(data[0].flow), heads=heads)
    flow = frozenset({context.graph.add(raw)})
    return Value(flow=flow, attention=flow)


def _stated_heads(context: ReadContext, *names: str) -> int:
    """Heads by the first stated shape of values (..., heads, T, D) or (examples * heads, T, D); 0 where none is."""
    for name in names:
        shape = context.file.value_shape(name) or ()
        if len(shape) > 3:
            return shape[-3]
        if len(shape) == 3 and context.num_examples and shape[0] % context.num_examples == 0:
            return shape[0] // context.num_examples
    return 0


def read_fused_attention(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Attention as one operator (opset 23): its queries, keys and values meet in an attention node."""
    flow = context.graph.union([value.flow for value in data[:3]])
    stated = _stated_heads(context, node.inputs[0])
    heads = node.integer("q_num_heads", node.integer("num_heads", stated))
    raw = RawNode("msa", context.level, name=node.label, predecessors=set(flow), is_attention=True, heads=heads)
    raw.values = data[2].flow if len(data) > 2 else NOTHING
    index = context.graph.add(raw)
    for position in range(len(data)):
        context.fall_back(node, position, "truncated_normal")
    return Value(flow=frozenset({index}) if flow else NOTHING)


def read_gather(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Gather: a selection of data, an embedding table read by data, or a part of a weight."""
    table, indices = data[:2]
    if table.flow or not indices.flow:
        return context.joined([table])
    view = context.weight(node, 0, literal=False)
    if view is None:
        return Value(flow=indices.flow)
    use = context.use(node, 0, view, "node", slot="weight", axes=tuple(range(len(view.source.shape))))
    raw = RawNode("pos_enc", context.level, 0, view.source.name, set(indices.flow), use)
    return Value(flow=frozenset({context.graph.add(raw)}))


def read_recurrent(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """LSTM, GRU and RNN: outside the vocabulary; data passes."""
    for index in range(1, len(data)):
        if index < 4:
            context.fall_back(node, index, "recurrent_uniform", literal=True)
        else:
            context.fall_back(node, index, "zeros")
    return Value(flow=data[0].flow)
