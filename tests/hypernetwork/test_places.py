"""Places of layers: what they are on known networks, and what they must not depend on."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghn_architectures.architecture import CANONICAL, Architecture
from ghn_architectures.examples import EXAMPLES, FOLDER
from ghn_architectures.families import FAMILIES
from ghn_architectures.generator import sample_architecture
from ghn_architectures.registry import reference_architecture
from ghn_architectures.resnet import ResNetConfiguration
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.graph.onnx.reader import read_onnx
from ghn_service.hypernetwork.features import build_features, collate
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.hypernetwork.places import NUM_PLACES, PLACE_CHANNELS, RESOLUTION, encode_places
from tests.architectures.exported import exported_graph
from tests.hypernetwork.small_graphs import SMALL, random_network, small_ghn, small_network

PLACED = dataclasses.replace(SMALL, places=True)
CONVOLUTIONAL = ("resnet", "convnet", "mobilenet", "bottleneck", "convnext", "densenet")
NUM_BLOCKS = 4


def places(graph: ArchitectureGraph) -> torch.Tensor:
    return build_features(graph, PLACED).places


def by_name(graph: ArchitectureGraph) -> dict[str, list[float]]:
    """Places of the layers by the name of their weight, and of other nodes by their type, in any order."""
    rows: dict[str, list[list[float]]] = {}
    for node, row in zip(graph.nodes, places(graph).tolist(), strict=True):
        rows.setdefault(node.weight.name if node.weight else node.op_type, []).append(row)
    return {name: sorted(found) for name, found in rows.items()}


def without_sizes(graph: ArchitectureGraph) -> ArchitectureGraph:
    """The graph as a file with dynamic sizes gives it."""
    nodes = (
        node if node.layer is None else dataclasses.replace(node, layer=dataclasses.replace(node.layer, positions=0))
        for node in graph.nodes
    )
    return dataclasses.replace(graph, nodes=tuple(nodes))


def shuffled(graph: ArchitectureGraph, seed: int) -> tuple[ArchitectureGraph, list[int]]:
    """The same graph, without names, in another topological order; and the old index of each of its nodes."""
    rng = random.Random(seed)
    waiting = {index: {source for source, target in graph.edges if target == index} for index in range(graph.num_nodes)}
    order = [0]
    while len(order) < graph.num_nodes:
        ready = [index for index, sources in waiting.items() if index not in order and sources <= set(order)]
        order.append(rng.choice(ready))
    new = {old: place for place, old in enumerate(order)}
    nodes = tuple(dataclasses.replace(graph.nodes[old], name=str(place)) for place, old in enumerate(order))
    edges = tuple(sorted((new[source], new[target]) for source, target in graph.edges))
    return dataclasses.replace(graph, nodes=nodes, edges=edges), order


def test_places_in_resnet20():
    rows = by_name(reference_architecture("resnet20").graph())
    found = {name: row[0][RESOLUTION:] for name, row in rows.items() if ".branch." in name and row[0][RESOLUTION] == 1}
    assert found["stages.1.0.branch.0.0.weight"] == [1, 0, 3, 0, 1]  # 16 to 32 channels: the only one
    assert found["stages.1.0.branch.1.0.weight"] == [1, 0, 3, 0, 5]
    assert found["stages.1.2.branch.1.0.weight"] == [1, 2, 3, 4, 5]
    assert rows["head.classifier.weight"][0][RESOLUTION] == 2
    assert rows["head.classifier.bias"][0][0] == 1.0


@pytest.mark.parametrize("depth", [5, 18])
def test_every_convolution_of_a_deep_residual_network_has_a_place_of_its_own(depth):
    graph = Architecture("resnet", ResNetConfiguration((8, 16), (depth, depth)), CANONICAL).graph()
    rows = encode_places(places(graph)).tolist()
    layers = [tuple(row) for node, row in zip(graph.nodes, rows, strict=True) if node.op_type == "conv"]
    shortcuts = 1  # as far from the input as the first convolution of its block
    assert len(set(layers)) >= len(layers) - shortcuts


def test_a_gate_keeps_the_resolution_of_its_features():
    rows = by_name(reference_architecture("se_mobilenet_mini").graph())
    assert rows["stages.2.0.branch.2.reduce.weight"][0][RESOLUTION] == 2
    assert {row[RESOLUTION] for row in rows["cse"]} == {0, 1, 2, 3}


def test_a_transformer_has_two_blocks_per_layer_and_a_densenet_one():
    counts = {name: places(reference_architecture(name).graph())[-1, NUM_BLOCKS] for name in ("vit_mini", "densenet40")}
    assert counts == {"vit_mini": 13, "densenet40": 6}  # six layers, and the sum with the position embedding


def test_patch_merging_halves_the_resolution():
    rows = by_name(reference_architecture("swin_mini").graph())
    assert rows["stages.1.reduction.weight"][0][RESOLUTION] == rows["patches.weight"][0][RESOLUTION] + 1


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_traced_and_exported_networks_have_equal_places(family, index):
    architecture = sample_architecture("train", index, families=(family,), size="tiny")
    assert by_name(architecture.graph()) == by_name(exported_graph(architecture))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_files_have_the_places_of_their_networks(name):
    assert by_name(reference_architecture(name).graph()) == by_name(read_onnx((FOLDER / f"{name}.onnx").read_bytes()))


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("family", CONVOLUTIONAL)
def test_strides_tell_what_sizes_would(family, index):
    graph = sample_architecture("train", index, families=(family,)).graph()
    assert torch.equal(places(graph), places(without_sizes(graph)))


@given(seed=st.integers(0, 1000))
def test_places_depend_neither_on_names_nor_on_the_order_of_nodes(seed):
    graph = random_network(seed % 50)
    other, order = shuffled(graph, seed)
    assert torch.equal(places(graph)[order], places(other))


@pytest.mark.parametrize("family", ["cells", "densenet", "mobilenet"])
def test_places_of_real_graphs_do_not_depend_on_the_order_of_nodes(family):
    graph = sample_architecture("train", 3, families=(family,), size="tiny").graph()
    other, order = shuffled(graph, 0)
    assert torch.equal(places(graph)[order], places(other))


def test_encodings_are_bounded():
    features = [build_features(graph, PLACED) for graph in (small_network(), random_network(3))]
    encoded = encode_places(collate(features).data.places)
    assert encoded.shape == (sum(item.num_nodes for item in features), PLACE_CHANNELS)
    assert encoded.norm(dim=1).min() > 0.8
    assert encoded.norm(dim=1).max() < 1.25


def test_without_places_a_hypernetwork_is_what_it_was():
    features = build_features(small_network(), SMALL)
    assert features.places.shape == (features.num_nodes, 0)
    assert not any("place" in name for name in small_ghn().state_dict())


def test_with_places_equal_layers_get_different_weights():
    layers = {"stages.0.1.branch.0.0.weight", "stages.0.2.branch.0.0.weight"}
    batch = collate([build_features(reference_architecture("resnet20").graph(), PLACED)])
    assert batch.data.places.shape[1] == NUM_PLACES
    with torch.no_grad():
        encoder = GraphHyperNetwork(PLACED, generator=torch.Generator().manual_seed(0)).node_encoder
        features = encoder(batch.data.type_row, batch.data.shape_rows, batch.data.places)
    first, second = (target.node for target in batch.targets[0] if target.name in layers)
    assert (features[first] - features[second]).norm() > 0.02
