"""Measures of diversity on weights whose answers are known, and the remedy that ``auto`` chooses for them."""

from __future__ import annotations

import math

import pytest
import torch

from ghn_service.graph.architecture import LayerAttributes
from ghn_service.postprocess.diversity import TensorDiversity, measure_diversity, tiled_share
from ghn_service.postprocess.steps import Step, apply_steps
from ghn_service.postprocess.weighted_layers import weighted_layers
from tests.postprocess.layer_examples import (
    ExampleLayer,
    chain_graph,
    random_parameters,
    tiled_weight,
    with_tensor,
)

HEAD = ExampleLayer("head.weight", (3, 4), is_head=True)


def measure(tensor: torch.Tensor, *, groups: int = 1) -> TensorDiversity:
    attributes = LayerAttributes(groups=groups)
    graph = chain_graph([ExampleLayer("a.weight", tuple(tensor.shape), attributes=attributes)])
    (layer,) = weighted_layers(graph)
    return measure_diversity(tensor, layer)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_tiled_weight_shows_its_block() -> None:
    measured = measure(tiled_weight(128, 256, 32))
    assert (measured.rank, measured.full_rank) == (32, 128)
    assert measured.duplicate_rows == pytest.approx(1 - 32 / 128)
    assert measured.tiled_share == pytest.approx(1 - 32 * 32 / (128 * 256))


def test_a_random_weight_is_free_of_trouble() -> None:
    measured = measure(gaussian(64, 200))
    assert measured.rank == measured.full_rank == 64
    assert measured.duplicate_rows == measured.tiled_share == 0.0
    assert measured.mean_abs_cosine == pytest.approx(measured.random_abs_cosine, rel=0.1)
    assert measured.trouble < 0.02


def test_he_normal_weights_have_the_spectral_norm_that_he_expects() -> None:
    weight = gaussian(200, 400) * (2 / 400) ** 0.5
    assert measure(weight).spectral_norm_to_he == pytest.approx(1.0, rel=0.05)


def test_copies_with_a_little_noise_are_seen_by_effective_rank_and_near_duplicates() -> None:
    noisy = tiled_weight(128, 128, 16) + 1e-3 * gaussian(128, 128)
    measured = measure(noisy)
    assert measured.rank > 100
    assert measured.duplicate_rows == 0.0
    assert measured.near_duplicate_rows == pytest.approx(1 - 16 / 128)
    assert measured.effective_rank < 20


@pytest.mark.parametrize("shape", [(6, 30), (30, 6), (12, 12)])
def test_the_rank_equals_torchs(shape: tuple[int, int]) -> None:
    weight = gaussian(shape[0], 4) @ gaussian(4, shape[1], seed=1)
    assert measure(weight).rank == int(torch.linalg.matrix_rank(weight)) == 4


def test_the_singular_values_equal_torchs() -> None:
    weight = gaussian(10, 24)
    expected = torch.linalg.svdvals(weight)
    result = torch.tensor(measure(weight).singular_values)
    torch.testing.assert_close(result, expected / expected[0], rtol=1e-4, atol=1e-5)


def test_groups_are_measured_apart() -> None:
    group = gaussian(4, 3, 3, 3)
    same_in_both = measure(torch.cat([group, group]), groups=2)
    assert same_in_both.duplicate_rows == 0.0
    assert measure(torch.cat([group, group])).duplicate_rows == 0.5


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (torch.zeros(4, 4), 15 / 16),
        (torch.ones(6, 5), 29 / 30),
        (gaussian(7, 3).repeat(2, 1)[:10], 0.3),
        (gaussian(4, 3, 3, 3).repeat(1, 2, 1, 1), 0.5),
        (gaussian(5, 5), 0.0),
    ],
)
def test_the_tiled_share(weight: torch.Tensor, expected: float) -> None:
    assert tiled_share(weight) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weight", "outcome", "word"),
    [
        (tiled_weight(32, 64, 8), "changed", "tiled"),
        (gaussian(32, 4) @ gaussian(4, 64, seed=1), "changed", "rank 4 of 32"),
        (gaussian(32, 64) + 4.0, "changed", "alike"),
        (gaussian(32, 64), "kept", "diverse"),
        (torch.zeros(32, 64), "kept", "zero"),
    ],
    ids=["tiled", "low rank", "alike", "random", "zero"],
)
def test_auto_does_what_a_layer_calls_for_and_says_why(weight: torch.Tensor, outcome: str, word: str) -> None:
    graph = chain_graph([ExampleLayer("a.weight", (32, 64)), HEAD])
    parameters = with_tensor(random_parameters(graph), "a.weight", weight)
    _, (record,) = apply_steps(parameters, graph, [Step("auto", {"layer": "1"})], seed=0)
    assert record.layers[0].outcome == outcome
    assert word in record.layers[0].reason


def test_auto_repairs_a_tiled_layer_and_keeps_its_scale() -> None:
    graph = chain_graph([ExampleLayer("a.weight", (64, 64)), HEAD])
    weight = 0.02 * tiled_weight(64, 64, 8)
    parameters = with_tensor(random_parameters(graph), "a.weight", weight)
    repaired, _ = apply_steps(parameters, graph, [Step("auto")], seed=0)
    measured = measure(repaired["a.weight"])
    assert measured.rank == 64
    assert measured.trouble < 0.05
    assert measured.rms == pytest.approx(float(weight.square().mean().sqrt()), rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [((160, 40), LayerAttributes()), ((64, 1, 5, 5), LayerAttributes(groups=64))],
    ids=["more rows than columns", "depthwise"],
)
def test_auto_parts_copies_that_no_orthogonal_matrix_can(shape: tuple[int, ...], attributes: LayerAttributes) -> None:
    layer = ExampleLayer("a.weight", shape, attributes=attributes)
    graph = chain_graph([layer, HEAD])
    copies = gaussian(shape[0] // 4, math.prod(shape[1:])).repeat(4, 1).reshape(shape)
    parameters = with_tensor(random_parameters(graph), "a.weight", copies)
    repaired, _ = apply_steps(parameters, graph, [Step("auto")], seed=0)
    weighted = next(weighted_layers(graph))
    assert measure_diversity(parameters["a.weight"], weighted).near_duplicate_rows == pytest.approx(0.75)
    assert measure_diversity(repaired["a.weight"], weighted).near_duplicate_rows == 0.0


def test_auto_treats_each_layer_alike_whatever_the_others_are() -> None:
    graph = chain_graph([ExampleLayer("a.weight", (16, 16)), ExampleLayer("b.weight", (16, 16)), HEAD])
    parameters = with_tensor(random_parameters(graph), "b.weight", tiled_weight(16, 16, 4))
    with_copies = with_tensor(parameters, "a.weight", tiled_weight(16, 16, 4, seed=1))
    first, second = (apply_steps(values, graph, [Step("auto")], seed=0)[0] for values in (parameters, with_copies))
    assert torch.equal(first["b.weight"], second["b.weight"])
