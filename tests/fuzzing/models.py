"""Random ONNX models that are almost networks, and the ways in which strangers spoil them.

Every choice is drawn from a ``random.Random``: hypothesis hands in one whose choices it can shrink, atheris one that is
seeded. A model is a small network with branches, norms, attention, functions and subgraphs; ``MUTATIONS`` holds one
kind of damage each, most of which leave a well-formed protobuf message.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import onnx
from onnx import AttributeProto, TensorProto, helper

from ghn_service.graph.onnx.operators import OPERATORS
from tests.graph.onnx_models import Model

Mutation = Callable[[onnx.ModelProto, Random], object]

SCHEMAS = sorted({schema.name for schema in onnx.defs.get_all_schemas()})
HANDLED = sorted(OPERATORS)
SIZES = (-(2**63), -1, 0, 1, 2, 3, 7, 64, 2**31, 2**40, 2**62, 2**63 - 1)
TEXTS = ("", "x", "layer0.weight", "y", "é☃層", "a\0b", "\x1b[31m", "../..", "__metadata__", "n" * 2000, "\n", "%s{}")
ATTRIBUTES = ("group", "strides", "kernel_shape", "pads", "axis", "perm", "transB", "equation", "num_heads", "to")
JSON_TEXTS = ("", "[]", "{}", "[1]", '["x"]', '["layer0.weight", "layer0.weight"]', "[" * 5000, '"', "null", "1e999")
KEYS = (
    "ghn.parameters",
    "ghn.buffers",
    "ghn.contents",
    "ghn.folded",
    "pkg.torch.onnx.original_node_name",
    "pkg.torch.export.graph_signature.InputSpec.kind",
    "pkg.torch.onnx.class_hierarchy",
    "pkg.torch.onnx.name_scopes",
    "namespace",
)
CHANNELS = 6


# ---- networks that could run ----------------------------------------------------------------------------------------


def build_network(random: Random) -> onnx.ModelProto:
    """A network of a few layers; every value but the last ones has shape (1, CHANNELS, 8, 8)."""
    model = Model({"x": (1, CHANNELS, 8, 8)}, producer=random.choice(("", "pytorch")))
    values = ["x"]
    for index in range(random.randint(1, 8)):
        layer = random.choice(LAYERS)
        values.append(layer(model, random, values, f"layer{index}"))
    flat = model.node("Flatten", [model.node("GlobalAveragePool", [values[-1]], "pooled")], "flat")
    model.linear(flat, "head", 4, CHANNELS)
    return model.proto()


def _convolution(model: Model, random: Random, values: list[str], name: str) -> str:
    groups = random.choice((1, 2, CHANNELS))
    return model.conv(
        random.choice(values), name, CHANNELS, CHANNELS // groups, group=groups, bias=random.random() < 0.5
    )


def _norm(model: Model, random: Random, values: list[str], name: str) -> str:
    op_type, count = random.choice((("BatchNormalization", 4), ("InstanceNormalization", 2), ("GroupNormalization", 2)))
    weights = [model.weight(f"{name}.{part}", CHANNELS) for part in ("weight", "bias", "mean", "var")[:count]]
    more = {"num_groups": 2} if op_type == "GroupNormalization" else {}
    return model.node(op_type, [random.choice(values), *weights], f"{name}_out", **more)


def _activation(model: Model, random: Random, values: list[str], name: str) -> str:
    return model.node(random.choice(("Relu", "Sigmoid", "Softmax", "HardSwish")), [random.choice(values)], name)


def _meeting(model: Model, random: Random, values: list[str], name: str) -> str:
    return model.node(
        random.choice(("Add", "Mul", "Sum", "Max", "Concat")), [random.choice(values) for _ in range(2)], name
    )


def _attention(model: Model, random: Random, values: list[str], name: str) -> str:
    value = random.choice(values)
    query, key, out = (
        model.node("MatMul", [value, model.weight(f"{name}.{part}", 8, 8)], f"{name}_{part}") for part in "qkv"
    )
    scores = model.node("MatMul", [query, model.node("Transpose", [key], f"{name}_t", perm=[0, 1, 3, 2])], f"{name}_s")
    return model.node("MatMul", [model.node("Softmax", [scores], f"{name}_p"), out], f"{name}_out")


def _function(model: Model, random: Random, values: list[str], name: str) -> str:
    body = [
        helper.make_node("Conv", ["a", "w"], ["b"], name="inner"),
        random.choice((helper.make_node("Relu", ["b"], ["c"]), helper.make_node("Add", ["b", "b"], ["c"]))),
    ]
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("custom", 1)]
    model.functions.append(helper.make_function("custom", name, ["a", "w"], ["c"], body, imports, ["group"]))
    weight = model.weight(f"{name}.weight", CHANNELS, CHANNELS, 1, 1)
    return model.node(name, [random.choice(values), weight], f"{name}_out", domain="custom", group=1)


def _choice(model: Model, random: Random, values: list[str], name: str) -> str:
    """An If whose branches read a value from outside."""
    branches = {
        branch: helper.make_graph(
            [helper.make_node("Relu", [random.choice(values)], ["z"])],
            branch,
            [],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        )
        for branch in ("then_branch", "else_branch")
    }
    return model.node("If", [random.choice(values)], f"{name}_out", **branches)


def _reshaped_weight(model: Model, random: Random, values: list[str], name: str) -> str:
    weight = model.node(
        "Reshape", [model.weight(f"{name}.weight", CHANNELS * 3), model.integers(f"{name}_shape", 3, CHANNELS)], name
    )
    return model.node(random.choice(("Add", "Mul", "MatMul")), [random.choice(values), weight], f"{name}_out")


LAYERS = (_convolution, _norm, _activation, _meeting, _attention, _function, _choice, _reshaped_weight)


# ---- damage ---------------------------------------------------------------------------------------------------------


def _random_node(proto: onnx.ModelProto, random: Random) -> onnx.NodeProto:
    """Any node: of the graph, of a function or of a subgraph."""
    bodies: list[onnx.GraphProto | onnx.FunctionProto] = [proto.graph, *proto.functions]
    body = random.choice([item for item in bodies if item.node] or [proto.graph])
    node = random.choice(body.node) if body.node else body.node.add(op_type="Relu")
    inner = [item.g for item in node.attribute if item.type == AttributeProto.GRAPH and item.g.node]
    return random.choice(random.choice(inner).node) if inner and random.random() < 0.5 else node


def _random_tensor(proto: onnx.ModelProto, random: Random) -> onnx.TensorProto:
    tensors = proto.graph.initializer
    return random.choice(tensors) if tensors else tensors.add(name="added", dims=[2, 2], data_type=1)


def _some_name(proto: onnx.ModelProto, random: Random) -> str:
    names = [item.name for item in (*proto.graph.initializer, *proto.graph.input)]
    names += [name for node in proto.graph.node for name in node.output]
    return random.choice((*names, *TEXTS))


def _remove_node(proto: onnx.ModelProto, random: Random) -> None:
    if proto.graph.node:
        proto.graph.node.pop(random.randrange(len(proto.graph.node)))


def _copy_node(proto: onnx.ModelProto, random: Random) -> None:
    """The same outputs are written twice."""
    proto.graph.node.add().CopyFrom(_random_node(proto, random))


def _swap_nodes(proto: onnx.ModelProto, random: Random) -> None:
    first, second = _random_node(proto, random), _random_node(proto, random)
    copies = onnx.NodeProto.FromString(first.SerializeToString()), onnx.NodeProto.FromString(second.SerializeToString())
    second.CopyFrom(copies[0])  # copies, because one may lie within the other
    first.CopyFrom(copies[1])


def _change_operator(proto: onnx.ModelProto, random: Random) -> None:
    node = _random_node(proto, random)
    node.domain, node.op_type = random.choice((*HANDLED, *(("", name) for name in SCHEMAS), ("custom", "layer0")))


def _rewire(proto: onnx.ModelProto, random: Random) -> None:
    """A cycle, a dangling name, or another weight."""
    node, name = _random_node(proto, random), _some_name(proto, random)
    if node.input and random.random() < 0.8:
        node.input[random.randrange(len(node.input))] = name
    else:
        node.input.append(name)


def _shorten_operands(proto: onnx.ModelProto, random: Random) -> None:
    operands = random.choice((lambda node: node.input, lambda node: node.output))(_random_node(proto, random))
    del operands[random.randrange(len(operands) + 1) :]


def _repeat_operands(proto: onnx.ModelProto, random: Random) -> None:
    node = _random_node(proto, random)
    node.input.extend([random.choice(node.input) if node.input else "x"] * random.choice((1, 2, 300)))


def _rename_output(proto: onnx.ModelProto, random: Random) -> None:
    node = _random_node(proto, random)
    if node.output:
        node.output[random.randrange(len(node.output))] = _some_name(proto, random)


def _change_attribute(proto: onnx.ModelProto, random: Random) -> None:
    """Another value, or another type under the same name."""
    node = _random_node(proto, random)
    names = [item.name for item in node.attribute]
    name = random.choice((*names, *ATTRIBUTES))
    for item in [item for item in node.attribute if item.name == name][: random.randint(0, 1)]:
        node.attribute.remove(item)
    value = random.choice(
        (
            random.choice(SIZES),
            [random.choice(SIZES) for _ in range(random.randint(1, 5))],
            random.choice((0.5, -1.0, float("nan"), float("inf"))),
            random.choice(TEXTS),
            b"\xff\xfe",
            [random.choice(TEXTS)],
            TensorProto(dims=[random.choice(SIZES)], data_type=7, raw_data=b"12345678"),
        )
    )
    node.attribute.append(helper.make_attribute(name, value))


def _contradict_attribute(proto: onnx.ModelProto, random: Random) -> None:
    """The type that an attribute claims is not that of its value."""
    node = _random_node(proto, random)
    if node.attribute:
        random.choice(node.attribute).type = random.choice(AttributeProto.AttributeType.values())


def _refer_attribute(proto: onnx.ModelProto, random: Random) -> None:
    node = _random_node(proto, random)
    node.attribute.add(name=random.choice(ATTRIBUTES), ref_attr_name=random.choice(("group", "", "nothing")), type=2)


def _change_shape(proto: onnx.ModelProto, random: Random) -> None:
    tensor = _random_tensor(proto, random)
    tensor.dims[:] = [random.choice(SIZES) for _ in range(random.choice((0, 1, 2, 3, 4, 5, 40)))]


def _change_type(proto: onnx.ModelProto, random: Random) -> None:
    _random_tensor(proto, random).data_type = random.choice((0, 2, 3, 6, 7, 9, 10, 11, 14, 16, 17, 23, 99))


def _rename_tensor(proto: onnx.ModelProto, random: Random) -> None:
    _random_tensor(proto, random).name = _some_name(proto, random)


def _externalize(proto: onnx.ModelProto, random: Random) -> None:
    tensor = _random_tensor(proto, random)
    tensor.data_location = TensorProto.EXTERNAL
    location = random.choice(("/dev/zero", "../secret", "file:///etc/passwd", "weights.bin", ""))
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value=str(random.choice(SIZES)))


def _fill_tensor(proto: onnx.ModelProto, random: Random) -> None:
    _random_tensor(proto, random).raw_data = bytes(random.choice((0, 1, 8, 512)))


def _unfix_input(proto: onnx.ModelProto, random: Random) -> None:
    """An initializer becomes an input, with or without a fixed shape."""
    tensor = _random_tensor(proto, random)
    shape = random.choice((None, list(tensor.dims), [None, 3], ["n", "n"], [random.choice(SIZES)]))
    try:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, shape))
    except ValueError:
        return
    if random.random() < 0.7:
        proto.graph.initializer.remove(tensor)


def _annotate_value(proto: onnx.ModelProto, random: Random) -> None:
    info = helper.make_tensor_value_info(
        _some_name(proto, random), TensorProto.FLOAT, [random.choice(SIZES) for _ in range(random.randint(0, 5))]
    )
    info.metadata_props.add(key=random.choice(KEYS), value=random.choice((*JSON_TEXTS, *TEXTS, "PARAMETER", "BUFFER")))
    random.choice((proto.graph.value_info, proto.graph.input, proto.graph.output)).append(info)


def _annotate(proto: onnx.ModelProto, random: Random) -> None:
    target = random.choice((proto, _random_node(proto, random)))
    target.metadata_props.add(key=random.choice(KEYS), value=random.choice((*JSON_TEXTS, *TEXTS)))


def _nest(proto: onnx.ModelProto, random: Random) -> None:
    """Subgraphs within subgraphs around the first node's operator."""
    inner = helper.make_node(random.choice(("Relu", "Conv", "Loop")), [_some_name(proto, random)], ["deep"])
    for _ in range(random.choice((1, 5, 7, 8, 9, 20))):
        body = helper.make_graph([inner], "body", [], [helper.make_tensor_value_info("deep", 1, None)])
        inner = helper.make_node("If", [_some_name(proto, random)], ["deep"], then_branch=body)
    proto.graph.node.append(inner)


