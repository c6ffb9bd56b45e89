"""``recalibrate_batchnorm``: plain means over batches, everything else as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ghn_client import recalibrate_batchnorm
from ghn_client.batchnorm import STATISTICS, hold_statistics
from ghn_client.errors import InvalidOptionError
from tests.clients.small_modules import ConvNet, randomized


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 8, 8, generator=generator) * 2 + 1 for _ in range(count)]


def test_statistics_are_the_mean_over_batches() -> None:
    module, loader = nn.Sequential(nn.BatchNorm2d(3)), batches(5)
    assert recalibrate_batchnorm(module, loader) == 5
    means = torch.stack([batch.mean((0, 2, 3)) for batch in loader]).mean(0)
    variances = torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in loader]).mean(0)
    assert torch.allclose(module[0].running_mean, means, atol=1e-6)
    assert torch.allclose(module[0].running_var, variances, atol=1e-5)


def test_earlier_statistics_have_no_influence() -> None:
    first, second = randomized(ConvNet()), randomized(ConvNet())
    second.bn1.running_mean.fill_(100.0)
    for module in (first, second):
        recalibrate_batchnorm(module, batches(3))
    assert torch.equal(first.bn1.running_mean, second.bn1.running_mean)


def test_modes_momenta_and_weights_are_restored() -> None:
    module = randomized(ConvNet()).train()
    module.bn2.eval()
    module.bn1.momentum = 0.3
    modes = [part.training for part in module.modules()]
    weights = [parameter.clone() for parameter in module.parameters()]
    recalibrate_batchnorm(module, batches(2))
    assert [part.training for part in module.modules()] == modes
    assert module.bn1.momentum == 0.3
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), weights, strict=True))


def test_only_so_many_batches_are_used() -> None:
    assert recalibrate_batchnorm(randomized(ConvNet()), iter(batches(5)), num_batches=2) == 2


@pytest.mark.parametrize(
    "form", [lambda x: (x, 1), lambda x: [x, 1], lambda x: {"x": x}], ids=["tuple", "list", "dict"]
)
def test_batches_come_as_loaders_give_them(form: object) -> None:
    module = randomized(ConvNet())
    recalibrate_batchnorm(module, [form(batch) for batch in batches(2)])
    assert module.bn1.num_batches_tracked == 2


def test_a_network_without_batch_normalisation_needs_no_data() -> None:
    assert recalibrate_batchnorm(nn.Linear(2, 2), []) == 0


def test_an_empty_loader_is_refused_and_changes_nothing() -> None:
    module = randomized(ConvNet())
    before = module.bn1.running_mean.clone()
    with pytest.raises(InvalidOptionError):
        recalibrate_batchnorm(module, [])
    assert torch.equal(module.bn1.running_mean, before)


def test_an_error_midway_leaves_the_statistics_as_they_were() -> None:
    module = randomized(ConvNet())
    before = {name: value.clone() for name, value in module.named_buffers()}
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(module, [*batches(1), torch.zeros(4, 5, 8, 8)])
    assert all(torch.equal(before[name], value) for name, value in module.named_buffers())


@pytest.mark.parametrize("choice", STATISTICS)
def test_held_statistics_are_measured_like_others(choice: str) -> None:
    held, free = randomized(ConvNet()), randomized(ConvNet())
    let_go = hold_statistics(held, choice)
    for module in (held, free):
        recalibrate_batchnorm(module, batches(2))
    let_go()
    assert torch.equal(held.bn1.running_mean, free.bn1.running_mean)
    assert torch.equal(held.bn2.running_var, free.bn2.running_var)


def test_dropout_stays_off_while_statistics_are_measured() -> None:
    networks = [nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3), nn.Dropout(0.5)) for _ in range(2)]
    networks[1][0].p = 0.0
    for network in networks:
        recalibrate_batchnorm(network.train(), batches(3))
    assert torch.equal(networks[0][1].running_mean, networks[1][1].running_mean)
    assert torch.equal(networks[0][1].running_var, networks[1][1].running_var)
    assert all(part.training for part in networks[0].modules())


def test_only_the_named_layers_are_measured() -> None:
    module = randomized(ConvNet())
    before = module.bn1.running_mean.clone()
    recalibrate_batchnorm(module, batches(2), layers=[module.bn2])
    assert torch.equal(module.bn1.running_mean, before)
    assert module.bn2.num_batches_tracked == 2
