"""The operator table: which handler reads which ONNX operator.

To support one more operator, add a line here; an operator without one lets data through as if it were element-wise,
and is listed in the graph's ``unknown_operators``.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx

from ghn_service.errors import UnsupportedArchitectureError
from ghn_service.graph.onnx import elementwise, layers, plain
from ghn_service.graph.onnx.file import FLOAT_TYPES, MICROSOFT, OnnxNode, subgraphs
from ghn_service.graph.onnx.patterns import WEIGHT_SLOTS
from ghn_service.graph.onnx.values import ReadContext, Value

Handler = Callable[[ReadContext, OnnxNode, list[Value]], Value]
"""The value of a node's outputs, from the values of its inputs."""


def _read_bias_gelu(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """BiasGelu of ONNX Runtime: a bias, then an activation."""
    value = elementwise.read_add(context, node, data)
    context.graph.note_activation(value.flow, context.level, "gelu")
    return value


def _read_scatter(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Scatter operators: data of the first and last operand."""
    return elementwise.combine(context, node, [data[0], *data[2:3]], "zeros")


def _read_control_flow(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
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
                raise UnsupportedArchitectureError(
                    f"node {node.label!r} ({node.op_type}) has {what} inside a subgraph; export the network without"
                    " data-dependent control flow"
                )
            for item in body.node:
                waiting.extend(subgraphs(item))
    return elementwise.combine(context, node, data, "zeros")


def _read_dequantized(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """DequantizeLinear: passes what QuantizeLinear took; a weight stored as integers is refused."""
    is_stored = node.inputs[0] in context.file.initializers
    return _refuse_quantised(context, node, data) if is_stored else plain.read_view(context, node, data)


def _refuse_quantised(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """Operators on integer weights.

    Raises:
        UnsupportedArchitectureError: Always.
    """
    raise UnsupportedArchitectureError(
        f"node {node.label!r} ({node.op_type}) computes with integer weights; export the network before quantising it"
    )


def read_unknown(context: ReadContext, node: OnnxNode, data: list[Value]) -> Value:
    """An operator without a handler: data of all operands passes, weights get a fallback by their rank."""
    name = f"{MICROSOFT}::{node.op_type}" if node.domain == MICROSOFT else node.op_type
    context.unknown_operators[name] = context.unknown_operators.get(name, 0) + 1
    if any(value.flow for value in data):
        for index, value in enumerate(data):
            for view in value.views:
                if context.is_trainable(view.source) and not value.flow:
                    context.use(node, index, view, "zeros" if view.source.is_vector else "kaiming_normal")
    return context.joined(data)


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
    **_rows(plain.read_prelu, "PRelu"),
    **_rows(elementwise.read_add, "Add Sum Mean"),
    **_rows(elementwise.read_concat, "Concat ConcatFromSequence SequenceConstruct"),
    **_rows(elementwise.read_multiply, "Mul"),
    **_rows(elementwise.read_divide, "Div Pow"),
    **_rows(elementwise.read_where, "Where"),
    **_rows(elementwise.read_arithmetic, "Sub Max Min Mod BitwiseAnd BitwiseOr BitwiseXor BitShift SequenceInsert"),
    **_rows(_read_scatter, "ScatterND ScatterElements Scatter TensorScatter"),
    **_rows(
        plain.read_view,
        "Identity Cast CastLike Reshape Transpose Squeeze Unsqueeze Flatten Dropout Expand QuantizeLinear",
    ),
    **_rows(
        plain.read_first,
        "Slice Split Pad Tile Resize Upsample GatherElements GatherND DepthToSpace SpaceToDepth"
        " ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare"
        " TopK CumSum CumProd Trilu GlobalMaxPool GlobalLpPool LpPool MaxUnpool"
        " SplitToSequence SequenceAt SequenceErase Compress ReverseSequence GridSample RoiAlign MaxRoiPool AffineGrid"
        " CenterCropPad Col2Im Optional OptionalGetElement RotaryEmbedding DFT STFT Det Bernoulli",
    ),
    **_rows(
        plain.read_activation,
        "Relu LeakyRelu Elu Selu Celu Gelu Erf Sigmoid HardSigmoid HardSwish Mish Softplus Softsign Tanh Clip Swish"
        " ThresholdedRelu Exp Log Sqrt Reciprocal Neg Abs Ceil Floor Round Sign Sin Cos Tan Asin Acos Atan Sinh Cosh"
        " Asinh Acosh Atanh LogSoftmax BitwiseNot LRN LpNormalization MeanVarianceNormalization Shrink Hardmax",
    ),
    **_rows(plain.read_constant, "Constant"),
    **_rows(plain.read_filled, "ConstantOfShape"),
    **_rows(
        plain.read_nothing,
        "Shape Size Range RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial EyeLike"
        " NonZero ArgMax ArgMin Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor Not IsNaN IsInf Unique OneHot"
        " NonMaxSuppression SequenceLength SequenceEmpty OptionalHasElement HannWindow HammingWindow BlackmanWindow"
        " MelWeightMatrix",
    ),
    **_rows(plain.read_window_pool, "MaxPool AveragePool"),
    **_rows(plain.read_global_pool, "GlobalAveragePool ReduceMean"),
    **_rows(_read_control_flow, "If Loop Scan SequenceMap"),
    **_rows(_read_dequantized, "DequantizeLinear"),
    **_rows(_refuse_quantised, "QLinearConv QLinearMatMul ConvInteger MatMulInteger"),
    **_rows(layers.read_convolution, "FusedConv", MICROSOFT),
    **_rows(layers.read_gemm, "FusedGemm", MICROSOFT),
    **_rows(layers.read_matmul, "FusedMatMul", MICROSOFT),
    **_rows(layers.read_fused_attention, "MultiHeadAttention", MICROSOFT),
    **_rows(plain.read_activation, "Gelu FastGelu QuickGelu", MICROSOFT),
    **_rows(_read_bias_gelu, "BiasGelu", MICROSOFT),
    **_rows(layers.read_skip_norm, "SkipLayerNormalization SkipSimplifiedLayerNormalization", MICROSOFT),
    **_rows(layers.read_other_norm, "GroupNorm SimplifiedLayerNormalization", MICROSOFT),
    **_rows(_refuse_quantised, "QGemm QAttention MatMulNBits DynamicQuantizeMatMul", MICROSOFT),
}


def _input_counts() -> dict[tuple[str, str], tuple[int, int]]:
    counts = {key: (2 if "Fused" in key[1] or "Skip" in key[1] else 1, ANY_NUMBER) for key in OPERATORS if key[0]}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            fewest, most = counts.get(("", schema.name), (ANY_NUMBER, 0))
            counts["", schema.name] = min(schema.min_input, fewest), max(schema.max_input, most)
    return counts


ANY_NUMBER = 2**31 - 1
INPUT_COUNTS = _input_counts()
"""The fewest operands that any version of an operator needs, and the most that any takes."""
