"""Handlers of the operators of convolutions, linear layers and normalisations, with their biases.

Shape legend: convolution weight (out, in / groups, kernel height, kernel width); linear weight (out, in) in torch,
(in, out) as the right operand of MatMul.
"""

from __future__ import annotations

import math

from ghn_service.graph.onnx.attention import attended
from ghn_service.graph.onnx.file import OnnxNode
from ghn_service.graph.onnx.values import ReadContext, Value, View
from ghn_service.graph.raw_graph import INPUT, Flow, RawNode, TensorUse

_BUFFER_SLOTS = {3: "running_mean", 4: "running_var"}


def read_convolution(context: ReadContext, node: OnnxNode) -> None:
    """Conv: a weight node, then a bias node. Convolutions over other than two axes get fallback weights."""
    data = context.start(node)
    view = context.weight(node, 1)
    if view is None:
        context.emit(node, context.joined(data[:2]))
        return
    kernel = view.shape if view.shape is not None else view.source.shape
    spatial = convolved(node, data[0].spatial, kernel[2:])
    if spatial is None:  # after a slice, say; then the file may state the size
        stated = context.file.value_shape(node.outputs[0])
        spatial = stated[2:] if stated is not None and len(stated) == len(kernel) else None
    if len(kernel) != 4:
        _pass_weighted(context, node, data[0], spatial)
        return
    groups = max(1, node.integer("group", 1))
    dilations = node.integers("dilations") or (1, 1)
    op_type = "conv" if groups == 1 else "dil_conv" if min(dilations) > 1 else "sep_conv"
    index = _add_layer(context, node, 1, view, (0, 1, 2, 3), op_type, data[0].flow)
    layer = context.graph.nodes[index]
    layer.attributes = {
        "groups": groups,
        "stride": node.integers("strides") or (1, 1),
        "dilations": dilations,
        "padding": node.integers("pads") or (0, 0, 0, 0),
        "positions": _count(spatial),
    }
    bias = context.weight(node, 2)
    is_folded = context.names.has_folded_norm(node, bias.source if bias is not None else None)
    if is_folded:
        context.folded.append(node.label)
    _finish_layer(context, node, index, bias, 2, spatial, is_folded=is_folded)


def read_transposed_convolution(context: ReadContext, node: OnnxNode) -> None:
    """ConvTranspose and other layers outside the vocabulary: fallback weights, and data passes."""
    data = context.start(node)
    if context.weight(node, 1) is None:
        context.emit(node, context.joined(data[:2]))
    else:
        _pass_weighted(context, node, data[0], None)


def read_gemm(context: ReadContext, node: OnnxNode) -> None:
    """Gemm: a weight node, then a bias node; the weight may be either factor."""
    data = context.start(node)
    for index, other, attribute in ((1, 0, "transB"), (0, 1, "transA")):
        view = context.weight(node, index) if data[other].flow or index == 1 else None
        if view is not None:
            is_output_first = bool(node.integer(attribute, 0)) == (index == 1)
            _read_linear(context, node, index, view, data[other], is_output_first=is_output_first, bias_index=2)
            return
    context.emit(node, context.joined(data))


def read_matmul(context: ReadContext, node: OnnxNode) -> None:
    """MatMul: a linear layer if one factor is a weight; attention if one is a softmax; else a mere product."""
    data = context.start(node)
    left, right = data[0], data[1]
    if left.flow and right.flow:
        context.emit(node, attended(context, left, right))
        return
    index, other = (1, left) if not right.flow else (0, right)
    if not other.flow:
        context.claim_operand(node, 1 - index)
    view = context.weight(node, index)
    if view is None or not (other.flow or context.is_trainable(view.source) or context.is_computed(view.source)):
        context.emit(node, context.joined(data))
        return
    rank = len(view.shape) if view.shape is not None else len(view.source.shape)
    if rank != 2:
        context.use(node, index, view, "kaiming_normal" if rank > 2 else "ones")
        context.emit(node, Value(flow=other.flow or INPUT))
        return
    is_output_first = (index == 0) != bool(node.integer("transB", 0))
    _read_linear(context, node, index, view, other, is_output_first=is_output_first, bias_index=-1)


def read_einsum(context: ReadContext, node: OnnxNode) -> None:
    """Einsum: a linear layer if one operand is a matrix; attention if one is a softmax."""
    data = context.start(node)
    flowing = [value for value in data if value.flow]
    if len(flowing) == 2:
        context.emit(node, attended(context, *flowing))
        return
    if len(flowing) == 1 and len(data) == 2:
        index = 1 if data[0].flow else 0
        view = context.weight(node, index)
        if view is not None:
            axes = _einsum_axes(node.text("equation"), index)
            if axes is not None and view.shape is not None and len(view.shape) == 2:
                _read_linear(context, node, index, view, flowing[0], is_output_first=axes == (0, 1), bias_index=-1)
                return
            context.use(node, index, view, "kaiming_normal")
    context.emit(node, context.joined(data))


def add_bias(
    context: ReadContext, node: OnnxNode, layer: int, index: int, view: View, *, is_folded: bool = False
) -> int:
    """Gives a layer its bias node and returns the node's index; torch knows no name for a folded bias."""
    use = context.use(node, index, view, "node", slot="bias")
    if is_folded:
        use.torch_name = ""
    raw = context.graph.nodes[layer]
    raw.bias = context.add(RawNode("bias", 0, 1, use.torch_name or view.source.name, {layer}, use))
    return raw.bias


