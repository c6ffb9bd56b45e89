"""Attention with the products of trained transformers, however its projections are stored."""

from __future__ import annotations

import itertools

import pytest
import torch

from ghn_service.graph.architecture import AttentionRole, LayerAttributes
from ghn_service.postprocess.mimetic import _factors
from ghn_service.postprocess.steps import Step, apply_steps
from tests.postprocess.layer_examples import ExampleLayer, chain_graph, random_parameters

CHANNELS, HEADS = 48, 3
NAMES = ("query", "key", "value")


def role(name: str, number: int, heads: int = HEADS) -> LayerAttributes:
    packed = 3 if name == "query_key_value" else 1
    return LayerAttributes(packed=packed, attention=AttentionRole(number, heads, name))


def drawn(*, is_packed: bool, seed: int = 0, number: int = 1, **options: str) -> dict[str, torch.Tensor]:
    """Query, key, value and output weights after the step."""
    square, stacked = (CHANNELS, CHANNELS), (3 * CHANNELS, CHANNELS)
    layers = [ExampleLayer(f"{name}.weight", square, attributes=role(name, number)) for name in (*NAMES, "output")]
    if is_packed:
        layers[:3] = [ExampleLayer("packed.weight", stacked, attributes=role("query_key_value", number))]
    graph = chain_graph(layers)
    parameters, _ = apply_steps(random_parameters(graph), graph, [Step("mimetic", options)], seed=seed)
    if is_packed:
        parts = zip(NAMES, parameters["packed.weight"].chunk(3), strict=True)
        return {**dict(parts), "output": parameters["output.weight"]}
    return {name: parameters[f"{name}.weight"] for name in (*NAMES, "output")}


def products(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """W_Q^T W_K of each head, and W_O W_V."""
    pairs = zip(weights["query"].chunk(HEADS), weights["key"].chunk(HEADS), strict=True)
    return [*(query.T @ key for query, key in pairs), weights["output"] @ weights["value"]]


@pytest.mark.parametrize("is_packed", [True, False])
def test_products_have_the_diagonals_of_trained_attention(is_packed: bool) -> None:
    *heads, last = products(drawn(is_packed=is_packed))
    for product in heads:
        assert torch.linalg.matrix_rank(product) == CHANNELS // HEADS
        outside = product - torch.diag(product.diagonal())
        assert product.diagonal().mean() > 2 * outside.abs().mean()
    assert last.diagonal().mean() == pytest.approx(-0.4, abs=0.05)
    assert (last + 0.4 * torch.eye(CHANNELS)).std() == pytest.approx(0.4 / CHANNELS**0.5, rel=0.1)
    for one, other in itertools.combinations(heads, 2):
        assert not torch.allclose(one, other, atol=1e-2)


def test_stored_together_or_apart_the_weights_are_the_same() -> None:
    packed, apart = drawn(is_packed=True), drawn(is_packed=False)
    assert all(torch.equal(packed[name], apart[name]) for name in packed)


def test_seeds_and_attentions_differ() -> None:
    first, other, second = drawn(is_packed=True), drawn(is_packed=True, seed=1), drawn(is_packed=True, number=2)
    assert torch.equal(first["query"], drawn(is_packed=True)["query"])
    assert not torch.allclose(first["query"], other["query"], atol=1e-2)
    assert not torch.allclose(first["query"], second["query"], atol=1e-2)


def test_without_noise_the_products_are_multiples_of_the_identity() -> None:
    nothing = {"query_key_noise": "0", "value_output_noise": "0"}
    *_, last = products(drawn(is_packed=True, **nothing, value_output_identity="0.3"))
    assert torch.allclose(last, -0.3 * torch.eye(CHANNELS), atol=1e-5)


@pytest.mark.parametrize("rank", [4, 20, 64])
def test_factors_are_the_best_of_their_rank(rank: int) -> None:
    left, right = _factors(64, rank, 0.7, 0.7, seed=0)
    whole_left, whole_right = _factors(64, 64, 0.7, 0.7, seed=0)
    sizes = torch.linalg.svdvals(whole_left.T @ whole_right)
    assert torch.linalg.svdvals(left.T @ right)[:rank].square().sum() > 0.98 * sizes[:rank].square().sum()
    assert torch.allclose(left.norm(dim=1), right.norm(dim=1), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ((48, 48), LayerAttributes()),
        ((48, 48), role("query", 1, heads=5)),
        ((24, 48), role("output", 1)),
        ((6, 100_000), role("key", 1)),  # would take 40 GB
        ((256, 256), role("value", 1, heads=256)),
    ],
)
def test_other_layers_stay(shape: tuple[int, int], attributes: LayerAttributes) -> None:
    graph = chain_graph([ExampleLayer("layer.weight", shape, attributes=attributes)])
    parameters = random_parameters(graph)
    kept, (record,) = apply_steps(parameters, graph, [Step("mimetic")], seed=0)
    assert torch.equal(kept["layer.weight"], parameters["layer.weight"])
    assert record.layers[0].outcome == "kept"
