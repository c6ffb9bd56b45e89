from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.features import build_features, collate
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from tests.hypernetwork.small_graphs import (
    CONFIGS,
    SMALL,
    bias,
    chain,
    conv,
    norm,
    random_network,
    small_ghn,
    small_network,
)

PUBLISHED = {
    "ghn3tm8": (GHNConfig(hidden_channels=64, num_layers=3, num_heads=8, max_shape=(64, 64, 16, 16)), 6_906_632),
    "ghn3sm8": (GHNConfig(hidden_channels=128, num_layers=5, num_heads=16, max_shape=(128, 128, 16, 16)), 35_810_368),
    "ghn3lm8": (GHNConfig(hidden_channels=256, num_layers=12, num_heads=16, max_shape=(256, 256, 16, 16)), 214_668_960),
    "ghn3xlm16": (
        GHNConfig(hidden_channels=384, num_layers=24, num_heads=16, max_shape=(384, 384, 16, 16)),
        654_365_184,
    ),
    "ghn2": (GHNConfig(encoder="gated_gnn", hidden_channels=32, kernel_crop="corner"), 2_319_720),
    "ghn2 cifar10": (
        GHNConfig(encoder="gated_gnn", hidden_channels=32, max_shape=(64, 64, 11, 11), num_classes=10),
        1_620_764,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_parameter_counts(name):
    config, num_parameters = PUBLISHED[name]
    with torch.device("meta"):
        assert GraphHyperNetwork(config).num_parameters == num_parameters


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_batch_gives_what_its_graphs_give_one_by_one(kind):
    ghn = small_ghn(CONFIGS[kind])
    items = [build_features(graph, ghn.config) for graph in (small_network(20), random_network(3), small_network(5))]
    together = ghn(collate(items))
    for found, item in zip(together, items, strict=True):
        (alone,) = ghn(collate([item]))
        assert list(found) == list(alone)
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_of_the_graph_gets_its_shape_in_order(kind):
    graph = small_network(40)
    ghn = small_ghn(CONFIGS[kind])
    (found,) = ghn(collate([build_features(graph, ghn.config)]))
    expected = {spec.name: spec.torch_shape for node in graph.nodes for spec in node.parameters}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected
    assert list(found) == list(expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_used_parameter_gets_a_gradient(kind):
    ghn = small_ghn(CONFIGS[kind])
    predicted = ghn(collate([build_features(small_network(40), ghn.config)]))[0]
    sum((tensor**2).sum() for tensor in predicted.values()).backward()
    without = {name for name, parameter in ghn.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert without == set()


def test_predictions_run_in_a_network_and_train_the_hypernetwork():
    network = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(48, 10))
    graph = chain(
        conv("0.weight", 12, 3, 3, 3), bias("0.bias", 12), norm("1", 12), conv("4.weight", 10, 48, is_head=True),
        bias("4.bias", 10, is_head=True),
    )  # fmt: skip
    ghn = small_ghn()
    batch = collate([build_features(graph, ghn.config)])
    images, labels = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    optimizer = torch.optim.Adam(ghn.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(functional_call(network, ghn(batch)[0], (images,)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_initial_values_come_from_the_generator():
    first, second = (GraphHyperNetwork(SMALL, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_predictions_follow_the_dtype(kind):
    ghn = small_ghn(CONFIGS[kind]).double()
    (found,) = ghn(collate([build_features(small_network(), ghn.config)]))
    assert {tensor.dtype for tensor in found.values()} == {torch.float64}


@pytest.mark.parametrize("kind", CONFIGS)
def test_first_weights_of_an_untrained_hypernetwork_are_small_but_alive(kind):
    ghn = GraphHyperNetwork(CONFIGS[kind], generator=torch.Generator().manual_seed(0))
    (found,) = ghn(collate([build_features(small_network(), ghn.config)]))
    std = found["stem"].std() * (3 * 9 / 2) ** 0.5
    assert 0.001 < std < 0.5
    assert torch.allclose(found["stem_norm.weight"], torch.ones(6), atol=0.2)


def test_decoding_blocks_in_small_parts_changes_nothing():
    ghn = small_ghn()
    item = build_features(small_network(40), ghn.config)
    embeddings = ghn.encode(collate([item]))
    whole = {
        t.name: b
        for group, blocks in ghn.decode_blocks(embeddings, item.targets)
        for t, b in zip(group, blocks, strict=True)
    }
    parts = {
        t.name: b
        for group, blocks in ghn.decode_blocks(embeddings, item.targets, max_elements=1)
        for t, b in zip(group, blocks, strict=True)
    }
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
