"""What is known about each layer beyond its weight's shape."""

from __future__ import annotations

import pytest
from onnx import TensorProto, helper

from ghn_service.graph.architecture import (
    ArchitectureGraph,
    AttentionRole,
    LayerAttributes,
    decode_graph,
    encode_graph,
)
from ghn_service.graph.onnx.reader import read_onnx
from tests.data.regenerate import stored_model
from tests.graph.onnx_models import Model


def layers(name: str, form: str = "dynamo-train") -> dict[str, LayerAttributes]:
    graph: ArchitectureGraph = read_onnx(stored_model(name, form))
    return {node.weight.torch_name: node.layer for node in graph.nodes if node.weight and node.layer}


def test_a_convolution_before_norm_and_activation() -> None:
    assert layers("resnet18")["layer2.0.conv1.weight"] == LayerAttributes(
        groups=1,
        stride=(2, 2),
        dilations=(1, 1),
        padding=(1, 1, 1, 1),
        activation="relu",
        normalized=True,
        positions=28 * 28,
    )


def test_the_activation_after_a_residual_sum_counts() -> None:
    assert layers("resnet18")["layer2.0.conv2.weight"].activation == "relu"


def test_the_head_has_no_activation() -> None:
    head = layers("resnet18")["fc.weight"]
    assert (head.activation, head.normalized, head.stride) == ("", False, ())


def test_transformer_layers() -> None:
    block = "encoder.layers.encoder_layer_0"
    found = layers("vit_b_16")
    assert found[f"{block}.self_attention.in_proj_weight"].packed == 3
    assert found[f"{block}.self_attention.out_proj.weight"].packed == 1
    assert found[f"{block}.mlp.0.weight"].activation == "gelu"
    assert found[f"{block}.mlp.3.weight"].activation == ""
    assert {layer.positions for name, layer in found.items() if name.startswith("encoder.")} == {197}


@pytest.mark.parametrize(("name", "heads", "count"), [("vit_b_16", 12, 24), ("swin_t", 3, 24)])
def test_layers_of_attention_know_their_part(name: str, heads: int, count: int) -> None:
    graph: ArchitectureGraph = read_onnx(stored_model(name, "dynamo-train"))
    roles = [node.layer.attention for node in graph.nodes if node.layer and node.layer.attention]
    assert len(roles) == count
    assert roles[:2] == [AttentionRole(1, heads, "query_key_value"), AttentionRole(1, heads, "output")]
    assert decode_graph(encode_graph(graph)) == graph


def test_rows_of_all_windows_count() -> None:
    assert layers("swin_t")["features.1.0.attn.qkv.weight"].positions == 56 * 56


@pytest.mark.parametrize("shape", [(2, 7, 4), (7, 2, 4), (14, 4)])
def test_rows_do_not_depend_on_where_the_examples_are(shape: tuple[int, ...]) -> None:
    model = Model({"x": (2, 7, 4)})
    moved = model.node("Reshape", ["x", model.integers("shape", *shape)], "moved")
    model.node("MatMul", [moved, model.weight("w", 4, 5)], "product")
    proto = model.proto()
    proto.graph.value_info.append(helper.make_tensor_value_info(moved, TensorProto.FLOAT, shape))
    layer = read_onnx(proto.SerializeToString()).nodes[1].layer
    assert layer is not None
    assert layer.positions == 7


def test_depthwise_layers_of_efficientnet() -> None:
    layer = layers("efficientnet_b0")["features.2.0.block.1.0.weight"]
    assert (layer.groups, layer.activation, layer.normalized) == (96, "silu", True)


def test_gates_are_told_from_activations() -> None:
    found = layers("mobilenet_v3_small")
    assert found["features.1.block.1.fc2.weight"].activation == "hardsigmoid"
    assert found["features.0.0.weight"].activation == "hardswish"


def test_positions_of_a_convolution_do_not_need_stated_shapes() -> None:
    assert layers("resnet18", "script-eval")["layer2.0.conv1.weight"].positions == 28 * 28
