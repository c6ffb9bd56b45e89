"""Parameters that exporters folded away: found again where that is sound, and named where it is not."""

from __future__ import annotations

import onnx
import pytest

from ghn_service.graph.architecture import ArchitectureGraph, ParameterSpec, ParameterUse
from ghn_service.graph.onnx.folded import FOLDED_KEY, folded_parameters, string_list, table_shape, token_shape
from ghn_service.graph.onnx.reader import read_onnx
from tests.data.regenerate import stored_model
from tests.graph.onnx_models import Model

SCOPES_KEY = "pkg.torch.onnx.name_scopes"


class FoldedModel(Model):
    """A model of torch's exporter whose initializers say what they were computed from."""

    def __init__(self, inputs: dict[str, tuple[int, ...]]) -> None:
        super().__init__(inputs, producer="pytorch")
        self.origins: dict[str, list[str]] = {}

    def folded(self, name: str, *shape: int, origins: list[str]) -> str:
        self.origins[name] = origins
        return self.weight(name, *shape)

    def in_module(self, *scopes: str) -> None:
        self.nodes[-1].metadata_props.add(key=SCOPES_KEY, value=repr(["", *scopes, "n"]))

    def read(self, *outputs: str) -> ArchitectureGraph:
        proto = self.proto(*outputs)
        for tensor in proto.graph.initializer:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            if tensor.name in self.origins:
                info.metadata_props.add(key=FOLDED_KEY, value=repr(self.origins[tensor.name]))
            proto.graph.value_info.append(info)
        return read_onnx(proto.SerializeToString())


def others(graph: ArchitectureGraph) -> dict[str, ParameterSpec]:
    return {spec.name: spec for spec in graph.other_parameters}


def with_token(name: str, *shape: int, origins: list[str]) -> FoldedModel:
    model = FoldedModel({"x": (2, 9, 8)})
    model.node("MatMul", ["x", model.weight("fc.weight", 8, 8)], "tokens")
    model.node("Concat", [model.folded(name, *shape, origins=origins), "tokens"], "all", axis=1)
    model.node("MatMul", ["all", model.weight("head.weight", 8, 4)], "y")
    return model


def attention(model: FoldedModel, scope: str, bias: str) -> str:
    """A product of two activations, a bias, a softmax."""
    for part in ("q", "k"):
        model.node("MatMul", ["x", model.weight(f"{scope}.{part}.weight", 8, 8)], f"{scope}.{part}")
    model.node("MatMul", [f"{scope}.q", f"{scope}.k"], f"{scope}.logits")
    model.node("Add", [f"{scope}.logits", bias], f"{scope}.biased")
    model.in_module("blocks", scope)
    return model.node("Softmax", [f"{scope}.biased"], f"{scope}.out")


def test_an_expanded_token_is_the_token_again() -> None:
    graph = with_token("expand", 2, 1, 8, origins=["class_token", "val_6", "val_7"]).read()
    spec = others(graph)["class_token"]
    assert (spec.torch_name, spec.shape, spec.initializer, spec.uses) == ("class_token", (1, 1, 8), "expand", ())
    assert any("class_token" in warning for warning in graph.warnings)


def test_a_tensor_of_several_parameters_is_none_of_them() -> None:
    graph = with_token("cat", 2, 2, 8, origins=["cls_token", "dist_token"]).read()
    assert [(spec.torch_name, spec.shape) for spec in graph.other_parameters] == [("", (2, 2, 8))]
    assert any("cls_token, dist_token" in warning for warning in graph.warnings)


def test_what_was_computed_from_no_parameter_is_a_constant() -> None:
    graph = with_token("self_float", 2, 1, 8, origins=["empty", "val_3", "net.lifted_tensor_0"]).read()
    assert graph.other_parameters == ()
    assert graph.warnings == ()


