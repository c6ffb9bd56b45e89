"""The choice of the subspace: its gradient, its invariances, and that L-BFGS ends where it should."""

from __future__ import annotations

import math

import pytest
import torch

from ghn_service.postprocess.low_rank.factorize import relative_function_error
from ghn_service.postprocess.low_rank.kernels import activation_kernel
from ghn_service.postprocess.low_rank.subspace import improve_subspace, subspace_loss


def random_matrix(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, columns), generator=generator, dtype=torch.float64) * math.sqrt(2 / columns)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu:0.1", "gelu", "tanh"])
def test_the_gradient_equals_finite_differences(activation: str) -> None:
    rows, basis = random_matrix(12, 7), random_matrix(7, 3, seed=1)
    kernel, step = activation_kernel(activation), 1e-5
    gradient = subspace_loss(rows, basis, kernel).gradient
    for row, column in ((0, 0), (3, 2), (6, 1)):
        nudge = torch.zeros_like(basis)
        nudge[row, column] = step
        up, down = (subspace_loss(rows, basis + sign * nudge, kernel).value for sign in (1, -1))
        assert float(gradient[row, column]) == pytest.approx((up - down) / (2 * step), rel=1e-3, abs=1e-6)


def test_only_the_span_of_the_basis_matters() -> None:
    rows, basis, kernel = random_matrix(12, 7), random_matrix(7, 3, seed=1), activation_kernel("relu")
    mixed = basis @ random_matrix(3, 3, seed=2)
    assert subspace_loss(rows, mixed, kernel).value == pytest.approx(subspace_loss(rows, basis, kernel).value)


def test_the_loss_is_that_of_projections_at_their_best_lengths() -> None:
    rows, kernel = random_matrix(12, 7), activation_kernel("relu")
    basis, _ = torch.linalg.qr(random_matrix(7, 3, seed=1))
    projected = rows @ basis @ basis.mT
    target, kept = rows.norm(dim=1), projected.norm(dim=1)
    product = projected * (kernel.best_length(target, kept / target) / kept)[:, None]
    expected = relative_function_error(rows, product, torch.eye(7, dtype=torch.float64), activation="relu")
    assert subspace_loss(rows, basis, kernel).value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_end_is_a_stationary_point(activation: str) -> None:
    rows, kernel = random_matrix(40, 20), activation_kernel(activation)
    start = torch.linalg.eigh(rows.mT @ rows).eigenvectors[:, -4:]
    before = subspace_loss(rows, start, kernel)
    after = subspace_loss(rows, improve_subspace(rows, start, kernel, steps=200, tolerance=0.0), kernel)
    assert after.value < before.value
    assert float(after.gradient.norm()) < 1e-2 * float(before.gradient.norm())


def test_where_spectral_is_optimal_nothing_changes() -> None:
    rows, kernel = random_matrix(40, 20), activation_kernel("")
    start = torch.linalg.eigh(rows.mT @ rows).eigenvectors[:, -4:]
    end = improve_subspace(rows, start, kernel, steps=10, tolerance=1e-5)
    assert subspace_loss(rows, end, kernel).value == pytest.approx(subspace_loss(rows, start, kernel).value, rel=1e-9)


def test_rows_of_zeros_and_a_full_subspace_are_no_trouble() -> None:
    rows, kernel = random_matrix(6, 4), activation_kernel("relu")
    rows[2] = 0
    loss = subspace_loss(rows, torch.eye(4, dtype=torch.float64), kernel)
    assert loss.value == pytest.approx(0.0, abs=1e-12)
    assert bool(torch.isfinite(loss.gradient).all())
