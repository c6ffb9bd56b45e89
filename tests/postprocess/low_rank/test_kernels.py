"""Closed forms and quadratures of activation kernels, against sampling, finer rules, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from ghn_service.errors import InvalidOptionError
from ghn_service.postprocess.low_rank.kernels import (
    ACTIVATION_KERNELS,
    ActivationKernel,
    Quadrature,
    activation_kernel,
    arc_cosine_kernel,
)

FUNCTIONS = {
    "": lambda x: x,
    "relu": functional.relu,
    "leaky_relu:0.2": lambda x: functional.leaky_relu(x, 0.2),
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
TARGET = torch.tensor([1.4, 1.0, 0.7, 2.0], dtype=torch.float64)
LENGTH = torch.tensor([0.9, 1.2, 0.7, 0.3], dtype=torch.float64)
COSINE = torch.tensor([0.6, -0.3, 0.99, 0.1], dtype=torch.float64)


def sampled_loss(name: str, *, samples: int = 400_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    t, g = torch.randn((2, samples, 1), generator=generator, dtype=torch.float64)
    phi = FUNCTIONS[name]
    wanted = phi(TARGET * (COSINE * t + (1 - COSINE.square()).sqrt() * g))
    return (phi(LENGTH * t) - wanted).square().mean(dim=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_loss_equals_its_monte_carlo_estimate(name: str) -> None:
    loss = activation_kernel(name).loss(TARGET, LENGTH, COSINE)
    torch.testing.assert_close(loss, sampled_loss(name), rtol=0.02, atol=2e-5)


@pytest.mark.parametrize(("name", "tolerance"), [("gelu", 1e-5), ("silu", 1e-6), ("mish", 1e-5), ("tanh", 2e-4)])
def test_the_quadrature_has_converged_for_smooth_activations(name: str, tolerance: float) -> None:
    kernel = ACTIVATION_KERNELS[name]
    assert isinstance(kernel, Quadrature)
    expected = Quadrature(kernel.function, nodes=400).loss(TARGET, LENGTH, COSINE)
    torch.testing.assert_close(kernel.loss(TARGET, LENGTH, COSINE), expected, rtol=tolerance, atol=1e-6)


def test_the_quadrature_of_relu_approaches_the_closed_form() -> None:
    by_quadrature = Quadrature(functional.relu, nodes=100).loss(TARGET, LENGTH, COSINE)
    torch.testing.assert_close(
        by_quadrature, activation_kernel("relu").loss(TARGET, LENGTH, COSINE), rtol=0.05, atol=1e-3
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_derivative_equals_finite_differences(name: str) -> None:
    kernel, step = activation_kernel(name), 1e-6
    by_cosine = (kernel.loss(TARGET, LENGTH, COSINE + step) - kernel.loss(TARGET, LENGTH, COSINE - step)) / (2 * step)
    torch.testing.assert_close(kernel.loss_by_cosine(TARGET, LENGTH, COSINE), by_cosine, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_other_length_is_better_than_the_best(name: str) -> None:
    kernel: ActivationKernel = activation_kernel(name)
    cosine = COSINE.abs()
    best = kernel.best_length(TARGET, cosine)
    least = kernel.loss(TARGET, best, cosine)
    for factor in (0.0, 0.5, 0.9, 0.999, 1.001, 1.1, 2.0):
        assert bool((least <= kernel.loss(TARGET, best * factor, cosine) + 1e-9).all())


def test_identical_rows_have_no_loss() -> None:
    for name in FUNCTIONS:
        loss = activation_kernel(name).loss(TARGET, TARGET, torch.ones_like(TARGET))
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-9)


def test_the_arc_cosine_kernel_at_known_angles() -> None:
    cosines = torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    at_sixty_degrees = (math.sqrt(0.75) + (math.pi - math.pi / 3) / 2) / math.pi
    expected = torch.tensor([0.0, 1 / math.pi, at_sixty_degrees, 1.0], dtype=torch.float64)
    torch.testing.assert_close(arc_cosine_kernel(cosines), expected)


@pytest.mark.parametrize(
    "name", ["rellu", "leaky_relu:steep", "leaky_relu:nan", "leaky_relu:1e30", "relu:0.1", "maxout"]
)
def test_an_unknown_activation_is_refused(name: str) -> None:
    with pytest.raises(InvalidOptionError) as error:
        activation_kernel(name)
    assert error.value.field == "activation"
