"""Decoder units that have stopped are found, and begin anew without changing predictions."""

from __future__ import annotations

import pytest
import torch

from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.features import build_features, collate
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.training.revival import matrix_embeddings, revive, stopped_units
from tests.training.small_networks import SmallArchitecture

STOPPED = (3, 8, 9)


@pytest.fixture
def networks():
    return [SmallArchitecture(index).graph() for index in range(6)]


@pytest.fixture
def hypernetwork():
    config = GHNConfig(hidden_channels=16, num_layers=1, num_heads=4, max_shape=(16, 16, 3, 3), num_classes=10)
    ghn = GraphHyperNetwork(config, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        ghn.decoder.hidden.bias.fill_(5.0)
        ghn.decoder.hidden.bias[list(STOPPED)] = -1e4
    return ghn


def _embeddings(hypernetwork, networks):
    return matrix_embeddings(hypernetwork, [build_features(graph, hypernetwork.config) for graph in networks])


@torch.no_grad()
def _predictions(hypernetwork, networks):
    batch = collate([build_features(graph, hypernetwork.config) for graph in networks])
    return [dict(tensors) for tensors in hypernetwork(batch)]


def test_exactly_the_stopped_units_are_found(hypernetwork, networks):
    stopped = stopped_units(hypernetwork.decoder, _embeddings(hypernetwork, networks))
    assert stopped.nonzero().flatten().tolist() == list(STOPPED)


def test_revived_units_are_active_and_leave_predictions_as_they_were(hypernetwork, networks):
    before = _predictions(hypernetwork, networks)
    embeddings = _embeddings(hypernetwork, networks)
    assert revive(hypernetwork.decoder, embeddings, torch.Generator().manual_seed(0)) == len(STOPPED)
    assert not stopped_units(hypernetwork.decoder, embeddings).any()
    for old, new in zip(before, _predictions(hypernetwork, networks), strict=True):
        for name in old:
            torch.testing.assert_close(new[name], old[name])


def test_nothing_changes_where_no_unit_has_stopped(hypernetwork, networks):
    with torch.no_grad():
        hypernetwork.decoder.hidden.bias.fill_(5.0)
    before = {name: tensor.clone() for name, tensor in hypernetwork.state_dict().items()}
    assert revive(hypernetwork.decoder, _embeddings(hypernetwork, networks), torch.Generator()) == 0
    for name, tensor in hypernetwork.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_leaky_units_pass_a_gradient_where_relu_units_do_not(networks):
    def gradient(activation):
        config = GHNConfig(
            hidden_channels=16,
            num_layers=1,
            num_heads=4,
            max_shape=(16, 16, 3, 3),
            num_classes=10,
            decoder_activation=activation,
        )
        ghn = GraphHyperNetwork(config, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ghn.decoder.hidden.bias.fill_(-1e4)
        predictions = ghn(collate([build_features(graph, config) for graph in networks]))
        sum(tensor.square().sum() for tensors in predictions for tensor in tensors.values()).backward()
        return ghn.decoder.grid.weight.grad

    relu, leaky = gradient("relu"), gradient("leaky_relu")
    assert relu is None or not relu.any()
    assert leaky.abs().max() > 0
