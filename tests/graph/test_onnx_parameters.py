"""What tensors are called, which places share one, and where every tensor ends."""

from __future__ import annotations

import json
from collections import Counter

import onnx
import pytest
from onnx import TensorProto, helper

from ghn_service.errors import InvalidArchitectureError
from ghn_service.graph.architecture import ArchitectureGraph, ParameterSpec, ParameterUse
from ghn_service.graph.onnx.parameters import _unique
from ghn_service.graph.onnx.reader import read_onnx
from tests.data.regenerate import stored_model
from tests.graph.onnx_models import Model, edges_by_name, fallbacks, op_types

FX_KEY = "pkg.torch.onnx.fx_node"
SCOPES_KEY = "pkg.torch.onnx.name_scopes"


def by_name(graph: ArchitectureGraph) -> dict[str, ParameterSpec]:
    return {spec.name: spec for spec in graph.parameters()}


def annotate(node: onnx.NodeProto, call: str, *scopes: str) -> None:
    """Writes what torch's exporter would leave on a node."""
    node.metadata_props.add(key=FX_KEY, value=f"%n : call_function[target=torch.ops.aten.{call}")
    node.metadata_props.add(key=SCOPES_KEY, value=repr(["", *scopes, "n"]))


def merged_norms() -> Model:
    """Two layer norms whose weights the exporter merged because both were ones."""
    model = Model({"x": (1, 5, 8)}, producer="pytorch")
    weight, bias = model.weight("one.norm.weight", 8), model.weight("one.norm.bias", 8)
    value = "x"
    for scope in ("one", "two"):
        model.node("LayerNormalization", [value, weight, bias], scope)
        call = f"layer_norm.default](args = (%x, [8], %p_{scope}_norm_weight, %p_{scope}_norm_bias), kwargs = {{}})"
        annotate(model.nodes[-1], call, scope, f"{scope}.norm")
        value = scope
    return model


def test_merged_tensors_get_a_name_per_use() -> None:
    specs = by_name(merged_norms().read())
    assert list(specs) == ["one.norm.weight", "one.norm.bias", "two.norm.weight", "two.norm.bias"]
    assert specs["two.norm.weight"].initializer == "one.norm.weight"
    assert specs["two.norm.weight"].uses == (ParameterUse("two", 1),)
    assert specs["two.norm.bias"].uses == (ParameterUse("two", 2),)


def test_a_norm_used_twice_is_one_parameter() -> None:
    model = merged_norms()
    for node in model.nodes:
        del node.metadata_props[:]
        annotate(node, "layer_norm.default](args = (%x, [8], %p_one_norm_weight, %p_one_norm_bias))", "one", "one.norm")
    graph = model.read()
    assert list(by_name(graph)) == ["one.norm.weight", "one.norm.bias"]
    assert op_types(graph) == ["ln"]


def test_aliases_of_the_older_exporter_are_parameters_of_their_own() -> None:
    model = Model({"x": (1, 6)}, producer="pytorch")
    model.linear("x", "one", 6, 6)
    model.node("Identity", ["one.bias"], "two.bias", name="Identity_7")
    model.node("Gemm", ["one_out", model.weight("two.weight", 6, 6), "two.bias"], "y", transB=1)
    spec = by_name(model.read())["two.bias"]
    assert (spec.initializer, spec.torch_name, spec.uses) == ("one.bias", "two.bias", (ParameterUse("y", 2),))


def test_a_folded_weight_is_named_after_the_traced_call() -> None:
    model = Model({"x": (1, 5, 6)}, producer="pytorch")
    model.node("MatMul", ["x", model.weight("val_19", 6, 4)], "product", name="node_MatMul_1")
    annotate(model.nodes[-1], "linear.default](args = (%x, %p_mlp_fc_weight, %p_mlp_fc_bias))", "mlp", "mlp.fc")
    model.node("Add", ["product", model.weight("mlp.fc.bias", 4)], "y")
    annotate(model.nodes[-1], "linear.default](args = (%x, %p_mlp_fc_weight, %p_mlp_fc_bias))", "mlp", "mlp.fc")
    spec = by_name(model.read())["val_19"]
    assert (spec.torch_name, spec.torch_shape) == ("mlp.fc.weight", (4, 6))


def test_a_folded_weight_without_metadata_is_named_after_its_bias() -> None:
    model = Model({"x": (1, 5, 6)}, producer="pytorch")
    model.node("MatMul", ["x", model.weight("onnx::MatMul_31", 6, 12)], "product", name="MatMul_0")
    model.node("Add", [model.weight("attn.in_proj_bias", 12), "product"], "y")
    assert by_name(model.read())["onnx::MatMul_31"].torch_name == "attn.in_proj_weight"


