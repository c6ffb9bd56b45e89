"""Rewrites an ONNX model so that it computes with factors: one layer becomes two thinner ones.

``Conv`` becomes a convolution to r channels and a 1 x 1 convolution; ``Gemm`` and ``MatMul`` become two of themselves.
Where a weight is read by anything else, the product is computed inside the model, and nothing but size is saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import torch
from onnx import helper

from ghn_client.factors import FACTOR_IN, FACTOR_OUT, FactorPair
from ghn_client.onnx.edit import FIRST_IR_VERSION_WITHOUT_INPUTS, TORCH_DTYPES, copied, graphs, tensor_proto

_FIRST_OPSET_OF_GEMM_WITHOUT_BIAS = 11


def factorize_onnx(
    model: onnx.ModelProto, pairs: Mapping[str, FactorPair], *, permutations: Mapping[str, Sequence[int]] | None = None
) -> onnx.ModelProto:
    """A copy of a model whose weights named in ``pairs`` are replaced by their factors.

    Args:
        model: A model whose weights are initializers (with or without data) or graph inputs.
        pairs: Factors by name of the weight in the file; names that the file does not have are left out.
        permutations: For weights stored in another layout than torch's, which stored axis each of torch's axes is
            (``permutation`` of the low-rank metadata); needed only where the file reads them in an unusual way.

    Returns:
        The rewritten model; all other values are as they were.
    """
    result = copied(model)
    graph = result.graph
    for name, pair in pairs.items():
        stored = [(item.data_type, list(item.dims)) for item in graph.initializer if item.name == name]
        for info in [item.type.tensor_type for item in graph.input if item.name == name]:
            stored.append((info.elem_type, [axis.dim_value for axis in info.shape.dim]))
        if not stored:
            continue
        data_type, shape = stored[0]
        dtype = TORCH_DTYPES.get(data_type, pair.factor_in.dtype)
        pair = FactorPair(pair.factor_in.to(dtype), pair.factor_out.to(dtype))
        if not _split_layers(graph, name, pair):
            _insert_product(graph, name, pair, shape, tuple((permutations or {}).get(name, ())))
        for items in (graph.initializer, graph.input, graph.value_info):
            for item in [item for item in items if item.name == name]:
                items.remove(item)  # type: ignore[arg-type]
    _follow_old_rules(result)
    return result


def _follow_old_rules(model: onnx.ModelProto) -> None:
    """What files of older versions must have: a bias for each Gemm, and every initializer among the inputs."""
    graph = model.graph
    opset = max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0)
    if opset < _FIRST_OPSET_OF_GEMM_WITHOUT_BIAS:
        for node in [item for item in graph.node if item.op_type == "Gemm" and len(item.input) == 2]:
            factor = next(item for item in graph.initializer if item.name == node.input[1])
            node.input.append(f"{factor.name}.bias")
            _add_tensor(graph, node.input[2], torch.zeros(factor.dims[0], dtype=TORCH_DTYPES[factor.data_type]))
    if model.ir_version < FIRST_IR_VERSION_WITHOUT_INPUTS:
        known = {item.name for item in graph.input}
        for item in [item for item in graph.initializer if item.name not in known]:
            graph.input.append(helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)))


def _split_layers(graph: onnx.GraphProto, name: str, pair: FactorPair) -> bool:
    """Replaces every layer that reads the weight; False, and nothing done, if one of them is no plain layer."""
    readers = _readers(graph, name)
    transposes = [node for node in readers if node.op_type == "Transpose" and _attributes(node).get("perm") == [1, 0]]
    layers = [(node, name) for node in readers if node not in transposes]
    layers += [(node, item.output[0]) for item in transposes for node in _readers(graph, item.output[0])]
    shown = {name, *(node.output[0] for node in transposes)}
    in_subgraphs = {item for inner in list(graphs(graph))[1:] for node in inner.node for item in node.input}
    if not layers or shown & in_subgraphs or name in {item.name for item in graph.output}:
        return False
    if not all(_is_plain_layer(node, weight) for node, weight in layers):
        return False
    for node, _ in layers:
        _split(graph, node, name, pair)
    for node in transposes:
        graph.node.remove(node)
    return True


def _readers(graph: onnx.GraphProto, name: str) -> list[onnx.NodeProto]:
    return [node for node in graph.node if name in node.input]


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _is_plain_layer(node: onnx.NodeProto, weight: str) -> bool:
    attributes, inputs = _attributes(node), list(node.input)
    if inputs.count(weight) != 1 or inputs.index(weight) != 1:
        return False
    if node.op_type == "Conv":
        return attributes.get("group", 1) == 1
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes.get("transA"))


def _split(graph: onnx.GraphProto, node: onnx.NodeProto, name: str, pair: FactorPair) -> None:
    """Puts two nodes in the place of one."""
    first, second = onnx.NodeProto(), onnx.NodeProto()
    first.CopyFrom(node)
    second.CopyFrom(node)
    base, middle = node.name or node.output[0], f"{node.output[0]}.low_rank"
    first.name, second.name = base + FACTOR_IN, base + FACTOR_OUT
    names, factors = [name + FACTOR_IN, name + FACTOR_OUT], [pair.factor_in, pair.factor_out]
    if node.op_type == "MatMul":
        names = [f"{item}.transposed" for item in names]
        factors = [factor.flatten(1).mT for factor in factors]
    elif node.op_type == "Gemm":
        factors = [factor.flatten(1) for factor in factors]
        _set_attributes(first, {"transB": 1}, drop={"alpha", "beta"})
        _set_attributes(second, {"transB": 1})
    else:
        kernel_shape = [1] * (pair.factor_in.dim() - 2)
        _set_attributes(second, {"kernel_shape": kernel_shape}, drop={"strides", "pads", "dilations", "auto_pad"})
    del first.input[2:]
    first.input[1], first.output[0] = names[0], middle
    second.input[0], second.input[1] = middle, names[1]
    place = list(graph.node).index(node)
    graph.node.remove(node)
    graph.node.insert(place, second)
    graph.node.insert(place, first)
    for factor_name, factor in zip(names, factors, strict=True):
        _add_tensor(graph, factor_name, factor)


def _set_attributes(node: onnx.NodeProto, values: Mapping[str, object], *, drop: set[str] | None = None) -> None:
    for item in [item for item in node.attribute if item.name in values or item.name in (drop or set())]:
        node.attribute.remove(item)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in values.items())


def _insert_product(
    graph: onnx.GraphProto, name: str, pair: FactorPair, stored: list[int], permutation: tuple[int, ...]
) -> None:
    """Computes the weight from its factors at the start of the graph, under the weight's own name."""
    shape = [pair.factor_out.shape[0], *pair.factor_in.shape[1:]]
    _add_tensor(graph, name + FACTOR_OUT, pair.factor_out.flatten(1))
    _add_tensor(graph, name + FACTOR_IN, pair.factor_in.flatten(1))
    if not permutation and stored != shape and stored == shape[::-1]:
        permutation = (1, 0)
    nodes = [helper.make_node("MatMul", [name + FACTOR_OUT, name + FACTOR_IN], [f"{name}.product"])]
    if len(shape) > 2:
        _add_tensor(graph, f"{name}.shape", torch.tensor(shape))
        nodes.append(helper.make_node("Reshape", [nodes[-1].output[0], f"{name}.shape"], [f"{name}.reshaped"]))
    if permutation:
        inverse = [permutation.index(axis) for axis in range(len(permutation))]
        nodes.append(helper.make_node("Transpose", [nodes[-1].output[0]], [f"{name}.transposed"], perm=inverse))
    nodes[-1].output[0] = name
    for node in reversed(nodes):
        graph.node.insert(0, node)


def _add_tensor(graph: onnx.GraphProto, name: str, tensor: torch.Tensor) -> None:
    if all(item.name != name for item in graph.initializer):
        graph.initializer.append(tensor_proto(name, tensor))
