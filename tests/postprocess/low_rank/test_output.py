"""Factored networks: names, shapes, products, what stays dense, and what the records say."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

from ghn_service.errors import InvalidOptionError
from ghn_service.graph.architecture import LayerAttributes
from ghn_service.postprocess.low_rank import output
from ghn_service.postprocess.low_rank.factorize import decompose
from ghn_service.postprocess.low_rank.output import FactorRecord, apply_low_rank, encode_low_rank_record
from ghn_service.postprocess.low_rank.ranks import RANK_RULES, LowRank
from tests.postprocess.layer_examples import ExampleLayer, chain_graph, random_parameters

RELU = LayerAttributes(activation="relu", positions=4)
LAYERS = (
    ExampleLayer("conv.weight", (16, 8, 3, 3), attributes=RELU),
    ExampleLayer("linear.weight", (40, 32), attributes=RELU),
    ExampleLayer("transposed.weight", (32, 40), (1, 0), attributes=RELU),
    ExampleLayer(
        "normed.weight", (40, 32), attributes=LayerAttributes(activation="relu", normalized=True, positions=4)
    ),
    ExampleLayer("last.weight", (40, 32), attributes=LayerAttributes(positions=4)),
    ExampleLayer("odd.weight", (40, 32), attributes=LayerAttributes(activation="prelu", positions=4)),
    ExampleLayer("grouped.weight", (16, 4, 3, 3), attributes=LayerAttributes(groups=2, activation="relu", positions=4)),
    ExampleLayer("narrow.weight", (2, 2), attributes=RELU),
    ExampleLayer("head.weight", (10, 40), is_head=True, attributes=LayerAttributes(positions=1)),
)


def factored(kind: str = "rank", value: float = 3, method: str = "function", layers: tuple = LAYERS):
    graph = chain_graph(layers)
    parameters = random_parameters(graph)
    result, record = apply_low_rank(parameters, graph, LowRank(kind, value, method, with_curves=True))
    return parameters, result, {layer.parameter: layer for layer in record.layers}, record


def test_factors_stand_in_the_place_of_their_weight() -> None:
    parameters, result, records, _ = factored()
    assert "linear.weight" not in result
    assert records["linear.weight"].factors == ("linear.weight.factor_in", "linear.weight.factor_out")
    assert list(result)[:4] == [
        "conv.weight.factor_in",
        "conv.weight.factor_out",
        "conv.bias",
        "linear.weight.factor_in",
    ]
    assert torch.equal(result["linear.bias"], parameters["linear.bias"])


def test_the_factors_of_a_convolution_are_two_convolutions() -> None:
    _, result, _, _ = factored()
    first, second = result["conv.weight.factor_in"], result["conv.weight.factor_out"]
    assert (tuple(first.shape), tuple(second.shape)) == ((3, 8, 3, 3), (16, 3, 1, 1))
    inputs = torch.randn((2, 8, 6, 6), generator=torch.Generator().manual_seed(0))
    product = (second.flatten(1) @ first.flatten(1)).reshape(16, 8, 3, 3)
    in_two_steps = functional.conv2d(functional.conv2d(inputs, first, stride=2, padding=1), second)
    torch.testing.assert_close(in_two_steps, functional.conv2d(inputs, product, stride=2, padding=1))


def test_full_energy_gives_the_weight_back_where_factors_are_made() -> None:
    layers = (ExampleLayer("thin.weight", (200, 30), attributes=RELU),)
    graph = chain_graph(layers)
    parameters = random_parameters(graph)
    low_rank = torch.randn(200, 5) @ torch.randn(5, 30)
    tensors = {**parameters, "thin.weight": low_rank}
    parameters = type(parameters)(parameters.specs, tensors, parameters.origins)
    result, _ = apply_low_rank(parameters, graph, LowRank("energy", 0.999999, "spectral"))
    product = result["thin.weight.factor_out"] @ result["thin.weight.factor_in"]
    torch.testing.assert_close(product, low_rank, rtol=1e-2, atol=2e-2)


def test_a_transposed_weight_has_factors_in_torchs_layout() -> None:
    _, result, _, _ = factored()
    assert tuple(result["transposed.weight.factor_in"].shape) == (3, 32)
    assert tuple(result["transposed.weight.factor_out"].shape) == (40, 3)


@pytest.mark.parametrize("name", ["grouped.weight", "narrow.weight", "head.weight"])
def test_layers_that_would_not_gain_stay_dense_and_say_why(name: str) -> None:
    parameters, result, records, _ = factored()
    assert torch.equal(result[name], parameters[name])
    assert records[name].chosen.rank == 0
    assert records[name].note


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("linear.weight", "function"),
        ("normed.weight", "spectral"),
        ("last.weight", "spectral"),
        ("odd.weight", "spectral"),
    ],
)
def test_the_method_is_the_one_that_can_matter(name: str, method: str) -> None:
    _, _, records, _ = factored()
    record: FactorRecord = records[name]
    assert record.method == method
    assert bool(record.note) == (method == "spectral")


@pytest.mark.parametrize("method", ["scaled", "function", "function_optimized"])
def test_a_forced_method_is_used_behind_which_a_normalisation_follows(method: str) -> None:
    graph = chain_graph(LAYERS)
    parameters = random_parameters(graph)
    results = {
        force: apply_low_rank(parameters, graph, LowRank("rank", 3, method, force=force)) for force in (False, True)
    }
    methods = {
        force: {layer.parameter: layer.method for layer in record.layers} for force, (_, record) in results.items()
    }
    assert methods[False]["normed.weight"] == "spectral"
    assert methods[True]["normed.weight"] == method
    plain, forced = (results[force][0]["normed.weight.factor_out"] for force in (False, True))
    assert not torch.equal(plain, forced)


def test_the_function_method_has_less_error_than_spectral() -> None:
    _, _, function, _ = factored(method="function")
    _, _, spectral, _ = factored(method="spectral")
    assert function["linear.weight"].chosen.function_error < spectral["linear.weight"].chosen.function_error
    normed = [records["normed.weight"].chosen.function_error for records in (function, spectral)]
    assert normed[0] == pytest.approx(normed[1])


def test_costs_are_counted() -> None:
    _, result, records, _ = factored()
    record = records["linear.weight"]
    assert (record.dense.parameters, record.chosen.parameters) == (40 * 32, 3 * (40 + 32))
    assert (record.dense.multiply_adds, record.chosen.multiply_adds) == (40 * 32 * 4, 3 * (40 + 32) * 4)
    weights = sum(tensor.numel() for name, tensor in result.items() if "weight" in name)
    assert sum(item.chosen.parameters for item in records.values()) == weights


@pytest.mark.parametrize("budget", [4000, 6000, 9000])
def test_a_parameter_budget_is_met_by_the_whole_network(budget: int) -> None:
    _, result, _, _ = factored("parameter_budget", budget)
    total = sum(tensor.numel() for tensor in result.values())
    assert 0.9 * budget <= total <= budget


def test_a_multiply_add_budget_is_met_by_the_whole_network() -> None:
    _, _, records, _ = factored("multiply_add_budget", 20_000)
    assert 18_000 <= sum(record.chosen.multiply_adds for record in records.values()) <= 20_000


def test_a_multiply_add_budget_needs_known_positions() -> None:
    layers = (ExampleLayer("a.weight", (40, 32)), ExampleLayer("b.weight", (40, 32)))
    with pytest.raises(InvalidOptionError) as error:
        factored("multiply_add_budget", 1000, layers=layers)
    assert error.value.field == "low_rank.multiply_add_budget"


@pytest.mark.parametrize(("kind", "value"), [("rank", 33), ("parameter_budget", 500)])
def test_what_no_layer_can_meet_is_refused(kind: str, value: float) -> None:
    with pytest.raises(InvalidOptionError) as error:
        factored(kind, value)
    assert error.value.field == f"low_rank.{kind}"


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InvalidOptionError) as error:
        LowRank("rank", 1, "magic")
    assert error.value.field == "low_rank.method"


def test_the_record_survives_json() -> None:
    _, _, _, record = factored()
    body = json.loads(json.dumps(encode_low_rank_record(record)))
    assert body["layers"][0]["factors"] == ["conv.weight.factor_in", "conv.weight.factor_out"]
    assert body["layers"][0]["shape"] == [16, 8, 3, 3]


def test_the_scaled_method_is_used_where_no_normalisation_cancels_it() -> None:
    parameters, result, records, _ = factored(method="scaled")
    methods = {name: record.method for name, record in records.items() if record.chosen.rank}
    assert {name for name, method in methods.items() if method == "spectral"} == {"normed.weight"}
    product = result["last.weight.factor_out"] @ result["last.weight.factor_in"]
    assert float(product.norm()) == pytest.approx(float(parameters["last.weight"].norm()), rel=1e-5)


@pytest.mark.parametrize("method", ["spectral", "scaled", "function"])
def test_the_curve_tells_what_other_ranks_would_give(method: str) -> None:
    _, _, records, _ = factored("fraction", 0.25, method)
    record = records["linear.weight"]
    at_quarter = next(cost for cost in record.curve if cost.rank == record.chosen.rank == 8)
    assert at_quarter.function_error == pytest.approx(record.chosen.function_error, abs=1e-5)
    assert (at_quarter.parameters, at_quarter.multiply_adds) == (8 * 72, 8 * 72 * 4)
    assert all(cost.parameters < record.dense.parameters for cost in record.curve)
    assert records["head.weight"].curve == records["narrow.weight"].curve == ()


@pytest.mark.parametrize("rule", RANK_RULES)
def test_each_weight_is_decomposed_once(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decomposed: list[tuple[int, ...]] = []

    def counting(weight: torch.Tensor) -> output.Decomposition:
        decomposed.append(tuple(weight.shape))
        return decompose(weight)

    monkeypatch.setattr(output, "decompose", counting)
    values = {"rank": 3, "parameter_budget": 6000, "multiply_add_budget": 20_000}
    factored(rule, values.get(rule, 0.5))
    assert sorted(decomposed) == [(16, 72), *[(40, 32)] * 5]


def test_factoring_ends_between_two_layers_when_nobody_wants_it() -> None:
    class UnwantedError(Exception):
        pass

    def refuse() -> None:
        raise UnwantedError

    graph = chain_graph((ExampleLayer("thin.weight", (200, 30), attributes=RELU),))
    for request in (LowRank("rank", 3, "spectral"), LowRank("parameter_budget", 5000, "spectral")):
        with pytest.raises(UnwantedError):
            apply_low_rank(random_parameters(graph), graph, request, on_layer=refuse)