def _call(proto: onnx.ModelProto, random: Random) -> None:
    """One more call of a function, maybe from within one."""
    if proto.functions:
        name = random.choice(proto.functions).name
        body = random.choice((proto.graph, *proto.functions))
        outputs = random.choice((["called"], [], ["c"], ["called", "twice"]))
        body.node.append(helper.make_node(name, [_some_name(proto, random), "x"], outputs, domain="custom"))


def _change_signature(proto: onnx.ModelProto, random: Random) -> None:
    if proto.functions:
        function = random.choice(proto.functions)
        names = random.choice((function.input, function.output))
        names[:] = [random.choice((*TEXTS, "a", "c")) for _ in range(random.randint(0, 4))]


def _copy_function(proto: onnx.ModelProto, random: Random) -> None:
    if proto.functions:
        proto.functions.add().CopyFrom(random.choice(proto.functions))


def _change_versions(proto: onnx.ModelProto, random: Random) -> None:
    if random.random() < 0.5:
        proto.ir_version = random.choice((-1, 0, 1, 3, 999))
    else:
        proto.opset_import.add(domain=random.choice(("", "ai.onnx", "custom")), version=random.choice(SIZES))


def _change_outputs(proto: onnx.ModelProto, random: Random) -> None:
    if proto.graph.output and random.random() < 0.5:
        proto.graph.output[0].name = _some_name(proto, random)
    else:
        proto.graph.output.add(name=_some_name(proto, random))


