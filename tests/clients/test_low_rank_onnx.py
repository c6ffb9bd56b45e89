"""ONNX models rewritten to compute with factors, run by onnxruntime beside the model with the dense product."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ghn_client.factors import FactorPair
from ghn_client.onnx.fill import factorize_onnx

RANK = 3


def pair_for(shape: tuple[int, ...], *, seed: int = 0) -> FactorPair:
    """Random factors of a weight of this shape in torch's layout."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn((RANK, *shape[1:]), generator=generator)
    return FactorPair(first, torch.randn((shape[0], RANK, *(1,) * (len(shape) - 2)), generator=generator))


def model_of(nodes: list, weight: np.ndarray, inputs: list[int], others: dict[str, np.ndarray]) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(np.ascontiguousarray(weight), "weight")]
    initializers += [numpy_helper.from_array(value, name) for name, value in others.items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(inputs))],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def run(model: onnx.ModelProto, inputs: list[int]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = np.random.default_rng(0).standard_normal(inputs).astype(np.float32)
    return session.run(None, {"x": values})[0]


BIAS = {"bias": np.linspace(-1, 1, 8, dtype=np.float32)}
CASES = {
    "conv": (
        [helper.make_node("Conv", ["x", "weight", "bias"], ["y"], strides=[2, 1], pads=[1, 2, 1, 2], dilations=[1, 2])],
        (8, 6, 3, 3),
        False,
        [2, 6, 9, 9],
        BIAS,
        2,
    ),
    "conv of one dimension": ([helper.make_node("Conv", ["x", "weight"], ["y"])], (8, 6, 3), False, [2, 6, 9], {}, 2),
    "gemm, stored (out, in)": (
        [helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], transB=1, alpha=0.5, beta=2.0)],
        (8, 6),
        False,
        [4, 6],
        BIAS,
        2,
    ),
    "gemm, stored (in, out)": (
        [helper.make_node("Gemm", ["x", "weight", "bias"], ["y"])],
        (8, 6),
        True,
        [4, 6],
        BIAS,
        2,
    ),
    "matmul": ([helper.make_node("MatMul", ["x", "weight"], ["y"])], (8, 6), True, [2, 4, 6], {}, 2),
    "transpose and matmul": (
        [
            helper.make_node("Transpose", ["weight"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ],
        (8, 6),
        False,
        [2, 4, 6],
        {},
        2,
    ),
    "read twice": (
        [
            helper.make_node("MatMul", ["x", "weight"], ["a"]),
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("MatMul", ["r", "weight"], ["b"]),
            helper.make_node("Add", ["a", "b"], ["y"]),
        ],
        (8, 6),
        True,
        [2, 4, 6],
        {},
        6,
    ),
    "read by something else": (
        [helper.make_node("Relu", ["weight"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"])],
        (8, 6),
        True,
        [2, 4, 6],
        {},
        4,
    ),
    "grouped convolution": (
        [helper.make_node("Conv", ["x", "weight"], ["y"], group=2)],
        (8, 3, 3, 3),
        False,
        [1, 6, 5, 5],
        {},
        3,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_rewritten_model_computes_what_the_dense_product_does(case: str) -> None:
    nodes, shape, is_transposed, inputs, others, num_nodes = CASES[case]
    pair = pair_for(shape)
    dense = pair.dense().numpy()
    model = model_of(nodes, dense.T if is_transposed else dense, inputs, others)
    rewritten = factorize_onnx(model, {"weight": pair})
    onnx.checker.check_model(rewritten)
    np.testing.assert_allclose(run(rewritten, inputs), run(model, inputs), rtol=1e-4, atol=1e-4)
    assert len(rewritten.graph.node) == num_nodes
    assert "weight" not in {item.name for item in rewritten.graph.initializer}


def test_the_given_model_is_left_alone() -> None:
    nodes, shape, _, inputs, others, _ = CASES["conv"]
    model = model_of(nodes, pair_for(shape).dense().numpy(), inputs, others)
    before = model.SerializeToString()
    factorize_onnx(model, {"weight": pair_for(shape)})
    assert model.SerializeToString() == before


def test_a_weight_that_is_a_graph_input_becomes_initializers() -> None:
    nodes, shape, _, inputs, others, _ = CASES["conv"]
    model = model_of(nodes, pair_for(shape).dense().numpy(), inputs, others)
    expected = run(model, inputs)
    del model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, shape))
    rewritten = factorize_onnx(model, {"weight": pair_for(shape)})
    np.testing.assert_allclose(run(rewritten, inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_name_that_the_file_does_not_have_changes_nothing() -> None:
    nodes, shape, _, inputs, others, _ = CASES["conv"]
    model = model_of(nodes, pair_for(shape).dense().numpy(), inputs, others)
    assert factorize_onnx(model, {"other": pair_for(shape)}) == model


def test_factors_take_the_element_type_of_the_file() -> None:
    nodes, shape, _, inputs, others, _ = CASES["conv of one dimension"]
    model = model_of(nodes, pair_for(shape).dense().numpy(), inputs, others)
    pair = pair_for(shape)
    halves = FactorPair(pair.factor_in.half(), pair.factor_out.half())
    rewritten = factorize_onnx(model, {"weight": halves})
    assert {item.data_type for item in rewritten.graph.initializer} == {TensorProto.FLOAT}


def test_files_of_old_versions_keep_their_rules() -> None:
    nodes, shape, _, inputs, others, _ = CASES["gemm, stored (out, in)"]
    pair = pair_for(shape)
    model = model_of(nodes, pair.dense().numpy(), inputs, others)
    model.ir_version, model.opset_import[0].version = 3, 9
    for item in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)))
    onnx.checker.check_model(model)
    rewritten = factorize_onnx(model, {"weight": pair})
    onnx.checker.check_model(rewritten)
    np.testing.assert_allclose(run(rewritten, inputs), run(model, inputs), rtol=1e-4, atol=1e-4)
