"""Planning ranks for an ONNX file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from ghn_client.errors import InvalidArchitectureError, InvalidOptionError
from ghn_client.plan_rank import plan_json, plan_rank, plan_summary, plan_svg, plan_table

WEIGHTS = {"conv.weight": (32, 3, 3, 3), "fc1.weight": (64, 32), "fc2.weight": (10, 64)}


@pytest.fixture
def model() -> bytes:
    """Convolution, ReLU, pooling, two linear layers; weights as graph inputs."""
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "fc1.weight", "fc1.bias"], ["e"], transB=1),
        helper.make_node("Relu", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "fc2.weight"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in WEIGHTS.items()]
        + [numpy_helper.from_array(np.zeros(64, np.float32), "fc1.bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    return onnx.shape_inference.infer_shapes(model).SerializeToString()


def test_every_layer_has_an_error_that_falls_with_rank(model: bytes) -> None:
    plan = plan_rank(model)
    assert [entry["parameter"] for entry in plan["layers"]] == list(WEIGHTS)
    for entry in plan["layers"][:2]:
        errors = [point["function_error"] for point in entry["points"]]
        assert errors == sorted(errors, reverse=True)
        assert entry["activation"] == "relu"


def test_multiply_adds_count_positions(model: bytes) -> None:
    plan = plan_rank(model)
    assert plan["network"]["multiply_adds"] == 16 * 16 * 32 * 27 + 64 * 32 + 640


def test_a_rule_shows_its_choice(model: bytes) -> None:
    plan = plan_rank(model, rule=("fraction", 0.25))
    assert [entry["chosen_rank"] for entry in plan["layers"]] == [7, 8, 0]
    assert plan["chosen"]["parameters"] == 7 * (32 + 27) + 8 * (64 + 32) + 640 + 64
    assert "fewer" in plan_summary(plan)


def test_predicted_weights_are_used_where_given(model: bytes, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in WEIGHTS.items()}
    tensors["fc1.bias"] = torch.zeros(64)
    tensors["fc1.weight"] = torch.ones(64, 1) @ torch.randn(1, 32, generator=generator)
    save_file(tensors, tmp_path / "w.safetensors")
    plan = plan_rank(model, weights=tmp_path / "w.safetensors")
    assert plan["layers"][1]["points"][0]["function_error"] == pytest.approx(0.0, abs=1e-5)


def test_the_table_has_a_cell_for_every_column(model: bytes) -> None:
    for rule in (None, ("rank", 4)):
        columns, rows = plan_table(plan_rank(model, rule=rule))
        assert {len(row) for row in rows} == {len(columns)}


def test_the_table_tells_what_a_rank_saves_and_explains_its_marks(model: bytes) -> None:
    plan = plan_rank(model, rule=("fraction", 0.25))
    columns, (conv, _, classifier) = plan_table(plan)
    cells = dict(zip(columns, conv, strict=True))
    assert cells["at 0.25"].endswith(f"{7 * (32 + 27) / (32 * 27) - 1:+.0%}")
    assert cells["parameters"] == "864 > 413"
    assert cells["multiply-adds"] == "221k > 106k"
    assert classifier[-1] == "a"
    assert plan_summary(plan).splitlines()[-1] == f"a: {plan['layers'][2]['note']}"


def test_the_plot_marks_the_chosen_ranks(model: bytes) -> None:
    assert plan_svg(plan_rank(model, rule=("fraction", 0.25))).count("<circle") == 2


def test_json_and_plot_are_written(model: bytes) -> None:
    plan = plan_rank(model)
    assert json.loads(plan_json(plan))["format"] == "ghn-rank-plan/1"
    assert plan_svg(plan).count("<polyline") == 2


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"rule": ("rank", 0)}, "low_rank.rank"),
        ({"rule": ("parameter_budget", 10)}, "low_rank.parameter_budget"),
        ({"rule": ("rang", 1)}, "low_rank.rank_rule"),
        ({"method": "magic"}, "low_rank.method"),
        ({"fractions": [0.5, 2.0]}, "fractions"),
        ({"weights": "nowhere.safetensors"}, "weights"),
    ],
)
def test_impossible_options_are_refused_with_the_field_named(model: bytes, options: dict, field: str) -> None:
    with pytest.raises(InvalidOptionError) as error:
        plan_rank(model, **options)
    assert error.value.field == field


def test_a_file_that_is_no_network_is_refused() -> None:
    with pytest.raises(InvalidArchitectureError):
        plan_rank(b"not a model")
    with pytest.raises(InvalidArchitectureError):
        plan_rank(onnx.ModelProto().SerializeToString())