def _add_odd_parts(proto: onnx.ModelProto, random: Random) -> None:
    """Parts of the format that hardly anybody uses."""
    random.choice(
        (
            proto.graph.sparse_initializer.add,
            proto.graph.quantization_annotation.add,
            proto.training_info.add,
            lambda: proto.graph.input.add(name="sequence").type.sequence_type.elem_type.tensor_type.SetInParent(),
            lambda: proto.graph.initializer.add().segment.SetInParent(),
        )
    )()


MUTATIONS: tuple[Mutation, ...] = (
    _remove_node,
    _copy_node,
    _swap_nodes,
    _change_operator,
    _rewire,
    _shorten_operands,
    _repeat_operands,
    _rename_output,
    _change_attribute,
    _contradict_attribute,
    _refer_attribute,
    _change_shape,
    _change_type,
    _rename_tensor,
    _externalize,
    _fill_tensor,
    _unfix_input,
    _annotate_value,
    _annotate,
    _nest,
    _call,
    _change_signature,
    _copy_function,
    _change_versions,
    _change_outputs,
    _add_odd_parts,
)


def mutate(proto: onnx.ModelProto, random: Random, count: int) -> None:
    """Damages a model in ``count`` ways."""
    for _ in range(count):
        random.choice(MUTATIONS)(proto, random)


def spoil_text(data: bytes, random: Random) -> bytes:
    """A serialised model with some text that is no longer UTF-8; the message stays well-formed."""
    proto = onnx.ModelProto.FromString(data)
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    names = {name for node in nodes for name in (*node.input, *node.output, node.name, node.op_type)}
    names |= {item.name for item in (*proto.graph.initializer, *proto.graph.input, *proto.functions)}
    names |= {item.name for node in nodes for item in node.attribute}
    chosen = random.choice(sorted(name for name in names if name and isinstance(name, str)) or ["x"]).encode()
    return data.replace(chosen, b"\xff" * len(chosen), random.choice((1, 2, -1)))
