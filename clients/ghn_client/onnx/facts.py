"""What ``ghn_client.finetune.plan`` counts, of an ONNX file: shapes are enough, weights may be missing."""

from __future__ import annotations

import math
from pathlib import Path

from ghn_client.errors import InvalidArchitectureError, UnsupportedModuleError
from ghn_client.finetune.planner import NetworkFacts
from ghn_client.onnx.edit import TORCH_DTYPES, parse_onnx

#: Operators of norm layers; scale and shift are inputs 1 and 2.
NORMS = {
    "BatchNormalization": "batch_norm",
    "LayerNormalization": "layer_norm",
    "GroupNormalization": "group_norm",
    "InstanceNormalization": "instance_norm",
    "RMSNormalization": "rms_norm",
    "SimplifiedLayerNormalization": "rms_norm",
}
MATRICES = ("Conv", "Gemm", "MatMul")


def facts_of_onnx(path: str | Path) -> NetworkFacts:
    """Counts an ONNX file.

    Raises:
        InvalidArchitectureError: The file cannot be read as ONNX.
        UnsupportedModuleError: It has no matrix operator with a weight.
    """
    try:
        graph = parse_onnx(Path(path).read_bytes()).graph
    except OSError as error:
        raise InvalidArchitectureError(f"cannot read the model {str(path)!r}: {error.strerror}") from error
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in graph.input[1:]:  # weights that a file without them declares
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if dims and all(dims):
            shapes.setdefault(value.name, tuple(dims))
    floating = {number for number, dtype in TORCH_DTYPES.items() if dtype.is_floating_point}
    no_parameters = {tensor.name for tensor in graph.initializer if tensor.data_type not in floating}
    no_parameters |= {name for node in graph.node if node.op_type == "BatchNormalization" for name in node.input[3:5]}
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    for node in graph.node:
        if node.op_type == "Transpose" and len(shapes.get(node.input[0], ())) == 2:
            shapes[node.output[0]] = shapes[node.input[0]][::-1]
    norms, biases, kinds = set[str](), set[str](), set[str]()
    matrices, head_bias = list[tuple[int, int]](), 0  # outputs and inputs of each
    for node in graph.node:
        if node.op_type in NORMS:
            norms |= {name for name in node.input[1:3] if name in counts}
            biases |= {name for name in node.input[2:3] if name in counts}
            kinds.add(NORMS[node.op_type])
        elif node.op_type in MATRICES and len(node.input) > 1 and len(shapes.get(node.input[1], ())) >= 2:
            shape = shapes[node.input[1]]
            outputs_first = node.op_type == "Conv" or any(a.name == "transB" and a.i == 1 for a in node.attribute)
            matrices.append((shape[0], math.prod(shape[1:])) if outputs_first else (shape[-1], math.prod(shape[:-1])))
            biases |= {name for name in node.input[2:3] if name in counts}
            head_bias = sum(counts.get(name, 0) for name in node.input[2:3])
    if not matrices:
        raise UnsupportedModuleError(f"{Path(path).name} has no Conv, Gemm or MatMul with a weight")
    head_rows, head_columns = matrices[-1]
    return NetworkFacts(
        parameters=sum(count for name, count in counts.items() if name not in no_parameters),
        norm_parameters=sum(counts[name] for name in norms),
        norm_kinds=tuple(sorted(kinds)),
        bias_parameters=sum(counts[name] for name in biases),
        matrices=tuple(matrices),
        factored_parameters=0,
        head_inputs=head_columns,
        head_outputs=head_rows,
        head_parameters=head_rows * head_columns + head_bias,
    )
