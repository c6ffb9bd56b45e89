"""The encoders against slow versions written node by node and pair by pair, straight from the papers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ghn_service.hypernetwork.features import GraphFeatures, build_features, collate
from ghn_service.hypernetwork.gated_gnn import GatedGNN
from ghn_service.hypernetwork.graphormer import Graphormer
from tests.hypernetwork.small_graphs import CONFIGS, random_network, small_ghn, small_network


def sequential_gated_gnn(gnn: GatedGNN, features: Tensor, distances: Tensor) -> Tensor:
    states = list(features)
    for order, table in ((range(len(states)), distances), (reversed(range(len(states))), distances.T)):
        for node in order:
            message = torch.zeros_like(states[0])
            for other in range(len(states)):
                length = int(table[other, node])
                if length == 1:
                    message = message + gnn.direct_message(states[other])
                if length >= 1 and gnn.virtual_message is not None:
                    message = message + gnn.virtual_message(states[other]) / length
            states[node] = gnn.update(message[None], states[node][None])[0]
    return torch.stack(states)


def pairwise_graphormer(graphormer: Graphormer, features: Tensor, item: GraphFeatures) -> Tensor:
    lengths = item.distances.long()
    direct = (lengths == 1).long()
    hidden = features + graphormer.in_degree_embedding(direct.sum(0)) + graphormer.out_degree_embedding(direct.sum(1))
    hidden = hidden + graphormer.input_distance_embedding(lengths[0])
    table = graphormer.distance_bias
    pairs = torch.stack((lengths, lengths.T), dim=-1) + 2
    bias = table.heads(functional.relu(table.hidden(table.distance_embedding(pairs).flatten(2))))  # (N, N, H)
    for layer in graphormer.layers:
        packed = layer.query_key_value(layer.attention_norm(hidden))
        query, key, value = packed.reshape(len(hidden), 3, layer.num_heads, -1).unbind(1)
        logits = torch.einsum("ihc,jhc->ijh", query, key) * query.shape[-1] ** -0.5 + bias
        mixed = torch.einsum("ijh,jhc->ihc", logits.softmax(dim=1), value).flatten(1)
        hidden = hidden + layer.attention_output(mixed)
        hidden = hidden + layer.contract(functional.gelu(layer.expand(layer.feed_forward_norm(hidden))))
    return hidden


@pytest.mark.parametrize("cutoff", [1, 3, 50])
@pytest.mark.parametrize("seed", range(3))
def test_generations_at_once_equal_nodes_one_by_one(cutoff, seed):
    config = dataclasses.replace(CONFIGS["ghn2"], distance_cutoff=cutoff)
    ghn = small_ghn(config, seed).double()
    item = build_features(random_network(seed), config)
    features = torch.randn(item.num_nodes, config.hidden_channels, dtype=torch.float64)
    found = ghn.encoder(features, collate([item]))
    torch.testing.assert_close(found, sequential_gated_gnn(ghn.encoder, features, item.distances))


def test_gated_gnn_has_the_sequential_gradient():
    config = CONFIGS["ghn2"]
    ghn = small_ghn(config).double()
    item = build_features(random_network(7), config)
    features = torch.randn(item.num_nodes, config.hidden_channels, dtype=torch.float64, requires_grad=True)
    inputs = [features, *ghn.encoder.parameters()]
    weights = torch.randn(item.num_nodes, config.hidden_channels, dtype=torch.float64)
    found = torch.autograd.grad((ghn.encoder(features, collate([item])) * weights).sum(), inputs)
    slow = sequential_gated_gnn(ghn.encoder, features, item.distances)
    expected = torch.autograd.grad((slow * weights).sum(), inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cutoff", [1, 50])
@pytest.mark.parametrize("seed", range(3))
def test_tabulated_bias_equals_pair_by_pair(cutoff, seed):
    config = dataclasses.replace(CONFIGS["ghn3"], distance_cutoff=cutoff)
    ghn = small_ghn(config, seed).double()
    item = build_features(random_network(seed), config)
    features = torch.randn(item.num_nodes, config.hidden_channels, dtype=torch.float64)
    found = ghn.encoder(features, collate([item]))
    torch.testing.assert_close(found, pairwise_graphormer(ghn.encoder, features, item))


@pytest.mark.parametrize("kind", ["ghn2", "ghn3"])
def test_a_batch_is_encoded_as_its_graphs_are_one_by_one(kind):
    ghn = small_ghn(CONFIGS[kind])
    items = [
        build_features(graph, ghn.config) for graph in (random_network(1, 30), small_network(), random_network(2, 9))
    ]
    together = ghn.encode(collate(items))
    alone = torch.cat([ghn.encode(collate([item])) for item in items])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["ghn2", "ghn3"])
def test_a_graph_of_one_node_is_encoded(kind):
    ghn = small_ghn(CONFIGS[kind])
    assert ghn.encode(collate([build_features(random_network(0, 1), ghn.config)])).shape == (1, 16)


@pytest.mark.parametrize("kind", ["ghn2", "ghn3"])
def test_distances_matter(kind):
    ghn = small_ghn(CONFIGS[kind])
    item = build_features(random_network(3), ghn.config)
    nearer = dataclasses.replace(item, distances=torch.where(item.distances > 2, 2, item.distances))
    assert not torch.allclose(ghn.encode(collate([item])), ghn.encode(collate([nearer])), atol=1e-4)
