"""Factored layers compute the product, and their decay is that of the product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.factors import FactorPair
from ghn_client.finetune import factorize_module
from ghn_client.finetune.factored import FactoredLayer, frobenius_decay, low_rank
from ghn_client.finetune.lora import low_rank_update
from tests.finetune.networks import ResidualNetwork, mlp, train_a_little


def test_linear_is_the_product():
    layer, inputs = FactoredLayer(nn.Linear(5, 4), 2), torch.randn(3, 5)
    expected = nn.functional.linear(inputs, layer.dense_weight(), layer.u.bias)
    torch.testing.assert_close(layer(inputs), expected)


def test_convolution_is_the_product():
    layer, images = FactoredLayer(nn.Conv2d(3, 6, 3, stride=2, padding=1), 2), torch.randn(2, 3, 9, 9)
    expected = nn.functional.conv2d(images, layer.dense_weight(), layer.u.bias, stride=2, padding=1)
    torch.testing.assert_close(layer(images), expected)


def test_decay_is_half_the_squared_norm_of_the_products():
    network = nn.Sequential(FactoredLayer(nn.Conv2d(3, 6, 3), 2), nn.Flatten(), FactoredLayer(nn.Linear(6, 4), 2))
    slow = sum(layer.dense_weight().square().sum() for layer in (network[0], network[2]))
    torch.testing.assert_close(frobenius_decay(network), 0.5 * slow)
    assert frobenius_decay(nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("rank", [0, 5])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(InvalidOptionError):
        FactoredLayer(nn.Linear(5, 4), rank)


def test_low_rank_needs_factors():
    with pytest.raises(UnsupportedModuleError):
        low_rank(mlp(3, 3, 2))


def test_factors_of_packed_attention_weights_are_trained_too():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

        def forward(self, inputs):
            return self.head(self.attention(inputs, inputs, inputs, need_weights=False)[0])

    pair = FactorPair(torch.randn(2, 8), torch.randn(24, 2))
    factors = {
        "attention.in_proj_weight.factor_in": pair.factor_in,
        "attention.in_proj_weight.factor_out": pair.factor_out,
    }
    network = factorize_module(Attention(), factors)
    handle = low_rank(network, head=False, frobenius_decay=1.0)
    assert handle.num_trainable == 2 * 8 + 24 * 2
    torch.testing.assert_close(handle.loss_penalty(), 0.5 * network.attention.in_proj_weight.square().sum())
    before = network.attention.in_proj_weight.detach().clone()
    train_a_little(network, handle.parameters(), torch.randn(4, 3, 8))
    assert not torch.equal(network.attention.in_proj_weight, before)


def test_low_rank_updates_have_the_rank_and_leave_the_base():
    network = ResidualNetwork(8)
    base = network.stem.weight.detach().clone()
    handle = low_rank_update(network, rank=2, layers=["stem"], head=False)
    train_a_little(network, handle.parameters(), torch.randn(4, 3, 8, 8))
    change = (network.stem.weight - base).flatten(1)
    assert int(torch.linalg.matrix_rank(change.detach(), rtol=1e-4)) == 2
    assert torch.equal(network.stem.parametrizations.weight.original, base)
