"""ONNX models of a few nodes, without weights, as a client sends them."""

from __future__ import annotations

import itertools

import onnx
from onnx import TensorProto, helper


def linear_model(*sizes: int, name: str = "layers") -> bytes:
    """Linear layers with ReLUs in between; weights (out, in) and biases are typed inputs."""
    nodes, inputs = [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, sizes[0]])]
    value = "x"
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        weight, bias = f"{name}.{index}.weight", f"{name}.{index}.bias"
        inputs.append(helper.make_tensor_value_info(weight, TensorProto.FLOAT, [fan_out, fan_in]))
        inputs.append(helper.make_tensor_value_info(bias, TensorProto.FLOAT, [fan_out]))
        nodes.append(helper.make_node("Gemm", [value, weight, bias], [f"h{index}"], name=f"fc{index}", transB=1))
        value = f"h{index}"
        if index < len(sizes) - 2:
            nodes.append(helper.make_node("Relu", [value], [f"a{index}"], name=f"relu{index}"))
            value = f"a{index}"
    outputs = [helper.make_tensor_value_info(value, TensorProto.FLOAT, [1, sizes[-1]])]
    graph = helper.make_graph(nodes, "small", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def model_with_operator(op_type: str, domain: str) -> bytes:
    """A linear layer, then one node of this type."""
    model = onnx.load_model_from_string(linear_model(4, 3))
    node = helper.make_node(op_type, [model.graph.output[0].name], ["odd"], name="odd", domain=domain)
    model.graph.node.append(node)
    model.graph.output[0].name = "odd"
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    serialized: bytes = model.SerializeToString()
    return serialized


TINY = linear_model(6, 5, 4, 3)
"""78 scalars in six tensors."""
LARGE = linear_model(2048, 4096, 1024)
"""48 MiB of weights in float32: more than gRPC buffers on its way."""
