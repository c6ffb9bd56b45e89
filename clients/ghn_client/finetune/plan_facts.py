"""The numbers that ``plan`` needs of a network, counted in a torch module or in an ONNX file without weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ghn_client.errors import InvalidOptionError, MissingExtraError
from ghn_client.finetune.factored import factored_modules
from ghn_client.finetune.matrix_layers import find_head, matrix_layers, norm_kind, norm_layers

#: ONNX operators of norm layers; scale and shift are inputs 1 and 2.
ONNX_NORMS = {
    "BatchNormalization": "batch_norm",
    "LayerNormalization": "layer_norm",
    "GroupNormalization": "group_norm",
    "InstanceNormalization": "instance_norm",
    "RMSNormalization": "rms_norm",
    "SimplifiedLayerNormalization": "rms_norm",
}
ONNX_MATRICES = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class NetworkFacts:
    """What ``plan`` counts.

    Attributes:
        parameters: All of them.
        norm_parameters: Scales and shifts of norm layers.
        norm_kinds: Kinds of norm layers that occur.
        bias_parameters: Biases, those of norm layers included.
        channels: Output channels of all matrix layers but the head.
        matrices: Rows and columns of every matrix layer, convolutions flattened; the head is the last.
        factored_parameters: Numbers in factored layers.
        head_inputs: Features that the head reads.
        head_outputs: Classes.
        head_parameters: Weight and bias of the head.
    """

    parameters: int
    norm_parameters: int
    norm_kinds: tuple[str, ...]
    bias_parameters: int
    channels: int
    matrices: tuple[tuple[int, int], ...]
    factored_parameters: int
    head_inputs: int
    head_outputs: int
    head_parameters: int


def facts_of_module(module: nn.Module) -> NetworkFacts:
    """Counts a torch module.

    Raises:
        UnsupportedModuleError: It has no matrix layer.
    """
    head = find_head(module)
    norms = norm_layers(module)
    layers = matrix_layers(module)
    sizes = {name: (layer.weight.shape[0], layer.weight[0].numel()) for name, layer in layers.items()}
    last = sizes.pop(head)
    return NetworkFacts(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        norm_parameters=sum(p.numel() for layer in norms.values() for p in layer.parameters(recurse=False)),
        norm_kinds=tuple(sorted({kind for layer in norms.values() if (kind := norm_kind(layer))})),
        bias_parameters=sum(value.numel() for name, value in module.named_parameters() if name.endswith("bias")),
        channels=sum(rows for rows, _ in sizes.values()),
        matrices=(*sizes.values(), last),
        factored_parameters=sum(value.numel() for _, pair in factored_modules(module) for value in pair.parameters()),
        head_inputs=last[1],
        head_outputs=last[0],
        head_parameters=sum(parameter.numel() for parameter in module.get_submodule(head).parameters()),
    )


def facts_of_onnx(path: str | Path) -> NetworkFacts:
    """Counts an ONNX file; weights may be missing, shapes are enough.

    Raises:
        MissingExtraError: ``onnx`` is not installed.
        InvalidOptionError: The file cannot be read, or has no matrix operator.
    """
    onnx = _onnx()
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf raises several unrelated classes
        raise InvalidOptionError(f"{Path(path).name} cannot be read as ONNX: {error}") from error
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in graph.input:
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if dims and all(dims) and value.name not in shapes and value is not graph.input[0]:
            shapes[value.name] = tuple(dims)
    parameters = sum(math.prod(shape) for shape in shapes.values()) - _statistics(graph, shapes)
    shapes.update(_transposed(graph, shapes))
    norms: dict[str, int] = {}
    kinds, biases = set(), dict[str, int]()
    matrices: list[tuple[int, int, int]] = []
    for node in graph.node:
        if node.op_type in ONNX_NORMS:
            affine = [name for name in node.input[1:3] if name in shapes]
            norms.update({name: math.prod(shapes[name]) for name in affine})
            biases.update({name: math.prod(shapes[name]) for name in affine[1:]})
            kinds.add(ONNX_NORMS[node.op_type])
        elif node.op_type in ONNX_MATRICES and len(node.input) > 1 and len(shapes.get(node.input[1], ())) >= 2:
            matrices.append(_matrix(node, shapes))
            biases.update({name: math.prod(shapes[name]) for name in node.input[2:3] if name in shapes})
    if not matrices:
        raise InvalidOptionError(f"{Path(path).name} has no Conv, Gemm or MatMul with a weight")
    head_rows, head_columns, head_bias = matrices[-1]
    return NetworkFacts(
        parameters=parameters,
        norm_parameters=sum(norms.values()),
        norm_kinds=tuple(sorted(kinds)),
        bias_parameters=sum(biases.values()),
        channels=sum(rows for rows, _, _ in matrices[:-1]),
        matrices=tuple((rows, columns) for rows, columns, _ in matrices),
        factored_parameters=0,
        head_inputs=head_columns,
        head_outputs=head_rows,
        head_parameters=head_rows * head_columns + head_bias,
    )


def _matrix(node: Any, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int, int]:
    """Rows (outputs), columns (inputs) and bias numbers of a matrix operator."""
    shape = shapes[node.input[1]]
    bias = math.prod(shapes.get(node.input[2], (0,))) if len(node.input) > 2 else 0
    transposed = node.op_type == "Conv" or any(a.name == "transB" and a.i == 1 for a in node.attribute)
    if transposed:
        return shape[0], math.prod(shape[1:]), bias
    return shape[-1], math.prod(shape[:-1]), bias


def _transposed(graph: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of weights that exporters transpose before they use them."""
    return {
        node.output[0]: shapes[node.input[0]][::-1]
        for node in graph.node
        if node.op_type == "Transpose" and len(shapes.get(node.input[0], ())) == 2
    }


def _statistics(graph: Any, shapes: dict[str, tuple[int, ...]]) -> int:
    """Numbers that are no parameters: running means and variances, and integer constants."""
    running = {
        name
        for node in graph.node
        if node.op_type == "BatchNormalization"
        for name in node.input[3:5]
        if name in shapes
    }
    floating = {tensor.name for tensor in graph.initializer if tensor.data_type in (1, 10, 11, 16)}
    constants = {tensor.name for tensor in graph.initializer} - floating
    return sum(math.prod(shapes[name]) for name in running | constants)


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("planning for an ONNX file needs the package onnx: pip install onnx") from error
    return onnx
