"""Muon against torch's own, and against the iteration written out in double precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ghn_service.training.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalize

SHAPES = ((64, 16), (16, 64), (16, 16), (64, 16), (5, 3))


def iterated(matrix: torch.Tensor) -> torch.Tensor:
    """The iteration as it is defined, on the whole matrix."""
    first, second, third = COEFFICIENTS
    result = matrix.double() / matrix.double().norm()
    for _ in range(ITERATIONS):
        gram = result.T @ result
        result = result @ (first * torch.eye(gram.shape[0]) + second * gram + third * gram @ gram)
    return result


def matrix_with_spectrum(rows: int, columns: int, smallest: float) -> torch.Tensor:
    left, _, right = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    values = torch.logspace(0, torch.tensor(smallest).log10().item(), columns)
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-5])
@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_the_factored_iteration_is_the_iteration(smallest, scale):
    torch.manual_seed(0)
    matrices = torch.stack([matrix_with_spectrum(48, 16, smallest) for _ in range(3)])
    expected = torch.stack([iterated(matrix) for matrix in matrices])
    result = orthogonalize(matrices * scale)
    assert (result - expected).norm() / expected.norm() < 2e-3


def test_large_matrices_agree_to_the_digits_of_bfloat16():
    torch.manual_seed(0)
    matrix = matrix_with_spectrum(4096, 64, 1e-2)
    expected = iterated(matrix)
    assert (orthogonalize(matrix[None])[0] - expected).norm() / expected.norm() < 0.1


def test_a_zero_gradient_gives_a_zero_update():
    assert torch.equal(orthogonalize(torch.zeros(1, 8, 4)), torch.zeros(1, 8, 4))


def take_steps(optimizer, parameters, steps=3):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_steps_agree_with_those_of_torch():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = copy.deepcopy(ours)
    take_steps(Muon(ours, lr=0.1, weight_decay=0.01), ours)
    take_steps(torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, adjust_lr_fn="original"), theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.0, atol=0.05)


def test_it_goes_on_from_the_state_of_torch():
    parameters = [nn.Parameter(torch.randn(8, 4))]
    theirs = torch.optim.Muon(parameters, lr=0.1, adjust_lr_fn="original")
    take_steps(theirs, parameters, steps=1)
    ours = Muon(parameters, lr=0.1)
    ours.load_state_dict(theirs.state_dict())
    buffer = ours.state[parameters[0]]["momentum_buffer"]
    assert torch.equal(buffer, theirs.state[parameters[0]]["momentum_buffer"])
    take_steps(ours, parameters, steps=1)


def test_a_matrix_without_gradient_stays():
    parameter = nn.Parameter(torch.ones(4, 4))
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(parameter, torch.ones(4, 4))