def test_a_folded_weight_is_named_after_the_module_path_of_its_node() -> None:
    model = Model({"x": (1, 5, 6)}, producer="pytorch")
    weight = model.weight("onnx::MatMul_31", 6, 12)
    model.node("MatMul", ["x", weight], "y", name="/layers/layers.0/mlp/mlp.2/MatMul")
    assert by_name(model.read())["onnx::MatMul_31"].torch_name == "layers.0.mlp.2.weight"


def test_a_dropped_zero_bias_is_restored() -> None:
    model = Model(producer="pytorch")
    model.conv("x", "stem", 4, 3)
    annotate(model.nodes[-1], "conv2d.default](args = (%x, %p_stem_weight, %p_stem_bias, [1, 1]))", "stem")
    graph = model.read()
    assert op_types(graph) == ["conv", "bias"]
    spec = by_name(graph)["stem.bias"]
    assert (spec.shape, spec.initializer, spec.uses) == ((4,), "", (ParameterUse("stem_out", 2),))
    assert graph.warnings


def test_a_convolution_without_bias_stays_without() -> None:
    model = Model(producer="pytorch")
    model.conv("x", "stem", 4, 3)
    annotate(model.nodes[-1], "conv2d.default](args = (%x, %p_stem_weight, None, [1, 1]))", "stem")
    assert op_types(model.read()) == ["conv"]


@pytest.mark.parametrize("form", ["dynamo-eval-optimize", "script-eval-optimize"])
def test_folded_batch_norm_is_served_with_a_warning(form: str) -> None:
    graph = read_onnx(stored_model("resnet18", form))
    assert "bn" not in op_types(graph)
    assert op_types(graph).count("conv") == 21
    assert any("batch normalization" in warning for warning in graph.warnings)


def test_tied_matrices_are_one_node_at_their_first_use() -> None:
    model = Model({"x": (1, 6)})
    weight = model.weight("shared", 6, 6)
    first = model.node("Gemm", ["x", weight, model.weight("one", 6)], "first", transB=1)
    model.node("Gemm", [first, weight, model.weight("two", 6)], "second", transB=1)
    graph = model.read()
    assert op_types(graph) == ["conv", "bias", "bias"]
    assert edges_by_name(graph) == {("input", "shared"), ("shared", "one"), ("shared", "two"), ("one", "two")}


def test_two_inputs_through_one_encoder_share_its_nodes() -> None:
    model = Model({"x": (1, 6), "y": (1, 6)})
    weight, bias = model.weight("weight", 6, 6), model.weight("bias", 6)
    values = [model.node("Gemm", [name, weight, bias], f"{name}_out", transB=1) for name in "xy"]
    model.linear(model.node("Concat", values, "both", axis=1), "fc", 3, 12)
    assert op_types(model.read()) == ["conv", "bias", "conv", "bias"]


def test_initializers_turned_into_declared_inputs() -> None:
    model = Model({"x": (1, 3, 8, 8), "w": (4, 3, 3, 3), "mean": (1, 3, 1, 1), "scale": (4,)})
    model.metadata = {"ghn.parameters": json.dumps(["w", "scale"]), "ghn.buffers": json.dumps(["mean"])}
    centred = model.node("Sub", ["x", "mean"], "centred")
    model.node("Mul", [model.node("Conv", [centred, "w"], "c"), "scale"], "y")
    graph = model.read()
    assert op_types(graph) == ["conv"]
    assert fallbacks(graph) == {"scale": "ones"}
    assert [buffer.name for buffer in graph.buffers] == ["mean"]


def test_undeclared_inputs_in_weight_slots_are_weights() -> None:
    statistics = {f"bn.{key}": (4,) for key in ("weight", "bias", "running_mean", "running_var")}
    model = Model({"x": (1, 3, 8, 8), "w": (4, 3, 3, 3), **statistics, "extra": (4, 1, 1)})
    value = model.node("BatchNormalization", [model.node("Conv", ["x", "w"], "c"), *statistics], "b")
    model.node("Add", [value, "extra"], "y")
    graph = model.read()
    assert op_types(graph) == ["conv", "bn"]
    assert fallbacks(graph) == {"extra": "zeros"}
    assert len(graph.buffers) == 2


def test_two_data_inputs_stay_data() -> None:
    model = Model({"image": (1, 3, 8, 8), "query": (1, 6)})
    model.conv("image", "a", 4, 3)
    model.linear("query", "b", 4, 6)
    model.node("Add", ["a_out", "b_out"], "y")
    assert op_types(model.read())[-1] == "sum"


@pytest.mark.parametrize(
    ("key", "text"),
    [("ghn.parameters", "{not json"), ("ghn.parameters", "{}"), ("ghn.contents", "[]"), ("ghn.contents", '{"a": 1}')],
)
def test_malformed_declarations_are_refused(key: str, text: str) -> None:
    model = Model()
    model.conv("x", "a", 4, 3)
    model.metadata = {key: text}
    with pytest.raises(InvalidArchitectureError):
        model.read()


