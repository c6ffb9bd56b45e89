"""What each ONNX operator becomes."""

from __future__ import annotations

import pytest
from onnx import helper

from ghn_service.graph.architecture import ArchitectureGraph, AttentionRole
from tests.graph.onnx_models import Model, edges_by_name, fallbacks, op_types


@pytest.mark.parametrize(
    ("groups", "dilation", "expected"),
    [(1, 1, "conv"), (1, 2, "conv"), (4, 1, "sep_conv"), (2, 1, "sep_conv"), (4, 2, "dil_conv")],
)
def test_convolutions_by_groups_and_dilation(groups: int, dilation: int, expected: str) -> None:
    model = Model({"x": (1, 4, 8, 8)})
    model.conv("x", "layer", 4, 4 // groups, group=groups, dilations=[dilation, dilation])
    assert op_types(model.read()) == [expected]


def test_a_bias_follows_its_weight() -> None:
    model = Model()
    model.conv("x", "layer", 4, 3, bias=True)
    assert edges_by_name(model.read()) == {("input", "layer.weight"), ("layer.weight", "layer.bias")}


def test_weights_behind_views_are_followed() -> None:
    model = Model({"x": (1, 6)})
    stored = model.weight("stored", 6, 5)
    cast = model.node("Cast", [stored], "cast", to=1)
    turned = model.node("Transpose", [model.node("Identity", [cast], "same")], "turned", perm=[1, 0])
    model.node("Gemm", ["x", turned], "y", transB=1)
    spec = model.read().nodes[1].weight
    assert spec is not None
    assert (spec.name, spec.shape, spec.permutation, spec.torch_shape) == ("stored", (6, 5), (1, 0), (5, 6))


def test_a_matmul_weight_is_stored_input_first() -> None:
    model = Model({"x": (2, 7, 6)})
    product = model.node("MatMul", ["x", model.weight("w", 6, 5)], "product")
    model.node("Add", [model.weight("b", 5), product], "y")
    graph = model.read()
    assert op_types(graph) == ["conv", "bias"]
    assert graph.nodes[1].weight is not None
    assert graph.nodes[1].weight.torch_shape == (5, 6)


def test_kernels_stored_channels_last_are_followed() -> None:
    model = Model()
    kernel = model.node("Transpose", [model.weight("hwio", 3, 3, 3, 8)], "oihw", perm=[3, 2, 0, 1])
    model.node("Conv", ["x", kernel], "y")
    spec = model.read().nodes[1].weight
    assert spec is not None
    assert (spec.shape, spec.torch_shape) == ((3, 3, 3, 8), (8, 3, 3, 3))


def test_a_weight_with_leading_ones_is_a_matrix() -> None:
    model = Model({"x": (1, 6)})
    matrix = model.node("Reshape", [model.weight("w", 1, 1, 5, 6), model.integers("shape", 5, 6)], "matrix")
    model.node("Gemm", ["x", matrix, model.weight("b", 5)], "y", transB=1)
    graph = model.read()
    assert op_types(graph) == ["conv", "bias"]
    assert graph.nodes[1].weight is not None
    assert graph.nodes[1].weight.torch_shape[:2] == (5, 6)


def test_batch_norm_keeps_statistics_as_buffers() -> None:
    model = Model()
    value = model.conv("x", "layer", 4, 3)
    names = [model.weight(f"bn.{key}", 4) for key in ("weight", "bias", "running_mean", "running_var")]
    model.node("BatchNormalization", [value, *names], "y")
    graph = model.read()
    assert graph.nodes[2].norm_bias is not None
    assert [spec.name for spec in graph.nodes[2].parameters] == ["bn.weight", "bn.bias"]
    assert [(buffer.name, buffer.kind) for buffer in graph.buffers] == [
        ("bn.running_mean", "running_mean"),
        ("bn.running_var", "running_var"),
    ]


def written_out_layer_norm(model: Model, value: str, *, axes: list[int]) -> str:
    axis = model.integers("axes", *axes)
    centred = model.node("Sub", [value, model.node("ReduceMean", [value, axis], "mean")], "centred")
    squared = model.node("Pow", [centred, model.weight("two")], "squared")
    variance = model.node("Add", [model.node("ReduceMean", [squared, axis], "var"), model.weight("eps")], "var_eps")
    scaled = model.node("Div", [centred, model.node("Sqrt", [variance], "deviation")], "scaled")
    return model.node(
        "Add", [model.node("Mul", [scaled, model.weight("g", 6)], "gained"), model.weight("b", 6)], "norm"
    )


def test_a_written_out_layer_norm_is_one_node() -> None:
    model = Model({"x": (1, 4, 6)})
    value = model.node("MatMul", ["x", model.weight("w", 6, 6)], "projected")
    written_out_layer_norm(model, value, axes=[-1])
    graph = model.read()
    assert op_types(graph) == ["conv", "ln"]
    assert [spec.name for spec in graph.nodes[2].parameters] == ["g", "b"]


def test_a_written_out_instance_norm_is_no_layer_norm() -> None:
    model = Model({"x": (1, 6, 4, 4)})
    value = model.conv("x", "layer", 6, 6)
    axis = [2, 3]
    written_out_layer_norm(model, value, axes=axis)
    graph = model.read()
    assert op_types(graph) == ["conv"]
    assert fallbacks(graph) == {"g": "ones", "b": "zeros"}


def test_group_norm_is_outside_the_vocabulary() -> None:
    model = Model()
    value = model.conv("x", "layer", 4, 3)
    model.node("GroupNormalization", [value, model.weight("g", 4), model.weight("b", 4)], "y", num_groups=2)
    graph = model.read()
    assert op_types(graph) == ["conv"]
    assert fallbacks(graph) == {"g": "ones", "b": "zeros"}


@pytest.mark.parametrize("op_type", ["GlobalAveragePool", "ReduceMean"])
def test_global_pools(op_type: str) -> None:
    model = Model()
    pooled = model.node(op_type, [model.conv("x", "layer", 4, 3)], "pooled")
    model.linear(model.node("Flatten", [pooled], "flat"), "fc", 10, 4)
    assert op_types(model.read()) == ["conv", "glob_avg", "conv", "bias"]


@pytest.mark.parametrize(
    ("window", "stride", "then_linear", "expected"),
    [(2, 2, True, "glob_avg"), (2, 2, False, "avg_pool"), (3, 2, True, "avg_pool"), (1, 1, False, "glob_avg")],
)
def test_average_pools_that_tile_before_a_linear_layer_are_adaptive(
    window: int, stride: int, then_linear: bool, expected: str
) -> None:
    model = Model()
    value = model.conv("x", "layer", 4, 3)
    pooled = model.node("AveragePool", [value], "pooled", kernel_shape=[window] * 2, strides=[stride] * 2)
    if then_linear:
        model.linear(model.node("Flatten", [pooled], "flat"), "fc", 10, 64)
    else:
        model.conv(pooled, "next", 4, 4)
    graph = model.read()
    assert graph.nodes[2].op_type == expected
    assert graph.nodes[2].kernel_shape == ((window, window) if expected == "avg_pool" else None)


def test_max_pool_has_its_window() -> None:
    model = Model()
    model.node("MaxPool", [model.conv("x", "layer", 4, 3)], "y", kernel_shape=[3, 2], strides=[2, 2])
    assert model.read().nodes[2].kernel_shape == (3, 2)


def attention_roles(graph: ArchitectureGraph) -> dict[str, AttentionRole]:
    layers = ((node.weight.name, node.layer) for node in graph.nodes if node.weight and node.layer)
    return {name: layer.attention for name, layer in layers if layer.attention}


def test_attention_with_separate_projections() -> None:
    model = Model({"x": (1, 5, 8)})
    for name in "qkv":
        product = model.node("MatMul", ["x", model.weight(f"{name}.weight", 8, 8)], f"{name}_product")
        model.node("Add", [product, model.weight(f"{name}.bias", 8)], name)
    keys = model.node("Transpose", ["k"], "keys", perm=[0, 2, 1])
    logits = model.node("Mul", [model.node("MatMul", ["q", keys], "logits"), model.weight("scale")], "scaled")
    mixed = model.node("MatMul", [model.node("Softmax", [logits], "attention"), "v"], "mixed")
    model.linear(mixed, "proj", 8, 8)
    graph = model.read()
    assert attention_roles(graph) == {}  # nothing states how many heads there are
    edges = edges_by_name(graph)
    assert {source for source, target in edges if target == "msa"} == {"q.bias", "k.bias", "v.bias"}
    assert {source for source, target in edges if target == "proj.weight"} == {"msa"}


def test_fused_attention() -> None:
    model = Model({"x": (1, 5, 8)}, opset=23)
    for name in "qkv":
        model.node("MatMul", ["x", model.weight(f"{name}.weight", 8, 8)], name)
    heads = {"q_num_heads": 2, "kv_num_heads": 2}
    model.linear(model.node("Attention", ["q", "k", "v"], "mixed", **heads), "proj", 8, 8)
    graph = model.read()
    assert sorted(op_types(graph)) == ["bias", "conv", "conv", "conv", "conv", "msa"]
    parts = {"q.weight": "query", "k.weight": "key", "v.weight": "value", "proj.weight": "output"}
    assert attention_roles(graph) == {name: AttentionRole(1, 2, part) for name, part in parts.items()}


@pytest.mark.parametrize("heads", [-2, 0])
def test_impossible_numbers_of_heads_are_unknown(heads: int) -> None:
    model = Model({"x": (1, 5, 9)}, opset=23)
    model.node("MatMul", ["x", model.weight("qkv.weight", 9, 9)], "qkv")
    model.linear(model.node("Attention", ["qkv", "qkv", "qkv"], "mixed", q_num_heads=heads), "proj", 9, 9)
    assert attention_roles(model.read()) == {}


def test_a_final_softmax_is_no_attention() -> None:
    model = Model({"x": (1, 6)})
    model.node("Softmax", [model.linear("x", "fc", 10, 6)], "probabilities")
    graph = model.read()
    assert op_types(graph) == ["conv", "bias"]
    assert graph.nodes[-1].is_head


def test_masks_do_not_make_sums() -> None:
    model = Model({"x": (1, 5, 8), "mask": (1, 5, 5)})
    product = model.node("MatMul", ["x", model.weight("qkv", 8, 8)], "qkv_out")
    logits = model.node("MatMul", [product, model.node("Transpose", [product], "t")], "logits")
    masked = model.node(
        "Add", [model.node("Add", [logits, "mask"], "masked"), model.weight("table", 1, 5, 5)], "biased"
    )
    model.node("MatMul", [model.node("Softmax", [masked], "attention"), product], "y")
    graph = model.read()
    assert op_types(graph) == ["conv", "msa"]
    assert fallbacks(graph) == {"table": "truncated_normal"}


def test_position_embeddings_have_no_predecessor() -> None:
    model = Model({"x": (1, 17, 8)})
    model.node(
        "Add", [model.node("MatMul", ["x", model.weight("w", 8, 8)], "tokens"), model.weight("pos", 1, 17, 8)], "y"
    )
    edges = edges_by_name(model.read())
    assert edges == {("input", "w"), ("w", "sum"), ("pos", "sum")}


def test_class_tokens_get_a_fallback_and_no_node() -> None:
    model = Model({"x": (1, 16, 8)})
    tokens = model.node("MatMul", ["x", model.weight("w", 8, 8)], "tokens")
    model.node("Concat", [model.weight("class_token", 1, 1, 8), tokens], "y", axis=1)
    graph = model.read()
    assert op_types(graph) == ["conv"]
    assert fallbacks(graph) == {"class_token": "truncated_normal"}


def test_layer_scale_gets_its_rule() -> None:
    model = Model()
    value = model.conv("x", "one", 4, 3)
    scaled = model.node("Mul", [model.weight("gamma", 4, 1, 1), model.conv(value, "two", 4, 4)], "scaled")
    model.node("Add", [scaled, value], "y")
    graph = model.read()
    assert op_types(graph) == ["conv", "conv", "sum"]
    assert fallbacks(graph) == {"gamma": "layer_scale"}


def test_other_scales_start_at_one() -> None:
    model = Model()
    model.node("Mul", [model.conv("x", "one", 4, 3), model.weight("gamma", 4, 1, 1)], "y")
    assert fallbacks(model.read()) == {"gamma": "ones"}


def test_an_embedding_read_by_data_is_fed_by_the_input() -> None:
    model = Model({"tokens": (1, 5)})
    model.linear(model.node("Gather", [model.weight("table", 100, 8), "tokens"], "embedded"), "fc", 3, 8)
    graph = model.read()
    assert op_types(graph) == ["pos_enc", "conv", "bias"]
    assert ("input", "table") in edges_by_name(graph)


def test_recurrent_layers_get_fallbacks() -> None:
    model = Model({"x": (5, 1, 8)})
    weights = [model.weight("w", 1, 16, 8), model.weight("r", 1, 16, 4), model.weight("b", 1, 32)]
    model.linear(model.node("LSTM", ["x", *weights], "hidden", hidden_size=4), "fc", 3, 4)
    assert fallbacks(model.read()) == dict.fromkeys("wrb", "recurrent_uniform")


def test_transposed_and_one_dimensional_convolutions_pass_data() -> None:
    model = Model({"x": (1, 3, 8)})
    value = model.node("Conv", ["x", model.weight("one", 4, 3, 3), model.weight("bias", 4)], "a")
    value = model.node("ConvTranspose", [value, model.weight("up", 4, 4, 3)], "b")
    model.linear(value, "fc", 3, 4)
    graph = model.read()
    assert op_types(graph) == ["conv", "bias"]
    assert fallbacks(graph) == {"one": "kaiming_normal", "bias": "zeros", "up": "kaiming_normal"}


def test_slopes_of_prelu() -> None:
    model = Model()
    model.node("PRelu", [model.conv("x", "one", 4, 3), model.weight("slope", 4, 1, 1)], "y")
    assert fallbacks(model.read()) == {"slope": "prelu"}


def test_sums_of_one_branch_vanish() -> None:
    model = Model()
    value = model.conv("x", "one", 4, 3)
    rolled = model.node("Concat", [model.node("Slice", [value, "", ""], "a"), value], "rolled", axis=2)
    model.node("Add", [rolled, model.node("Relu", [value], "b")], "y")
    assert op_types(model.read()) == ["conv"]


def test_products_without_a_gate_vanish() -> None:
    model = Model()
    model.node("Mul", [model.conv("x", "one", 4, 3), model.conv("x", "two", 4, 3)], "product")
    model.conv("product", "three", 4, 4)
    graph = model.read()
    assert op_types(graph) == ["conv", "conv", "conv"]
    assert {("one.weight", "three.weight"), ("two.weight", "three.weight")} <= edges_by_name(graph)


def test_random_masks_are_no_data() -> None:
    model = Model()
    value = model.conv("x", "one", 4, 3)
    mask = model.node("Cast", [model.node("RandomUniformLike", [value], "noise")], "mask", to=1)
    dropped = model.node("Mul", [model.conv(value, "two", 4, 4), mask], "dropped")
    model.node("Add", [dropped, value], "y")
    assert op_types(model.read()) == ["conv", "conv", "sum"]


def test_a_final_pool_moves_before_a_pointwise_classifier() -> None:
    model = Model()
    value = model.conv(model.conv("x", "one", 4, 3), "classifier", 10, 4, size=1, bias=True)
    model.node("GlobalAveragePool", [model.node("Relu", [value], "r")], "y")
    graph = model.read()
    assert op_types(graph) == ["conv", "glob_avg", "conv", "bias"]
    assert [node.is_head for node in graph.nodes] == [False, False, False, True, True]


def test_bias_free_linear_layers_stay_in_the_data_path() -> None:
    model = Model({"x": (1, 6)})
    value = model.linear("x", "one", 6, 6)
    value = model.node("Gemm", [value, model.weight("two", 6, 6)], "b", transB=1)
    model.linear(value, "three", 3, 6)
    assert {("one.bias", "two"), ("two", "three.weight")} <= edges_by_name(model.read())


def test_unknown_operators_pass_data_and_are_listed() -> None:
    model = Model()
    value = model.node("Wobble", [model.conv("x", "one", 4, 3), model.weight("strange", 4, 4)], "a", domain="custom")
    model.conv(value, "two", 4, 4)
    graph = model.read()
    assert ("one.weight", "two.weight") in edges_by_name(graph)
    assert graph.unknown_operators == ("custom::Wobble",)
    assert graph.warnings
    assert fallbacks(graph) == {"strange": "kaiming_normal"}


def test_functions_are_expanded() -> None:
    model = Model()
    model.functions.append(
        helper.make_function(
            "custom",
            "Block",
            ["value", "weight"],
            ["result"],
            [helper.make_node("Conv", ["value", "weight"], ["inner"]), helper.make_node("Relu", ["inner"], ["result"])],
            [helper.make_opsetid("", 20)],
        )
    )
    model.node("Block", ["x", model.weight("a", 4, 3, 3, 3)], "h", domain="custom")
    model.node("Block", ["h", model.weight("b", 4, 4, 3, 3)], "y", domain="custom")
    assert edges_by_name(model.read()) == {("input", "a"), ("a", "b")}


def test_einsum_with_a_matrix_is_a_linear_layer() -> None:
    model = Model({"x": (1, 5, 6)})
    model.node("Einsum", ["x", model.weight("w", 6, 4)], "y", equation="bni,io->bno")
    spec = model.read().nodes[1].weight
    assert spec is not None
    assert spec.torch_shape == (4, 6)
