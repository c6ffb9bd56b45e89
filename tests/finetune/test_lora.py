"""``low_rank_update``: what it refuses, and copies of a tuned network that outlive its handle."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ghn_client.errors import UnsupportedModuleError
from ghn_client.finetune.lora import low_rank_update
from tests.finetune.networks import mlp, train_a_little

INPUTS = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "compute",
    [
        lambda network: nn.utils.parametrizations.weight_norm(network[2]),
        lambda network: nn.utils.weight_norm(network[2]),
        lambda network: low_rank_update(network, layers=["2"], head=False),
    ],
    ids=["parametrized", "hook", "second update"],
)
def test_a_computed_weight_is_refused_before_anything_changes(compute):
    network = mlp(5, 8, 8, 3)
    compute(network)
    names = list(network.state_dict())
    with pytest.raises(UnsupportedModuleError):
        low_rank_update(network)
    assert list(network.state_dict()) == names


def test_a_layer_named_twice_is_changed_once():
    assert low_rank_update(mlp(5, 8, 3), layers=["0", "0"], rank=2, head=False).num_trainable == 2 * (5 + 8)


@pytest.mark.parametrize("end", ["merge", "restore"])
def test_a_copy_outlives_the_handle(end):
    handle = low_rank_update(mlp(5, 8, 8, 3))
    train_a_little(handle.module, handle.parameters(), INPUTS)
    average, tuned = copy.deepcopy(handle.module), handle.module(INPUTS)
    getattr(handle, end)()
    assert torch.equal(average(INPUTS), tuned)


def test_tied_weights_merge_with_updates_of_their_own():
    network = mlp(8, 8, 8, 3)
    network[2].weight = network[0].weight
    handle, inputs = low_rank_update(network), torch.randn(6, 8)
    train_a_little(network, handle.parameters(), inputs)
    tuned = network(inputs)
    torch.testing.assert_close(handle.merge()(inputs), tuned)
