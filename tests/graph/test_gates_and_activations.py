"""Gates and activations: which products are squeeze-and-excitation, and what written-out activations become."""

from __future__ import annotations

import pytest

from tests.graph.onnx_models import Model, edges_by_name, op_types


def excited(model: Model, gate: str) -> str:
    feature = model.conv("x", "layer", 4, 3)
    squeezed = model.node("GlobalAveragePool", [feature], "squeezed")
    reduced = model.node("Relu", [model.conv(squeezed, "fc1", 2, 4, size=1, bias=True)], "reduced")
    expanded = model.conv(reduced, "fc2", 4, 2, size=1, bias=True)
    return model.node("Mul", [model.node(gate, [expanded], "gate"), feature], "excited")


@pytest.mark.parametrize("gate", ["Sigmoid", "HardSigmoid"])
def test_squeeze_and_excitation(gate: str) -> None:
    model = Model()
    excited(model, gate)
    graph = model.read()
    assert op_types(graph) == ["conv", "conv", "bias", "conv", "bias", "cse"]
    assert edges_by_name(graph) == {
        ("input", "layer.weight"),
        ("layer.weight", "fc1.weight"),
        ("fc1.weight", "fc1.bias"),
        ("fc1.bias", "fc2.weight"),
        ("fc2.weight", "fc2.bias"),
        ("fc2.bias", "cse"),
        ("layer.weight", "cse"),
    }


def test_the_last_pool_stays_in_a_gated_network() -> None:
    model = Model()
    pooled = model.node("GlobalAveragePool", [excited(model, "Sigmoid")], "pooled")
    model.linear(model.node("Flatten", [pooled], "flat"), "fc", 10, 4)
    assert op_types(model.read())[-3:] == ["glob_avg", "conv", "bias"]


def activation(model: Model, kind: str, value: str) -> str:
    constant = model.weight("constant")
    if kind == "silu":
        return model.node("Mul", [value, model.node("Sigmoid", [value], "s")], "a")
    if kind == "hardswish":
        shifted = model.node("Clip", [model.node("Add", [value, constant], "s"), "", ""], "c")
        return model.node("Div", [model.node("Mul", [value, shifted], "m"), constant], "a")
    if kind == "gelu":
        error = model.node("Erf", [model.node("Div", [value, constant], "d")], "e")
        return model.node("Mul", [value, model.node("Add", [error, constant], "p")], "a")
    return model.node("Relu", [value], "a")


@pytest.mark.parametrize(("attributes", "name"), [({}, "leaky_relu:0.01"), ({"alpha": 0.2}, "leaky_relu:0.2")])
def test_a_leaky_relu_is_read_with_its_slope(attributes: dict[str, float], name: str) -> None:
    model = Model()
    model.node("LeakyRelu", [model.conv("x", "one", 4, 3)], "out", **attributes)
    layer = model.read().nodes[1].layer
    assert layer is not None
    assert layer.activation == name


@pytest.mark.parametrize("kind", ["silu", "hardswish", "gelu", "relu"])
def test_written_out_activations_are_no_gates(kind: str) -> None:
    model = Model()
    model.conv(activation(model, kind, model.conv("x", "one", 4, 3)), "two", 4, 4)
    graph = model.read()
    assert op_types(graph) == ["conv", "conv"]
    assert graph.nodes[1].layer is not None
    assert graph.nodes[1].layer.activation == kind
