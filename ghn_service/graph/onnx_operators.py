"""The operator table: which handler reads which ONNX operator.

To support one more operator, add a line here; an operator without one lets data through as if it were element-wise,
and is listed in the graph's ``unknown_operators``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx

from ghn_service.graph import onnx_elementwise as elementwise
from ghn_service.graph import onnx_layers as layers
from ghn_service.graph.onnx_context import ReadContext
from ghn_service.graph.onnx_file import FLOAT_TYPES, OnnxNode
from ghn_service.graph.onnx_limits import invalid, subgraphs, unsupported
from ghn_service.graph.onnx_patterns import WEIGHT_SLOTS
from ghn_service.graph.onnx_values import CONSTANT, Value, View
from ghn_service.graph.raw_graph import RawNode

Handler = Callable[[ReadContext, OnnxNode], None]

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
    if label is not None:
        context.note_activation(data, label)
    is_gate = node.op_type in ("Sigmoid", "HardSigmoid") or (node.op_type == "Clip" and data.shifted)
    gate = node.inputs[0] if is_gate else data.gate
    context.emit(node, Value(flow=data.flow, gate=gate, attention=data.attention, spatial=data.spatial))


def read_bias_gelu(context: ReadContext, node: OnnxNode) -> None:
    """BiasGelu of ONNX Runtime: a bias, then an activation."""
    elementwise.read_add(context, node)
    context.note_activation(context.values[node.outputs[0]], "gelu")


def read_constant(context: ReadContext, node: OnnxNode) -> None:
    """Constant: integers are read where they are needed; a float tensor may be a weight written as a literal."""
    context.start(node)
    attribute = node.attribute("value")
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
    attribute = node.attribute("value")
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
    data = context.start(node)[0]
    window = node.integers("kernel_shape")
    spatial = layers.convolved(node, data.spatial, window)
    if len(window) != 2 or not data.flow:
        context.emit(node, Value(flow=data.flow, spatial=spatial))
        return
    raw = RawNode("max_pool", 0, name=node.label, predecessors=set(data.flow), window=(window[0], window[1]))
    context.emit(node, Value(flow=frozenset({context.add(raw)}), spatial=spatial))


def read_average_pool(context: ReadContext, node: OnnxNode) -> None:
    """AveragePool over two axes: a node, which the passes may find to be adaptive pooling."""
    data = context.start(node)[0]
    window = node.integers("kernel_shape")
    spatial = layers.convolved(node, data.spatial, window)
    if len(window) != 2 or not data.flow:
        context.emit(node, Value(flow=data.flow, spatial=spatial))
        return
    raw = RawNode("avg_pool", 0, name=node.label, predecessors=set(data.flow), window=(window[0], window[1]))
    raw.from_adaptive = _ADAPTIVE_CLASSES.get(context.names.module_class(node))
    tiles = (node.integers("strides") or (1, 1)) == window and not any(node.integers("pads"))
    raw.covers_input = tiles or spatial == (1, 1)
    context.emit(node, Value(flow=frozenset({context.add(raw)}), spatial=spatial))


def read_global_pool(context: ReadContext, node: OnnxNode) -> None:
    """GlobalAveragePool and ReduceMean: a node, except inside a written-out normalisation."""
    data = context.start(node)[0]
    if not data.flow or node.outputs[0] in context.patterns.norm_means:
        context.emit(node, context.joined([data]))
        return
    raw = RawNode("glob_avg", 0, name=node.label, predecessors=set(data.flow))
    context.emit(node, Value(flow=frozenset({context.add(raw)}), spatial=(1, 1)))


def read_scatter(context: ReadContext, node: OnnxNode) -> None:
    """Scatter operators: data of the first and last operand."""
    data = context.start(node)
    elementwise.combine(context, node, [data[0], *data[2:3]], "zeros")


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


def read_control_flow(context: ReadContext, node: OnnxNode) -> None:
    """If, Loop and Scan: data passes; weights inside are refused.

    Raises:
        UnsupportedArchitectureError: A subgraph has layers.
    """
    for graph in subgraphs(node.proto):
        waiting = [graph]
        while waiting:
            body = waiting.pop()
            heavy = next((item.op_type for item in body.node if item.op_type in WEIGHT_SLOTS), "")
            if heavy or any(item.data_type in FLOAT_TYPES and len(item.dims) > 1 for item in body.initializer):
                what = f"a {heavy} layer" if heavy else "weights"
                raise unsupported(
                    f"node {node.label!r} ({node.op_type}) has {what} inside a subgraph; export the network without"
                    " data-dependent control flow"
                )
            for item in body.node:
                waiting.extend(subgraphs(item))
    elementwise.combine(context, node, context.start(node), "zeros")


def read_dequantized(context: ReadContext, node: OnnxNode) -> None:
    """DequantizeLinear: passes what QuantizeLinear took; a weight stored as integers is refused."""
    header = context.file.initializers.get(node.inputs[0])
    if header is not None:
        refuse_quantised(context, node)
    read_view(context, node)


def refuse_quantised(context: ReadContext, node: OnnxNode) -> None:
    """Operators on integer weights.

    Raises:
        UnsupportedArchitectureError: Always.
    """
    raise unsupported(
        f"node {node.label!r} ({node.op_type}) computes with integer weights; export the network before quantising it"
    )


def read_unknown(context: ReadContext, node: OnnxNode) -> None:
    """An operator without a handler: data of all operands passes, weights get a fallback by their rank."""
    name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    context.unknown_operators[name] = context.unknown_operators.get(name, 0) + 1
    data = context.start(node)
    if any(value.flow for value in data):
        for index, value in enumerate(data):
            for view in value.views:
                if context.is_trainable(view.source) and not value.flow:
                    context.use(node, index, view, "zeros" if view.source.is_vector else "kaiming_normal")
    context.emit(node, context.joined(data))


def _rows(handler: Handler, names: str, domain: str = "") -> dict[tuple[str, str], Handler]:
    return {(domain, name): handler for name in names.split()}


OPERATORS: dict[tuple[str, str], Handler] = {
    **_rows(layers.read_convolution, "Conv"),
    **_rows(layers.read_transposed_convolution, "ConvTranspose DeformConv"),
    **_rows(layers.read_gemm, "Gemm"),
    **_rows(layers.read_matmul, "MatMul"),
    **_rows(layers.read_einsum, "Einsum"),
    **_rows(layers.read_softmax, "Softmax"),
    **_rows(layers.read_fused_attention, "Attention"),
    **_rows(layers.read_batch_norm, "BatchNormalization"),
    **_rows(layers.read_layer_norm, "LayerNormalization"),
    **_rows(layers.read_other_norm, "GroupNormalization InstanceNormalization RMSNormalization"),
    **_rows(layers.read_gather, "Gather"),
    **_rows(layers.read_recurrent, "LSTM GRU RNN"),
    **_rows(layers.read_prelu, "PRelu"),
    **_rows(elementwise.read_add, "Add Sum Mean"),
    **_rows(elementwise.read_concat, "Concat ConcatFromSequence SequenceConstruct"),
    **_rows(elementwise.read_multiply, "Mul"),
    **_rows(elementwise.read_divide, "Div"),
    **_rows(elementwise.read_power, "Pow"),
    **_rows(elementwise.read_where, "Where"),
    **_rows(elementwise.read_arithmetic, "Sub Max Min Mod BitwiseAnd BitwiseOr BitwiseXor BitShift SequenceInsert"),
    **_rows(read_scatter, "ScatterND ScatterElements Scatter TensorScatter"),
    **_rows(
        read_view, "Identity Cast CastLike Reshape Transpose Squeeze Unsqueeze Flatten Dropout Expand QuantizeLinear"
    ),
    **_rows(
        read_first,
        "Slice Split Pad Tile Resize Upsample GatherElements GatherND DepthToSpace SpaceToDepth"
        " ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare"
        " TopK CumSum CumProd Trilu GlobalMaxPool GlobalLpPool LpPool MaxUnpool"
        " SplitToSequence SequenceAt SequenceErase Compress ReverseSequence GridSample RoiAlign MaxRoiPool AffineGrid"
        " CenterCropPad Col2Im Optional OptionalGetElement RotaryEmbedding DFT STFT Det Bernoulli",
    ),
    **_rows(
        read_activation,
        "Relu LeakyRelu Elu Selu Celu Gelu Erf Sigmoid HardSigmoid HardSwish Mish Softplus Softsign Tanh Clip Swish"
        " ThresholdedRelu Exp Log Sqrt Reciprocal Neg Abs Ceil Floor Round Sign Sin Cos Tan Asin Acos Atan Sinh Cosh"
        " Asinh Acosh Atanh LogSoftmax BitwiseNot LRN LpNormalization MeanVarianceNormalization Shrink Hardmax",
    ),
    **_rows(read_constant, "Constant"),
    **_rows(read_filled, "ConstantOfShape"),
    **_rows(
        read_nothing,
        "Shape Size Range RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial EyeLike"
        " NonZero ArgMax ArgMin Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor Not IsNaN IsInf Unique OneHot"
        " NonMaxSuppression SequenceLength SequenceEmpty OptionalHasElement HannWindow HammingWindow BlackmanWindow"
        " MelWeightMatrix",
    ),
    **_rows(read_max_pool, "MaxPool"),
    **_rows(read_average_pool, "AveragePool"),
    **_rows(read_global_pool, "GlobalAveragePool ReduceMean"),
    **_rows(read_control_flow, "If Loop Scan SequenceMap"),
    **_rows(read_dequantized, "DequantizeLinear"),
    **_rows(refuse_quantised, "QLinearConv QLinearMatMul ConvInteger MatMulInteger"),
    **_rows(layers.read_convolution, "FusedConv", "com.microsoft"),
    **_rows(layers.read_gemm, "FusedGemm", "com.microsoft"),
    **_rows(layers.read_matmul, "FusedMatMul", "com.microsoft"),
    **_rows(layers.read_fused_attention, "MultiHeadAttention", "com.microsoft"),
    **_rows(read_activation, "Gelu FastGelu QuickGelu", "com.microsoft"),
    **_rows(read_bias_gelu, "BiasGelu", "com.microsoft"),
    **_rows(read_skip_norm, "SkipLayerNormalization SkipSimplifiedLayerNormalization", "com.microsoft"),
    **_rows(layers.read_other_norm, "GroupNorm SimplifiedLayerNormalization", "com.microsoft"),
    **_rows(refuse_quantised, "QGemm QAttention MatMulNBits DynamicQuantizeMatMul", "com.microsoft"),
}


def _minimum_inputs() -> dict[tuple[str, str], int]:
    """Operands that every version of a standard operator needs."""
    counts: dict[tuple[str, str], int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            counts[("", schema.name)] = min(schema.min_input, counts.get(("", schema.name), schema.min_input))
    contrib = {key: 2 if "Fused" in key[1] or "Skip" in key[1] else 1 for key in OPERATORS if key[0]}
    return {**counts, **contrib}


_MINIMUM_INPUTS = _minimum_inputs()


def read_node(context: ReadContext, node: OnnxNode) -> None:
    """Reads one node with its handler.

    Raises:
        InvalidArchitectureError: The node lacks an operand or output.
        UnsupportedArchitectureError: The node computes with something that has no meaning here.
    """
    key = (node.domain, node.op_type)
    if len(node.inputs) < _MINIMUM_INPUTS.get(key, 0) or not node.outputs:
        raise invalid(
            f"node {node.label!r} ({node.op_type}) has {len(node.inputs)} inputs and {len(node.outputs)} outputs;"
            f" expected at least {_MINIMUM_INPUTS.get(key, 0)} and 1"
        )
    OPERATORS.get(key, read_unknown)(context, node)
