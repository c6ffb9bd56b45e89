"""What a cut network computes comes nearer to its source by least squares, and only there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ghn_client import GHNClient, recalibrate_batchnorm, refit
from ghn_client.errors import InvalidOptionError
from tests.transfer.networks import EXAMPLE, Residual, trained


def images(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    colours = 2 * torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(colours, (16, 16)) + torch.randn(count, 3, 16, 16, generator=generator)


IMAGES, UNSEEN = images(48, 3), images(16, 4)
SOURCE = trained(width=12)


def error(network: nn.Module, source: nn.Module, images: torch.Tensor = UNSEEN) -> float:
    with torch.no_grad():
        wanted = source.eval()(images)
        return float((network.eval()(images) - wanted).square().mean() / wanted.var())


@pytest.fixture(scope="module")
def cut() -> nn.Module:
    target = Residual(width=8)
    with GHNClient.embedded() as client:
        client.predict(target, EXAMPLE, source=SOURCE).load_into(target)
    return target


def test_a_cut_network_comes_nearer_to_its_source(cut: nn.Module) -> None:
    measured, refitted = copy.deepcopy(cut), copy.deepcopy(cut).train()
    recalibrate_batchnorm(measured, [IMAGES])
    names = refit(refitted, SOURCE, [(IMAGES[:24], None), (IMAGES[24:], None)])
    assert refitted.training
    assert names == ("conv1", *(f"blocks.{i}.conv{j}" for i in range(2) for j in (1, 2)), "fc")
    assert error(refitted, SOURCE) < 0.1 * error(measured, SOURCE)


def test_batches_and_their_form_make_no_difference(cut: nn.Module) -> None:
    class ByKeyword(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.inner(pixels)

    once, named = copy.deepcopy(cut), ByKeyword(copy.deepcopy(cut))
    refit(once, SOURCE, [IMAGES, UNSEEN], num_images=48)
    refit(named, ByKeyword(SOURCE), [{"pixels": IMAGES}], num_images=48)
    assert all(torch.equal(value, named.inner.state_dict()[name]) for name, value in once.state_dict().items())


def test_a_linear_layer_gets_the_solution_of_least_squares() -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    target = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
            mine.copy_(theirs[tuple(slice(size) for size in mine.shape)])
    inputs = torch.randn(64, 6)
    first = target[0].weight.detach().clone()
    assert refit(target, source, [inputs]) == ("0", "2")
    torch.testing.assert_close(target[0].weight, first, rtol=1e-3, atol=1e-4)  # lost nothing
    features = torch.cat([target[:2](inputs).detach(), torch.ones(64, 1)], 1)
    best = torch.linalg.lstsq(features, source(inputs).detach()).solution
    residual = (features @ best - source(inputs).detach()).square().mean()
    assert (target(inputs) - source(inputs)).square().mean() < 1.01 * residual


def test_what_was_not_cut_stays_as_it_is() -> None:
    same = copy.deepcopy(SOURCE)
    refit(same, SOURCE, [IMAGES])
    for name, value in SOURCE.named_parameters():
        torch.testing.assert_close(same.get_parameter(name), value, rtol=1e-3, atol=1e-3)


def test_a_class_layer_of_other_classes_stays(cut: nn.Module) -> None:
    target = copy.deepcopy(cut)
    target.fc = nn.Linear(8, 7)
    before = target.fc.weight.detach().clone()
    assert "fc" not in refit(target, SOURCE, [IMAGES])
    assert torch.equal(target.fc.weight, before)


def test_what_cannot_be_refitted_is_refused_and_left_alone(cut: nn.Module) -> None:
    for module, loader in ((cut, []), (Residual(width=8), [IMAGES])):
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(InvalidOptionError):
            refit(module, SOURCE, loader)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
