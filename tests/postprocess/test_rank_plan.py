"""The plan of ranks of a network: it says what factoring the network then does."""

from __future__ import annotations

import json

import pytest
import torch

from ghn_service.graph.architecture import LayerAttributes
from ghn_service.postprocess.low_rank_output import apply_low_rank
from ghn_service.postprocess.low_rank_plan import LowRank
from ghn_service.postprocess.rank_allocation import RankRule
from ghn_service.postprocess.rank_plan import he_normal_parameters, plan_ranks
from tests.postprocess.layer_examples import ExampleLayer, chain_graph

RELU = LayerAttributes(activation="relu", positions=9)
GRAPH = chain_graph(
    [
        ExampleLayer("conv.weight", (32, 16, 3, 3), attributes=RELU),
        ExampleLayer("transposed.weight", (48, 64), (1, 0), attributes=RELU),
        ExampleLayer("head.weight", (10, 64), is_head=True, attributes=LayerAttributes(positions=1)),
    ]
)
PARAMETERS = he_normal_parameters(GRAPH, generator=torch.Generator().manual_seed(0))


def test_the_plan_tells_what_factoring_does() -> None:
    request = LowRank(RankRule("fraction", 0.25))
    plan = plan_ranks(PARAMETERS, GRAPH, request=request)
    result, record = apply_low_rank(PARAMETERS, GRAPH, request)
    assert plan["chosen"]["parameters"] == sum(tensor.numel() for tensor in result.values())
    for entry, layer in zip(plan["layers"], record.layers, strict=True):
        assert entry["chosen_rank"] == layer.rank
        errors = [point["function_error"] for point in entry["points"] if point["rank"] == layer.rank]
        assert errors == ([pytest.approx(layer.function_error, abs=1e-5)] if layer.rank else [])


def test_the_break_even_rank_is_the_last_that_is_smaller() -> None:
    for entry in plan_ranks(PARAMETERS, GRAPH)["layers"]:
        rows, columns = entry["shape"][0], entry["parameters"] // entry["shape"][0]
        rank = entry["break_even_rank"]
        assert rank * (rows + columns) < rows * columns <= (rank + 1) * (rows + columns)


def test_the_classifier_is_listed_as_dense_and_the_plan_is_json() -> None:
    plan = json.loads(json.dumps(plan_ranks(PARAMETERS, GRAPH), allow_nan=False))
    assert [entry["stays_dense"] for entry in plan["layers"]] == [False, False, True]
    assert plan["network"]["multiply_adds"] == 9 * (32 * 16 * 9 + 48 * 64) + 640


def test_he_normal_weights_have_the_variance_of_their_fan_in_in_either_layout() -> None:
    transposed = PARAMETERS["transposed.weight"]
    assert tuple(transposed.shape) == (48, 64)
    assert float(transposed.std()) == pytest.approx((2 / 48) ** 0.5, rel=0.05)