def test_constants_are_no_parameters() -> None:
    model = Model(producer="pytorch")
    value = model.conv("x", "a", 4, 3)
    scaled = model.node("Mul", [value, model.weight("val_3", 1)], "scaled")
    literal = model.node("Constant", [], "mask", value=helper.make_tensor("", TensorProto.FLOAT, [4, 1, 1], [0.0] * 4))
    model.node("Add", [scaled, literal], "y")
    assert [spec.name for spec in model.read().parameters()] == ["a.weight"]


def test_unused_initializers_still_get_a_value() -> None:
    model = Model()
    model.conv("x", "a", 4, 3)
    model.weight("forgotten", 5, 5)
    assert fallbacks(model.read()) == {"forgotten": "kaiming_normal"}


def test_dead_branches_get_fallbacks() -> None:
    model = Model()
    model.conv("x", "dead", 4, 3)
    model.conv("x", "live", 4, 3)
    graph = model.read()
    assert op_types(graph) == ["conv"]
    assert fallbacks(graph) == {"dead.weight": "kaiming_normal"}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("swin_t", "dynamo-train"),
        ("vit_b_16", "script-eval"),
        ("convnext_tiny", "dynamo-eval-optimize"),
        ("densenet121", "script-eval"),
    ],
)
def test_every_use_of_an_initializer_has_one_place(name: str, form: str) -> None:
    """Each place that reads a weight belongs to one spec, so that a filled file is unambiguous."""
    graph = read_onnx(stored_model(name, form))
    places = Counter(use for spec in graph.parameters() for use in spec.uses)
    assert max(places.values(), default=1) == 1


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "swin_t", "convnext_tiny"])
def test_every_trainable_tensor_of_the_file_is_somewhere(name: str) -> None:
    data = stored_model(name, "dynamo-train")
    graph = read_onnx(data)
    known = {spec.initializer for spec in graph.parameters()} | {buffer.name for buffer in graph.buffers}
    tensors = onnx.ModelProto.FromString(data).graph.initializer
    floats = {
        tensor.name for tensor in tensors if tensor.data_type == TensorProto.FLOAT and max(tensor.dims, default=1) > 1
    }
    assert floats <= known


def test_a_bias_put_together_from_parts_names_the_parts() -> None:
    model = Model({"x": (1, 5, 6)}, producer="pytorch")
    model.node("MatMul", ["x", model.weight("attn.qkv.weight", 6, 12)], "product")
    call = "linear.default](args = (%x, %p_attn_qkv_weight, %cat))"
    annotate(model.nodes[-1], call, "attn")
    parts = [model.weight(f"attn.{key}_bias", 4) for key in "qkv"]
    model.node("Add", ["product", model.node("Concat", parts, "cat", axis=0)], "y")
    annotate(model.nodes[-1], call, "attn")
    names = {spec.torch_name for spec in model.read().parameters()}
    assert names == {"attn.qkv.weight", "attn.q_bias", "attn.k_bias", "attn.v_bias"}


def test_a_standardised_weight_is_the_layers_weight() -> None:
    """Weight standardisation runs a batch normalization over the weight itself."""
    model = Model(producer="pytorch")
    weight = model.weight("conv.weight", 4, 3, 3, 3)
    flat = model.node("Reshape", [weight, model.integers("flat", 1, 4, 27)], "flattened")
    statistics = [model.weight("conv.gain", 4), *(model.weight(f"val_{index}", 4) for index in range(3))]
    standard = model.node("BatchNormalization", [flat, *statistics], "standardised")
    kernel = model.node("Reshape", [standard, model.integers("shape", 4, 3, 3, 3)], "kernel")
    model.node("Conv", ["x", kernel, model.weight("conv.bias", 4)], "y")
    annotate(model.nodes[-1], "conv2d.default](args = (%x, %view, %p_conv_bias))", "conv")
    graph = model.read()
    assert [spec.torch_name for node in graph.nodes for spec in node.parameters] == ["conv.weight", "conv.bias"]
    assert fallbacks(graph) == {"conv.gain": "ones"}


def test_numbers_of_equal_names_go_on_where_they_ended() -> None:
    class Counted(dict[str, int]):
        num_looks = 0

        def __contains__(self, name: object) -> bool:
            self.num_looks += 1
            return super().__contains__(name)

    taken = Counted({"w#3": 1})
    names = [_unique("w", taken) for _ in range(100)]
    assert names == ["w", "w#2", *(f"w#{index}" for index in range(4, 102))]
    assert taken.num_looks < 300
