"""The optimizers step as their papers write it; rates follow their schedule; the average follows the weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from ghn_service.training.optimizers import OptimizerGroup, moving_average, rate_factor
from ghn_service.training.settings import OptimizerSettings

SHAPES = ((64, 16), (16, 64), (16, 16), (5, 3))


class Parameters(nn.Module):
    """Matrices, an embedding, a vector and a tensor of four axes, as a hypernetwork may have them."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in SHAPES])
        self.embedding = nn.Embedding(4, 6)
        self.vector = nn.Parameter(torch.randn(7))
        self.grid = nn.Parameter(torch.randn(3, 2, 2, 2))


def muon_update(matrix: torch.Tensor, rate: float) -> torch.Tensor:
    """The step of Jordan et al. 2024 for an averaged gradient, in double precision."""
    result = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = result @ result.T
        result = (3.4445 * torch.eye(len(gram)) - 4.7750 * gram + 2.0315 * gram @ gram) @ result
    return rate * math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1])) * result


def test_muon_steps_as_it_is_written_down():
    torch.manual_seed(0)
    module = Parameters()
    settings = OptimizerSettings(name="muon", muon_learning_rate=0.1, weight_decay=0.01)
    optimizers = OptimizerGroup(module, settings)
    averages = [torch.zeros(shape) for shape in SHAPES]
    for step in range(3):
        before = [matrix.detach().clone() for matrix in module.matrices]
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        optimizers.step(0.5)
        for index, matrix in enumerate(module.matrices):
            averages[index] = 0.95 * averages[index] + 0.05 * matrix.grad
            nesterov = 0.05 * matrix.grad + 0.95 * averages[index]
            expected = muon_update(nesterov, 0.05)
            update = before[index].double() * (1.0 - 0.05 * 0.01) - matrix.detach()
            assert (update - expected).norm() < 0.05 * expected.norm()  # torch computes it in bfloat16


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_is_no_matrix_is_stepped_by_adamw(name):
    torch.manual_seed(0)
    module = Parameters()
    rest = [module.embedding.weight, module.vector, module.grid]
    mine = [parameter.detach().clone().requires_grad_() for parameter in rest]
    adamw = torch.optim.AdamW(mine, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = OptimizerGroup(module, OptimizerSettings(name=name, learning_rate=0.01))
    for parameter, other in zip(rest, mine, strict=True):
        parameter.grad = torch.randn(parameter.shape)
        other.grad = parameter.grad.clone()
    optimizers.step(1.0)
    adamw.step()
    for parameter, other in zip(rest, mine, strict=True):
        torch.testing.assert_close(parameter, other)


def test_matrices_without_a_gradient_stay():
    module = Parameters()
    before = module.matrices[0].detach().clone()
    OptimizerGroup(module, OptimizerSettings(name="muon", weight_decay=0.5)).step(1.0)
    assert torch.equal(module.matrices[0], before)


def test_early_weights_count_more_in_the_average():
    module = nn.Linear(1, 1, bias=False)
    average = moving_average(module, OptimizerSettings(ema_decay=0.5, ema_every=1))
    values = (4.0, 8.0, 16.0)
    for value in values:
        nn.init.constant_(module.weight, value)
        average.update_parameters(module)
    expected = 4.0
    for updates, value in enumerate(values[1:], start=1):
        decay = min(0.5, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay) * value
    assert average.module.weight.item() == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid"])
def test_the_rate_warms_up_and_ends_at_zero(schedule):
    settings = OptimizerSettings(schedule=schedule, warmup=0.1, cooldown=0.3)
    factors = [rate_factor(step / 100, settings) for step in range(101)]
    assert factors[5] == pytest.approx(0.5)
    assert max(factors) == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.0, abs=1e-12)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(factors[10:]))