def convolved(node: OnnxNode, spatial: tuple[int, ...] | None, kernel: tuple[int, ...]) -> tuple[int, ...] | None:
    """Spatial sizes after a convolution or pooling; None where they are unknown."""
    if spatial is None or len(spatial) != len(kernel):
        return None
    rank = len(kernel)
    strides = node.integers("strides") or (1,) * rank
    dilations = node.integers("dilations") or (1,) * rank
    pads = node.integers("pads") or (0,) * (2 * rank)
    if len(strides) != rank or len(dilations) != rank or len(pads) != 2 * rank or min(strides) < 1:
        return None
    if node.text("auto_pad").startswith("SAME"):
        return tuple(-(-size // stride) for size, stride in zip(spatial, strides, strict=True))
    extra = [stride - 1 if node.integer("ceil_mode", 0) else 0 for stride in strides]
    return tuple(
        (size + pads[axis] + pads[axis + rank] - dilations[axis] * (kernel[axis] - 1) - 1 + extra[axis])
        // strides[axis]
        + 1
        for axis, size in enumerate(spatial)
    )


def _read_linear(
    context: ReadContext,
    node: OnnxNode,
    index: int,
    view: View,
    data: Value,
    *,
    is_output_first: bool,
    bias_index: int,
) -> None:
    rank = len(view.shape) if view.shape is not None else len(view.source.shape)
    if rank != 2:
        context.use(node, index, view, "kaiming_normal")
        context.emit(node, Value(flow=data.flow))
        return
    axes = (0, 1) if is_output_first else (1, 0)
    layer = _add_layer(context, node, index, view, axes, "conv", data.flow)
    raw = context.graph.nodes[layer]
    raw.is_linear = True
    raw.attributes = {"positions": _rows(context, node)}
    bias = context.weight(node, bias_index) if 0 <= bias_index < len(node.inputs) else None
    _finish_layer(context, node, layer, bias, bias_index, None)
    extra = context.values[node.inputs[bias_index]] if 0 <= bias_index < len(node.inputs) else None
    if extra is not None and extra.flow:
        flow = context.graph.union([context.values[node.outputs[0]].flow, extra.flow])
        total = context.add(RawNode("sum", 0, 2, node.label, set(flow)))
        context.emit(node, Value(flow=frozenset({total})))


def _add_layer(
    context: ReadContext, node: OnnxNode, index: int, view: View, axes: tuple[int, ...], op_type: str, flow: Flow
) -> int:
    use = context.use(node, index, view, "node", slot="weight", axes=axes)
    name = use.torch_name or view.source.name
    return context.add(RawNode(op_type, 0, 0, name, set(flow), use))


def _finish_layer(
    context: ReadContext,
    node: OnnxNode,
    layer: int,
    bias: View | None,
    bias_index: int,
    spatial: tuple[int, ...] | None,
    *,
    is_folded: bool = False,
) -> None:
    """Adds the bias that a layer has, or had before the exporter dropped it, and emits the layer's output."""
    if bias is not None and bias.source.num_elements == out_features(context, layer):
        end = add_bias(context, node, layer, bias_index, bias, is_folded=is_folded)
        context.emit(node, Value(flow=frozenset({end}), spatial=spatial))
        return
    if bias is not None:
        context.use(node, bias_index, bias, "zeros")
    torch_name, token = context.names.dropped_bias(node) if bias is None and bias_index >= 0 else ("", "")
    if torch_name:
        end = _restore_bias(context, node, layer, bias_index, torch_name, token)
        context.emit(node, Value(flow=frozenset({end}), spatial=spatial))
        return
    context.emit(node, Value(flow=frozenset({layer}), layer=layer, spatial=spatial))


def _restore_bias(context: ReadContext, node: OnnxNode, layer: int, index: int, torch_name: str, token: str) -> int:
    source = context.new_source(torch_name, (out_features(context, layer),), kind="PARAMETER", is_literal=True)
    if source is None:
        raise AssertionError("a layer has at least one output feature")
    source.initializer = ""
    use = TensorUse(source, "node", context.level, node.label, index, torch_name, token)
    source.uses.append(use)
    context.restored.append(torch_name)
    raw = context.graph.nodes[layer]
    raw.bias = context.add(RawNode("bias", 0, 1, torch_name, {layer}, use))
    return raw.bias


def out_features(context: ReadContext, layer: int) -> int:
    """Output features of a layer; 0 if it is no layer."""
    use = context.graph.nodes[layer].weight
    if use is None:
        return 0
    axis = use.permutation[0] if use.permutation else 0
    return use.source.shape[axis] if use.source.shape else 0


def _pass_weighted(context: ReadContext, node: OnnxNode, data: Value, spatial: tuple[int, ...] | None) -> None:
    context.fall_back(node, 1, "kaiming_normal", literal=True)
    context.fall_back(node, 2, "zeros", literal=True)
    context.emit(node, Value(flow=data.flow or INPUT, spatial=spatial))


def _rows(context: ReadContext, node: OnnxNode) -> int:
    """Rows per example that a linear layer is applied to; 0 if unknown.

    Examples need not be the first axis: attention puts tokens there, or windows together with examples.
    """
    shapes = (context.file.value_shape(name) for name in (node.outputs[0], *node.inputs))
    shape = next((shape for shape in shapes if shape is not None and len(shape) >= 2), None)
    if shape is None:
        return 0
    rows, examples = math.prod(shape[:-1]), context.num_examples
    if examples and rows % examples == 0:
        return _count((rows // examples,))
    return _count(shape[1:-1])


def _count(sizes: tuple[int, ...] | None) -> int:
    """Places per example at which a layer's weight is applied; 0 if unknown."""
    count = math.prod(sizes) if sizes is not None else 0
    return count if 0 < count < 2**31 else 0


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
