"""The diversity report: before and after, worst layers first, and words that fit the numbers."""

from __future__ import annotations

import json

import pytest
import torch

from ghn_service.postprocess.diversity import build_report, measure_network
from ghn_service.postprocess.steps import Step, apply_steps
from tests.postprocess.layer_examples import ExampleLayer, chain_graph, random_parameters, tiled_weight, with_tensor

LAYERS = (
    ExampleLayer("good.weight", (32, 48)),
    ExampleLayer("tiled.weight", (64, 64)),
    ExampleLayer("huge.weight", (32, 48)),
    ExampleLayer("head.weight", (10, 32), is_head=True),
)


def report(*steps: Step) -> dict:
    graph = chain_graph(LAYERS)
    parameters = with_tensor(random_parameters(graph), "tiled.weight", tiled_weight(64, 64, 8))
    parameters = with_tensor(parameters, "huge.weight", 100 * parameters["good.weight"])
    before = measure_network(parameters, graph)
    changed, records = apply_steps(parameters, graph, steps, seed=0)
    after = measure_network(changed, graph)
    return build_report(graph, before, after, origins=parameters.origins, records=records)


def test_the_worst_layer_comes_first() -> None:
    assert report()["layers"][0]["parameter"] == "tiled.weight"


def test_notes_say_what_is_wrong() -> None:
    notes = {entry["parameter"]: " ".join(entry["notes"]) for entry in report()["layers"]}
    assert "rank 8 of 64" in notes["tiled.weight"]
    assert "spectral norm" in notes["huge.weight"]
    assert notes["good.weight"] == ""


def test_the_summary_counts_before_and_after() -> None:
    body = report(Step("auto"))
    assert body["summary"]["before"]["troubled_layers"] == 1
    assert body["summary"]["after"]["troubled_layers"] == 0
    assert body["summary"]["before"]["rank"] < body["summary"]["after"]["rank"] == body["summary"]["after"]["full_rank"]


def test_each_layer_says_what_every_step_did() -> None:
    entry = next(item for item in report(Step("noise"), Step("auto"))["layers"] if item["parameter"] == "tiled.weight")
    assert [action["step"] for action in entry["actions"]] == ["noise", "auto"]
    assert entry["actions"][1]["outcome"] == "changed"


def test_the_report_is_finite_json() -> None:
    body = json.loads(json.dumps(report(Step("auto")), allow_nan=False))
    assert body["format"] == "ghn-prediction-report/1"
    assert len(body["layers"]) == len(LAYERS)
    assert body["layers"][0]["before"]["singular_values"][0] == 1.0


def test_a_weight_of_zeros_and_a_tiny_weight_are_measured_without_a_fault() -> None:
    graph = chain_graph([ExampleLayer("zero.weight", (4, 4)), ExampleLayer("one.weight", (1, 1))])
    parameters = with_tensor(random_parameters(graph), "zero.weight", torch.zeros(4, 4))
    measured = measure_network(parameters, graph)
    body = build_report(graph, measured, measured, origins=parameters.origins, records=())
    assert json.dumps(body, allow_nan=False)
    assert body["layers"][0]["notes"] == ["all values are zero"]
    assert measured["zero.weight"].effective_rank == pytest.approx(0.0)


def test_the_report_of_a_huge_network_fits_into_one_message() -> None:
    graph = chain_graph([ExampleLayer(f"block.{index}.projection.weight", (6, 6)) for index in range(2500)])
    parameters = random_parameters(graph)
    measured = measure_network(parameters, graph)
    _, records = apply_steps(parameters, graph, [Step("noise"), Step("orthogonal")], seed=0)
    body = build_report(graph, measured, measured, origins=parameters.origins, records=records)
    assert body["layers_left_out"] == 1000
    assert len(json.dumps(body)) < 3_500_000
