"""Patches of many real samples: all certificates hold, neurons grow as they should and do not depend on K."""

from __future__ import annotations

import math

import pytest
import torch

from ghn_client.finetune.patch.solver import patch
from tests.finetune.networks import mlp
from tests.finetune.real_images import cifar10


def thumbnails(count):
    images, _ = cifar10(count, "train")
    return torch.nn.functional.avg_pool2d(images, 4).flatten(1)


def certificate(inputs, changed, depth, directions="auto"):
    network = mlp(inputs.shape[1], 32, 10).eval()
    with torch.no_grad():
        labels = network(inputs).argmax(1)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    wrong = order[labels[order] != 0][:changed]
    keep = order[~torch.isin(order, wrong)]
    wanted = torch.zeros(changed, dtype=torch.long)
    return patch(network, inputs[wrong], wanted, inputs[keep], depth=depth, directions=directions).certificate


@pytest.mark.parametrize("depth", [2, 3])
def test_a_thousand_real_samples(depth):
    result = certificate(thumbnails(1000), 40, depth)
    assert result.holds
    assert result.precision == ("float32" if depth == 2 else "float64")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_up_to_twenty_thousand_real_samples():
    neurons = {}
    for samples in (1000, 5000, 20000):
        inputs = thumbnails(samples)
        for changed in (1, 4, 20, 100, 400):
            for depth, directions in ((2, "own"), (2, "shared"), (3, "shared")):
                result = certificate(inputs, changed, depth, directions)
                assert result.holds
                neurons[samples, changed, depth, directions] = result.neurons
    for samples in (1000, 5000, 20000):
        for changed in (1, 4, 20, 100, 400):
            assert neurons[samples, changed, 2, "own"] <= 3 * changed
            assert neurons[samples, changed, 2, "shared"] <= 3 * changed
            assert neurons[samples, changed, 3, "shared"] <= 4 * math.sqrt(2 * changed) + 5
            assert neurons[samples, changed, 3, "shared"] == neurons[1000, changed, 3, "shared"]
    rise = {
        depth: math.log(neurons[20000, 400, depth, "shared"] / neurons[20000, 20, depth, "shared"]) / math.log(20)
        for depth in (2, 3)
    }
    assert rise[2] == pytest.approx(1.0, abs=0.1)
    assert rise[3] == pytest.approx(0.5, abs=0.1)
