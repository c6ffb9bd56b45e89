"""The traced graph of a network is the graph that the reader finds in the network's ONNX export."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ghn_architectures.architecture import Architecture, Interface
from ghn_architectures.examples import EXAMPLES, FOLDER
from ghn_architectures.families import FAMILIES
from ghn_architectures.generator import sample_architecture
from ghn_architectures.registry import ARCHITECTURES, reference_architecture
from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.graph.onnx.reader import read_onnx
from tests.architectures.exported import exported_graph

QUICK = ("resnet20", "wide_resnet16_4", "vgg11", "vit_mini", "swin_mini", "mixer_small", "mlp", "mobilenet_v2")


def labels(graph: ArchitectureGraph) -> list[str]:
    return [node.weight.name if node.weight is not None else node.op_type for node in graph.nodes]


def named_edges(graph: ArchitectureGraph) -> list[tuple[str, str]]:
    names = labels(graph)
    return sorted((names[source], names[target]) for source, target in graph.edges)


def tensors(graph: ArchitectureGraph) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from sorted((spec.name, spec.torch_shape) for spec in graph.parameters())


def assert_same(traced: ArchitectureGraph, read: ArchitectureGraph) -> None:
    assert sorted(labels(traced)) == sorted(labels(read))
    assert named_edges(traced) == named_edges(read)
    assert list(tensors(traced)) == list(tensors(read))
    layers = {node.name: node.layer for node in read.nodes if node.layer is not None}
    assert {node.name: node.layer for node in traced.nodes if node.layer is not None} == layers
    assert traced.digest() == read.digest()


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_every_family(family: str, index: int) -> None:
    architecture = sample_architecture("train", index, families=(family,), size="tiny")
    assert_same(architecture.graph(), exported_graph(architecture))


@pytest.mark.parametrize("split", ["wide", "dense", "bnfree"])
def test_samples_of_other_splits(split: str) -> None:
    architecture = sample_architecture(split, 1)
    assert_same(architecture.graph(), exported_graph(architecture))


def test_other_interfaces() -> None:
    architecture = sample_architecture("train", 3, num_classes=7, in_channels=1, image_size=28)
    assert_same(architecture.graph(), exported_graph(architecture))


@pytest.mark.parametrize("name", QUICK)
def test_reference_networks(name: str) -> None:
    architecture = reference_architecture(name)
    assert_same(architecture.graph(), exported_graph(architecture))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in QUICK])
def test_remaining_reference_networks(name: str) -> None:
    architecture = reference_architecture(name)
    assert_same(architecture.graph(), exported_graph(architecture))


@pytest.mark.slow
@pytest.mark.parametrize("index", range(2, 12))
@pytest.mark.parametrize("family", FAMILIES)
def test_more_samples_of_every_family(family: str, index: int) -> None:
    architecture = sample_architecture("train", index, families=(family,))
    assert_same(architecture.graph(), exported_graph(architecture))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_files(name: str) -> None:
    content = (FOLDER / f"{name}.onnx").read_bytes()
    assert len(content) < 100_000
    assert_same(reference_architecture(name).graph(), read_onnx(content))


def test_a_changed_network_has_another_graph() -> None:
    graph = reference_architecture("resnet20").graph()
    other = Architecture("resnet", ARCHITECTURES["resnet32"], Interface()).graph()
    assert graph.digest() != other.digest()