@pytest.mark.parametrize("shape", [(1, 2, 49, 49), (2401, 2)])
def test_a_table_that_was_read_is_the_table_again(shape: tuple[int, ...]) -> None:
    model = FoldedModel({"x": (2, 49, 8)})
    origins = ["blocks.0.relative_position_bias_table", "blocks.0.relative_position_index", "view_3"]
    bias = model.folded("unsqueeze", *shape, origins=origins)
    if len(shape) == 2:
        bias = model.node("Reshape", [bias, model.integers("sizes", 1, 2, 49, 49)], "bias")
    attention(model, "blocks.0", bias)
    spec = others(model.read())["blocks.0.relative_position_bias_table"]
    assert (spec.shape, spec.initializer, spec.fallback) == ((169, 2), "unsqueeze", "truncated_normal")


def test_other_tables_are_told_to_be_lost() -> None:
    model = FoldedModel({"x": (2, 49, 8)})
    attention(model, "blocks.0", model.folded("index_3", 2, 49, 49, origins=["blocks.0.attention_biases", "val_1"]))
    graph = model.read()
    assert [(spec.name, spec.torch_name) for spec in graph.other_parameters] == [("index_3", "")]
    assert any("blocks.0.attention_biases" in warning for warning in graph.warnings)


def test_merged_tables_get_a_name_per_module() -> None:
    model = FoldedModel({"x": (2, 49, 8)})
    origins = ["blocks.0.relative_position_bias_table", "blocks.0.relative_position_index"]
    bias = model.folded("unsqueeze", 1, 2, 49, 49, origins=origins)
    results = [attention(model, f"blocks.{index}", bias) for index in range(2)]
    specs = others(model.read(*results))
    assert list(specs) == [f"blocks.{index}.relative_position_bias_table" for index in range(2)]
    assert specs["blocks.1.relative_position_bias_table"].uses == (ParameterUse("blocks.1.biased", 1),)


def test_the_older_exporters_tables_are_named_by_convention_and_told() -> None:
    graph = read_onnx(stored_model("swin_t", "script-eval-optimize"))
    names = [spec.torch_name for spec in graph.other_parameters]
    assert len(names) == 12
    assert all(name in "".join(graph.warnings) for name in names[:10])


def test_the_older_exporters_other_constants_are_told() -> None:
    model = Model({"x": (2, 8)}, producer="pytorch")
    model.node("Mul", [model.linear("x", "fc", 8, 8), model.weight("onnx::Mul_12", 1, 8)], "scaled")
    model.linear("scaled", "head", 4, 8)
    graph = model.read()
    assert graph.other_parameters == ()
    assert any("onnx::Mul_12" in warning for warning in graph.warnings)


def test_names_of_intermediate_values_are_no_parameters() -> None:
    names = ["class_token", "val_3", "expand_1", "view", "a.weight", "a.relative_position_index", "b.running_mean"]
    assert folded_parameters(names) == ("class_token", "a.weight")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 3, 49, 49), (169, 3)),
        ((64, 64, 4), (225, 4)),
        ((2401, 24), (169, 24)),
        ((1, 3, 49, 50), None),
        ((3, 48, 48), None),
        ((49, 49), None),
        ((3, 1, 1), None),
        ((1, 3, 1, 49, 49), None),
    ],
)
def test_table_shapes(shape: tuple[int, ...], expected: tuple[int, int] | None) -> None:
    assert table_shape(shape) == expected


@pytest.mark.parametrize(
    ("shape", "batch", "expected"),
    [((2, 1, 8), 2, (1, 1, 8)), ((1, 1, 8), 1, (1, 1, 8)), ((3, 1, 8), 2, ()), ((2, 8), 2, ()), ((2, 1, 8), None, ())],
)
def test_token_shapes(shape: tuple[int, ...], batch: int | None, expected: tuple[int, ...]) -> None:
    assert token_shape(shape, batch) == expected


@pytest.mark.parametrize("text", ["", "[1, 2]", "['a'", "{'a': 1}", "[" * 5000, "['a', " * 9000])
def test_damaged_metadata_says_nothing(text: str) -> None:
    assert string_list(text) == []


def test_a_convolution_with_a_folded_norm_keeps_its_weights_name() -> None:
    graph = read_onnx(stored_model("resnet18", "dynamo-eval-optimize"))
    weights = [node.weight for node in graph.nodes if node.op_type == "conv" and node.weight]
    assert all(spec.torch_name == spec.name for spec in weights)
    assert not any("computed from parameters" in warning for warning in graph.warnings)
