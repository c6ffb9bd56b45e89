"""Hostile and broken models: each fault gives its own typed error, before anything large is expanded or allocated."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import onnx
import pytest
from onnx import TensorProto, helper

from ghn_service.errors import (
    InvalidArchitectureError,
    LimitExceededError,
    UnsupportedArchitectureError,
)
from ghn_service.graph.onnx.reader import read_onnx
from ghn_service.graph.raw_graph import GraphLimits
from tests.graph.onnx_models import Model


def small() -> Model:
    model = Model()
    pooled = model.node("GlobalAveragePool", [model.conv("x", "layer", 4, 3)], "pooled")
    model.linear(model.node("Flatten", [pooled], "flat"), "fc", 10, 4)
    return model


def changed(change: Callable[[onnx.ModelProto], object]) -> bytes:
    proto = small().proto()
    change(proto)
    return proto.SerializeToString()


def with_function_calls(depth: int) -> bytes:
    """Functions that each call the next one twice: 2 ** depth nodes once expanded."""
    model = Model()
    value = model.conv("x", "layer", 4, 3)
    model.node("F0", [value], "y", domain="custom")
    for level in range(depth):
        body = [
            helper.make_node(f"F{level + 1}", ["a"], ["b"], domain="custom"),
            helper.make_node(f"F{level + 1}", ["b"], ["c"], domain="custom"),
        ]
        model.functions.append(_function(f"F{level}", body))
    model.functions.append(_function(f"F{depth}", [helper.make_node("Relu", ["a"], ["c"])]))
    return model.proto().SerializeToString()


def _function(name: str, body: list[onnx.NodeProto]) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("custom", 1)]
    return helper.make_function("custom", name, ["a"], ["c"], body, imports)


def recursive() -> bytes:
    model = Model()
    model.node("F", [model.conv("x", "layer", 4, 3)], "y", domain="custom")
    model.functions.append(_function("F", [helper.make_node("F", ["a"], ["c"], domain="custom")]))
    return model.proto().SerializeToString()


def field(number: int, body: bytes) -> bytes:
    """One length-delimited protobuf field."""
    size, length = len(body), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + body


def nested(depth: int) -> bytes:
    """If within If; written by hand, because protobuf refuses to build what it refuses to parse."""
    node = field(1, b"x") + field(2, b"z") + field(4, b"Relu")
    for _ in range(depth):
        attribute = field(1, b"then_branch") + field(6, field(1, node)) + b"\xa0\x01\x05"
        node = field(1, b"x") + field(2, b"z") + field(4, b"If") + field(5, attribute)
    return small().proto().SerializeToString() + field(7, field(1, node))


def with_weight(*shape: int, data_type: int = TensorProto.FLOAT) -> bytes:
    model = Model({"x": (1, 6)})
    model.node("Gemm", ["x", model.weight("w", *shape, data_type=data_type)], "y")
    return model.proto().SerializeToString()


def without_parameters() -> bytes:
    model = Model()
    model.node("Relu", ["x"], "y")
    return model.proto().SerializeToString()


def with_dynamic_weight() -> bytes:
    model = small()
    model.metadata = {"ghn.parameters": '["w"]'}
    proto = model.proto()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, ["rows", 4]))
    return proto.SerializeToString()


def with_layers_in_control_flow() -> bytes:
    body = helper.make_graph([helper.make_node("Conv", ["x", "layer.weight"], ["z"])], "body", [], [])
    return changed(lambda proto: proto.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=body)))


def densely_connected(num_layers: int) -> bytes:
    """Each layer reads all before it, joined: n * n / 2 edges."""
    model = Model()
    values = [model.conv("x", "layer0", 3, 3, size=1)]
    for index in range(1, num_layers):
        values.append(model.conv(model.node("Concat", values, f"sum{index}", axis=1), f"layer{index}", 3, 3, size=1))
    return model.proto().SerializeToString()


def with_name(name: str) -> bytes:
    return changed(lambda proto: proto.graph.initializer.append(onnx.TensorProto(name=name, dims=[2], data_type=1)))


def with_broken_name(name: bytes, *, in_function: bool = False) -> bytes:
    """A model in which the name ``name`` is no text; its length stays."""
    if not in_function:
        return small().proto().SerializeToString().replace(name, b"\xff" * len(name))
    model = Model()
    model.node("F", [model.conv("x", "layer", 4, 3)], "y", domain="custom")
    body = [helper.make_node("Relu", ["aa"], ["vv"]), helper.make_node("Relu", ["vv"], ["c"])]
    imports = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("custom", "F", ["aa"], ["c"], body, imports))
    return model.proto().SerializeToString().replace(name, b"\xff" * len(name))


def with_axes_of_a_constant(rank: int) -> bytes:
    """A Reshape by a constant whose number of elements has 62 bits for each of its axes."""
    model = small()
    target = onnx.TensorProto(dims=[2**62] * rank, data_type=TensorProto.INT64)
    model.node("Reshape", ["fc.weight", model.node("Constant", [], "target", value=target)], "y")
    return model.proto().SerializeToString()


def with_axes_of_a_stated_shape(rank: int) -> bytes:
    info = helper.make_tensor_value_info("flat", TensorProto.FLOAT, [1] * rank)
    return changed(lambda proto: proto.graph.value_info.append(info))


def with_long_window(length: int) -> bytes:
    model = Model()
    model.node("MaxPool", [model.conv("x", "layer", 4, 3)], "y", kernel_shape=[1] * length)
    return model.proto().SerializeToString()


def with_tensors_in_subgraphs(count: int, num_calls: int) -> bytes:
    """Calls of a function whose If holds ``count`` empty tensors and no node."""
    body = onnx.GraphProto(name="body", initializer=[onnx.TensorProto()] * count)
    model = Model()
    value = model.conv("x", "layer", 4, 3)
    for index in range(num_calls):
        model.node("F", [value], f"y{index}", domain="custom")
    model.functions.append(_function("F", [helper.make_node("If", ["a"], ["c"], then_branch=body)]))
    return model.proto().SerializeToString()


def with_nested_gates(count: int) -> bytes:
    """Each gate is made by the product of the one before."""
    model = Model({"x": (1, 6)})
    value = model.linear("x", "fc", 6, 6)
    for index in range(count):
        value = model.node("Mul", ["x", model.node("Sigmoid", [value], f"gate{index}")], f"y{index}")
    return model.proto().SerializeToString()


def with_uses_of_joined_weights(count: int) -> bytes:
    """``count`` operands that were each computed from sixteen weights."""
    model = Model({"x": (1, 6)})
    joined = model.node("Concat", [model.weight(f"w{index}", 6) for index in range(16)], "joined", axis=0)
    model.node("Mystery", [model.linear("x", "fc", 6, 6), *[joined] * count], "y", domain="custom")
    return model.proto().SerializeToString()


def with_long_names(length: int, num_calls: int) -> bytes:
    """Calls of a function whose node writes ten values with names of this length."""
    model = Model()
    value = model.conv("x", "layer", 4, 3)
    for index in range(num_calls):
        value = model.node("F", [value], f"y{index}", domain="custom")
    names = [f"{index}" * length for index in range(10)]
    model.functions.append(_function("F", [helper.make_node("Relu", ["a"], ["c", *names])]))
    return model.proto().SerializeToString()


def with_values(count: int) -> bytes:
    return changed(lambda proto: proto.graph.value_info.extend([onnx.ValueInfoProto()] * count))


def with_functions(count: int, num_nodes: int = 0) -> bytes:
    body = [helper.make_node("Relu", ["a"], ["c"])] * num_nodes
    return changed(lambda proto: proto.functions.extend(_function(f"F{index}", body) for index in range(count)))


def with_convolution(**attributes: list[int]) -> bytes:
    model = Model()
    model.conv("x", "layer", 4, 3, **attributes)
    return model.proto().SerializeToString()


def with_broken_attribute() -> bytes:
    name = "attribute"
    data = changed(lambda proto: proto.graph.node[0].attribute.append(helper.make_attribute(name, 1)))
    return data.replace(name.encode(), b"\xff" * len(name))


def with_quantised_kernel() -> bytes:
    model = Model()
    kernel = model.weight("kernel", 4, 3, 3, 3, data_type=TensorProto.INT8)
    real = model.node("DequantizeLinear", [kernel, model.weight("scale")], "real")
    model.node("Conv", ["x", real], "y")
    return model.proto().SerializeToString()


INVALID = {
    "no bytes": b"",
    "random bytes": bytes(range(256)) * 4,
    "truncated": small().proto().SerializeToString()[:-7],
    "no ir_version": changed(lambda proto: proto.ClearField("ir_version")),
    "no opset": changed(lambda proto: proto.ClearField("opset_import")),
    "no nodes": changed(lambda proto: proto.graph.ClearField("node")),
    "no graph": changed(lambda proto: proto.ClearField("graph")),
    "no outputs": changed(lambda proto: proto.graph.ClearField("output")),
    "nested subgraphs": nested(12),
    "nested too deeply for protobuf": nested(40),
    "recursive function": recursive(),
    "not sorted": changed(lambda proto: proto.graph.node.reverse()),
    "cycle": changed(lambda proto: proto.graph.node[0].input.__setitem__(0, "fc_out")),
    "dangling input": changed(lambda proto: proto.graph.node[0].input.__setitem__(0, "nowhere")),
    "dangling output": changed(lambda proto: proto.graph.output[0].__setattr__("name", "nowhere")),
    "duplicate output": changed(lambda proto: proto.graph.node[1].output.__setitem__(0, "layer_out")),
    "duplicate initializer": with_name("layer.weight"),
    "negative size": with_weight(6, -1),
    "empty weight": with_weight(6, 0),
    "overflowing size": with_weight(2**62, 4),
    "no parameters": without_parameters(),
    "dynamic weight": with_dynamic_weight(),
    "no groups": changed(lambda proto: proto.graph.node[0].attribute.append(helper.make_attribute("group", 0))),
    "no strides": with_convolution(strides=[1, 0]),
    "no dilations": with_convolution(dilations=[0, 0]),
    "negative pads": with_convolution(pads=[1, 1, -1, 1]),
    "large pads": with_convolution(pads=[2**63 - 1] * 4),
    "value in a function not UTF-8": with_broken_name(b"vv", in_function=True),
    "input of a function not UTF-8": with_broken_name(b"aa", in_function=True),
    "attribute not UTF-8": with_broken_attribute(),
    "value not UTF-8": with_broken_name(b"layer_out"),
    "reserved name": with_name("__metadata__"),
    "unnamed tensor": with_name(""),
    "long name": with_name("n" * 65536),
    "long name of a value": with_long_names(1025, 1),
    "name with NUL": with_name("a\0b"),
    "operands that no version takes": changed(lambda proto: proto.graph.node[0].input.extend(["x"] * 5)),
    "missing operand": changed(lambda proto: proto.graph.node[0].ClearField("input")),
    "missing output": changed(lambda proto: proto.graph.node[-1].ClearField("output")),
}
UNSUPPORTED = {
    "newer opset": changed(lambda proto: proto.opset_import[0].__setattr__("version", 999)),
    "newer ir_version": changed(lambda proto: proto.__setattr__("ir_version", 999)),
    "weights in control flow": with_layers_in_control_flow(),
    "integer weight": with_weight(6, 4, data_type=TensorProto.INT8),
    "dequantised weight": with_quantised_kernel(),
    "sparse initializer": changed(lambda proto: proto.graph.sparse_initializer.add()),
}
EXCEEDED = {
    "function bomb": (with_function_calls(40), GraphLimits()),
    "parameters in one tensor": (with_weight(6, 10**10), GraphLimits()),
    "parameters together": (small().proto().SerializeToString(), GraphLimits(max_parameters=120)),
    "nodes": (small().proto().SerializeToString(), GraphLimits(max_nodes=3)),
    "tensors": (small().proto().SerializeToString(), GraphLimits(max_tensors=2)),
    "graph nodes": (small().proto().SerializeToString(), GraphLimits(max_graph_nodes=3)),
    "edges": (small().proto().SerializeToString(), GraphLimits(max_edges=2)),
    "edges of a dense graph": (densely_connected(500), GraphLimits()),
    "axes of a weight": (with_weight(*[1] * 65), GraphLimits()),
    "axes of a constant": (with_axes_of_a_constant(65), GraphLimits()),
    "axes of a stated shape": (with_axes_of_a_stated_shape(65), GraphLimits()),
    "integers of an attribute": (with_long_window(129), GraphLimits()),
    "tensors of subgraphs": (with_tensors_in_subgraphs(1000, 100), GraphLimits(max_edges=10_000)),
    "steps through nested gates": (with_nested_gates(200), GraphLimits(max_edges=1000)),
    "uses of weights": (with_uses_of_joined_weights(40), GraphLimits(max_edges=20)),
    "names of nodes in functions": (with_long_names(1000, 10), GraphLimits(max_nodes=30)),
    "values of stated shape": (with_values(100), GraphLimits(max_nodes=20)),
    "functions": (with_functions(21), GraphLimits(max_nodes=20)),
    "nodes in functions": (with_functions(3, 7), GraphLimits(max_nodes=20)),
    "bytes once parsed": (with_values(200), GraphLimits(max_parsed_bytes=2**14)),
    "bytes": (small().proto().SerializeToString(), GraphLimits(max_bytes=100)),
}


@pytest.mark.parametrize("fault", INVALID)
def test_invalid(fault: str) -> None:
    with pytest.raises(InvalidArchitectureError) as caught:
        read_onnx(INVALID[fault])
    assert caught.value.field == "architecture.onnx_model"


@pytest.mark.parametrize("fault", UNSUPPORTED)
def test_unsupported(fault: str) -> None:
    with pytest.raises(UnsupportedArchitectureError) as caught:
        read_onnx(UNSUPPORTED[fault])
    assert caught.value.field == "architecture.onnx_model"


@pytest.mark.parametrize("fault", EXCEEDED)
def test_over_a_limit(fault: str) -> None:
    data, limits = EXCEEDED[fault]
    with pytest.raises(LimitExceededError) as caught:
        read_onnx(data, limits=limits)
    assert caught.value.field == "architecture.onnx_model"


@pytest.mark.parametrize("data", [densely_connected(400), with_function_calls(13)], ids=["edges", "functions"])
def test_reading_ends_when_nobody_wants_it(data: bytes) -> None:
    class UnwantedError(Exception):
        pass

    num_checks = 0

    def check() -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 3:
            raise UnwantedError

    with pytest.raises(UnwantedError):
        read_onnx(data, check=check)


def test_an_output_listed_often_is_one_output() -> None:
    model = Model()
    values = [model.conv("x", f"layer{index}", 3, 3) for index in range(100)]
    output = model.node("Mystery", values, "y", domain="custom")
    data = model.proto(*[output] * 2000).SerializeToString()
    tracemalloc.start()
    try:
        assert read_onnx(data).num_nodes == 101
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("domain", ["custom", "com.microsoft"])
@pytest.mark.parametrize("op_type", ["Identity", "ReduceMean", "Softmax"])
def test_what_other_domains_call_alike_is_something_else(op_type: str, domain: str) -> None:
    model = Model({"x": (1, 6)})
    other = model.node(op_type, [], "other", domain=domain)
    model.node("Softmax", [model.node("MatMul", [model.linear("x", "fc", 6, 6), other], "product")], "weights")
    centred = model.node("Sub", ["weights", other], "centred")
    variance = model.node("ReduceMean", [model.node("Pow", [centred, centred], "square")], "variance")
    model.node("Div", [centred, model.node("Sqrt", [variance], "deviation")], "y")
    assert model.read().unknown_operators == (f"{domain}::{op_type}",)


def test_a_small_function_tree_is_expanded() -> None:
    assert read_onnx(with_function_calls(6)).num_nodes == 2


def test_expansion_stops_at_the_limit_of_nodes() -> None:
    with pytest.raises(LimitExceededError, match="nodes"):
        read_onnx(with_function_calls(2000))


def test_expansion_stops_at_the_limit_of_operands() -> None:
    model = Model()
    value = model.conv("x", "layer", 4, 3)
    model.node("F", [value], "y", domain="custom")
    model.functions.append(_function("F", [helper.make_node("Sum", ["a"] * 1000, ["c"])]))
    with pytest.raises(LimitExceededError, match="operands"):
        read_onnx(model.proto().SerializeToString(), limits=GraphLimits(max_edges=100))


@pytest.mark.parametrize("location", ["weights.bin", "../secret", "/etc/passwd", "file:///etc/passwd"])
def test_external_data_is_never_opened(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def point_outside(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=location)

    data = changed(point_outside)
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("a file was opened"))
    assert read_onnx(data).num_nodes == 5


def test_integers_in_external_data_are_unknown_not_read() -> None:
    model = Model({"x": (1, 6)})
    shape = model.integers("shape", 5, 6)
    model.node("Gemm", ["x", model.node("Reshape", [model.weight("w", 5, 6), shape], "r")], "y", transB=1)
    proto = model.proto()
    for tensor in proto.graph.initializer:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="/etc/passwd")
    assert read_onnx(proto.SerializeToString()).num_nodes == 2


def test_unicode_names_survive() -> None:
    model = Model({"x": (1, 6)})
    model.linear("x", "层/ü.☃", 3, 6)
    assert [spec.name for spec in model.read().parameters()] == ["层/ü.☃.weight", "层/ü.☃.bias"]


def test_text_that_is_not_utf8_is_refused() -> None:
    data = small().proto().SerializeToString().replace(b"layer_out", b"layer\xff\xfeut")
    with pytest.raises(InvalidArchitectureError):
        read_onnx(data)
