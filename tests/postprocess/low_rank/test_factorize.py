"""Factors of single layers: the published identities, the table of losses, and impossible requests."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghn_service.errors import InvalidOptionError
from ghn_service.postprocess.low_rank import kernels
from ghn_service.postprocess.low_rank.factorize import METHODS, decompose, factorize, relative_function_error
from ghn_service.postprocess.low_rank.kernels import activation_kernel, arc_cosine_kernel

# (inputs, width, rank): relative loss of spectral, rescaled and optimised factors of He-normal weights.
TABLE = {
    (64, 64, 1): (0.8750, 0.8153, 0.8120),
    (64, 512, 4): (0.7905, 0.7562, 0.7555),
    (256, 256, 4): (0.8494, 0.8024, 0.8012),
    (256, 256, 32): (0.5327, 0.5268, 0.5268),
    (576, 256, 4): (0.8758, 0.8221, 0.8203),
    (576, 256, 32): (0.6132, 0.6030, 0.6029),
}


def he_normal(width: int, inputs: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((width, inputs), generator=generator) * math.sqrt(2 / inputs)


def error(weight: torch.Tensor, rank: int, method: str, activation: str = "relu") -> float:
    u, v = factorize(weight, rank, method=method, activation=activation)
    return relative_function_error(weight, u, v, activation=activation)


@pytest.mark.parametrize("shape", TABLE, ids=str)
def test_the_table_of_relative_losses_is_reproduced(shape: tuple[int, int, int]) -> None:
    inputs, width, rank = shape
    weight = he_normal(width, inputs)
    losses = [error(weight, rank, method) for method in ("spectral", "function", "function_optimized")]
    # A small layer's loss differs from draw to draw by a few parts in a thousand.
    assert losses == pytest.approx(TABLE[shape], abs=6e-3 if inputs * width < 10_000 else 3e-3)


def test_spectral_factors_are_the_truncated_singular_value_decomposition_balanced() -> None:
    weight = he_normal(20, 50)
    u, v = factorize(weight, 6, method="spectral")
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(u @ v.T, left[:, :6] @ torch.diag(values[:6]) @ right[:6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 30), (30, 9), (12, 12)])
def test_full_rank_factors_give_the_weight_back(shape: tuple[int, int]) -> None:
    weight = he_normal(*shape)
    for method in METHODS:
        u, v = factorize(weight, min(shape), method=method)
        torch.testing.assert_close(u @ v.T, weight, rtol=1e-4, atol=1e-5)


def row_losses(weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor, activation: str) -> torch.Tensor:
    wanted, product = weight.double(), u.double() @ v.double().T
    target, length = wanted.norm(dim=1), product.norm(dim=1)
    cosine = ((wanted * product).sum(dim=1) / (target * length).clamp_min(1e-30)).clamp(-1, 1)
    return activation_kernel(activation).loss(target, length, cosine)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 40),
    columns=st.integers(2, 40),
    rank=st.integers(1, 40),
    seed=st.integers(0, 1000),
    activation=st.sampled_from(["relu", "leaky_relu", "gelu", "silu", "tanh", ""]),
)
def test_no_method_is_above_spectral_in_any_row(rows: int, columns: int, rank: int, seed: int, activation: str) -> None:
    weight, rank = he_normal(rows, columns, seed=seed), min(rank, rows, columns)
    spectral, rescaled = (
        row_losses(weight, *factorize(weight, rank, method=method, activation=activation), activation)
        for method in ("spectral", "function")
    )
    assert bool((rescaled <= spectral + 1e-6).all())


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_optimising_never_ends_above_its_start(activation: str) -> None:
    weight = he_normal(48, 64)
    errors = [error(weight, 3, method, activation) for method in ("spectral", "function", "function_optimized")]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[1]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_optimising_works_within_inference_mode(activation: str) -> None:
    kernels.gauss_hermite.cache_clear()
    with torch.inference_mode():
        within = error(he_normal(24, 32), 3, "function_optimized", activation)
    assert error(he_normal(24, 32), 3, "function_optimized", activation) == pytest.approx(within, rel=1e-4)


def test_the_rescaled_row_has_the_length_of_the_arc_cosine_kernel() -> None:
    weight = he_normal(10, 40)
    spectral_u, spectral_v = factorize(weight, 4, method="spectral")
    u, v = factorize(weight, 4, method="function", activation="relu")
    cosine = (spectral_u @ spectral_v.T).norm(dim=1) / weight.norm(dim=1)
    torch.testing.assert_close((u @ v.T).norm(dim=1), weight.norm(dim=1) * arc_cosine_kernel(cosine), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_scaled_factors_are_spectral_ones_with_the_norm_of_the_weight(shape: tuple[int, int]) -> None:
    weight = he_normal(*shape)
    spectral, (u, v) = factorize(weight, 4, method="spectral"), factorize(weight, 4, method="scaled")
    assert float((u @ v.T).norm()) == pytest.approx(float(weight.norm()), rel=1e-5)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=0), rtol=1e-4, atol=1e-5)
    direction, expected = (product / product.norm() for product in (u @ v.T, spectral[0] @ spectral[1].T))
    torch.testing.assert_close(direction, expected, rtol=1e-4, atol=1e-6)


def test_without_an_activation_spectral_is_optimal_and_the_methods_agree() -> None:
    weight = he_normal(16, 24)
    spectral, function = (factorize(weight, 5, method=method, activation="") for method in ("spectral", "function"))
    torch.testing.assert_close(function[0] @ function[1].T, spectral[0] @ spectral[1].T, rtol=1e-4, atol=1e-5)


def test_the_loss_equals_its_monte_carlo_estimate() -> None:
    weight = he_normal(30, 20)
    u, v = factorize(weight, 3)
    inputs = torch.randn((60_000, 20), generator=torch.Generator().manual_seed(1))
    sampled = ((inputs @ v @ u.T).relu() - (inputs @ weight.T).relu()).square().mean(dim=0).sum()
    of_output = 0.5 * float(weight.square().sum())  # E|relu(W x)|^2
    assert relative_function_error(weight, u, v) * of_output == pytest.approx(float(sampled), rel=0.01)


def test_a_convolution_is_factored_over_its_flattened_kernel() -> None:
    weight = he_normal(16, 72).reshape(16, 8, 3, 3)
    u, v = factorize(weight, 5)
    assert (tuple(u.shape), tuple(v.shape)) == ((16, 5), (72, 5))


def test_a_rank_deficient_weight_gives_finite_factors_and_loses_nothing() -> None:
    weight = he_normal(16, 4) @ he_normal(4, 20, seed=1)
    u, v = factorize(weight, 8)
    assert bool(torch.isfinite(u).all() and torch.isfinite(v).all())
    torch.testing.assert_close(u @ v.T, weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_zeros_gives_finite_factors(method: str) -> None:
    u, v = factorize(torch.zeros(4, 6), 2, method=method)
    assert torch.equal(u @ v.T, torch.zeros(4, 6))


@pytest.mark.parametrize("shape", [(24, 100), (100, 24)])
def test_the_fast_decomposition_equals_the_full_one(shape: tuple[int, int]) -> None:
    weight = he_normal(*shape)
    left, values, right = decompose(weight).truncated(10)
    torch.testing.assert_close(values, torch.linalg.svdvals(weight)[:10], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(left.T @ left, torch.eye(10), rtol=0, atol=1e-5)
    torch.testing.assert_close(right.T @ right, torch.eye(10), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "arguments", "field"),
    [
        (he_normal(4, 6), {"rank": 0}, "rank"),
        (he_normal(4, 6), {"rank": 5}, "rank"),
        (he_normal(4, 6), {"rank": -1}, "rank"),
        (he_normal(4, 6), {"rank": math.nan}, "rank"),
        (he_normal(4, 6), {"rank": 2, "method": "magic"}, "method"),
        (he_normal(4, 6), {"rank": 2, "activation": "magic"}, "activation"),
        (he_normal(4, 6) * math.nan, {"rank": 2}, "weight"),
        (torch.zeros(4), {"rank": 1}, "weight"),
    ],
)
def test_an_impossible_request_is_refused_with_the_field_named(
    weight: torch.Tensor, arguments: dict, field: str
) -> None:
    with pytest.raises(InvalidOptionError) as error:
        factorize(weight, **arguments)
    assert error.value.field == field
