"""The value itself: invariants, JSON, digest."""

from __future__ import annotations

import dataclasses
import random

import pytest

from ghn_service.errors import InvalidArchitectureError
from ghn_service.graph import architecture
from ghn_service.graph.architecture import ArchitectureGraph, Node, ParameterSpec, decode_graph, encode_graph
from ghn_service.graph.onnx.reader import read_onnx
from tests.data.regenerate import stored_model

INPUT = Node("input")


def weight(name: str, *shape: int) -> Node:
    return Node("conv", weight=ParameterSpec(name, shape))


@pytest.mark.parametrize(
    ("nodes", "edges"),
    [
        ((), ()),
        ((weight("w", 3, 3),), ()),
        ((INPUT, weight("w", 3, 3)), ((1, 0),)),
        ((INPUT, weight("w", 3, 3)), ((0, 2),)),
        ((INPUT, weight("w", 3, 3)), ((0, 1), (0, 1))),
        ((INPUT, weight("w", 3, 3), weight("w", 3, 3)), ()),
    ],
)
def test_impossible_graphs_are_refused(nodes: tuple[Node, ...], edges: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(InvalidArchitectureError):
        ArchitectureGraph(nodes, edges)


def test_unknown_types_and_missing_weights_are_refused() -> None:
    for arguments in ({"op_type": "wobble"}, {"op_type": "conv"}):
        with pytest.raises(InvalidArchitectureError):
            Node(**arguments)


@pytest.mark.parametrize(
    ("name", "form"),
    [("swin_t", "dynamo-eval-optimize"), ("mobilenet_v3_small", "script-eval"), ("googlenet", "dynamo-train")],
)
def test_json_round_trip(name: str, form: str) -> None:
    graph = read_onnx(stored_model(name, form))
    assert decode_graph(encode_graph(graph)) == graph


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "ghn-architecture-graph/1"}', "null", '"x"'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidArchitectureError):
        decode_graph(text)


def reordered(graph: ArchitectureGraph, seed: int) -> ArchitectureGraph:
    """The same graph in another topological order, with other names."""
    generator = random.Random(seed)
    priority = [generator.random() for _ in graph.nodes]
    waiting = dict.fromkeys(range(graph.num_nodes), 0)
    for _, target in graph.edges:
        waiting[target] += 1
    order: list[int] = []
    while len(order) < graph.num_nodes:
        ready = [index for index, count in waiting.items() if count == 0]
        chosen = 0 if not order else min(ready, key=priority.__getitem__)
        order.append(chosen)
        del waiting[chosen]
        for source, target in graph.edges:
            if source == chosen:
                waiting[target] -= 1
    place = {index: position for position, index in enumerate(order)}
    nodes = [_renamed(graph.nodes[index], f"n{position}") for position, index in enumerate(order)]
    edges = sorted((place[source], place[target]) for source, target in graph.edges)
    return dataclasses.replace(graph, nodes=tuple(nodes), edges=tuple(edges))


def _renamed(node: Node, name: str) -> Node:
    changes = {
        key: dataclasses.replace(spec, name=f"{name}.{key}", initializer="", torch_name="")
        for key, spec in (("weight", node.weight), ("norm_bias", node.norm_bias))
        if spec is not None
    }
    return dataclasses.replace(node, name=name, **changes)


@pytest.mark.parametrize("seed", range(3))
def test_the_digest_depends_on_neither_order_nor_names(seed: int) -> None:
    graph = read_onnx(stored_model("googlenet", "dynamo-eval"))
    assert reordered(graph, seed).digest() == graph.digest()


def test_the_digest_sees_every_edge() -> None:
    graph = read_onnx(stored_model("resnet18", "dynamo-eval"))
    without = [dataclasses.replace(graph, edges=tuple(e for e in graph.edges if e != edge)) for edge in graph.edges]
    assert len({graph.digest(), *(changed.digest() for changed in without)}) == len(graph.edges) + 1


def test_the_digest_sees_attributes_and_shapes() -> None:
    graphs = [ArchitectureGraph((INPUT, weight("w", *shape)), ((0, 1),)) for shape in ((3, 4), (4, 3), (3, 4, 1, 1))]
    assert len({graph.digest() for graph in graphs}) == 3


def test_a_digest_is_computed_once_in_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = zigzag(60)  # refinement alone takes as many rounds as there are sums until the middle
    num_hashes = 0

    def counted(*parts: str) -> str:
        nonlocal num_hashes
        num_hashes += 1
        return real(*parts)

    real = architecture._hash
    monkeypatch.setattr(architecture, "_hash", counted)
    assert graph.digest() == reordered(graph, 1).digest()
    assert num_hashes < 2 * 20 * graph.num_nodes
    before = num_hashes
    graph.digest()
    assert num_hashes == before


def zigzag(count: int) -> ArchitectureGraph:
    """Layers on the input, and the sum of each two neighbours."""
    layers = [weight(f"w{index}", 3, 3) for index in range(count)]
    edges = [(0, 1 + index) for index in range(count)]
    for index in range(count - 1):
        edges += [(1 + index, 1 + count + index), (2 + index, 1 + count + index)]
    return ArchitectureGraph((INPUT, *layers, *[Node("sum")] * (count - 1)), tuple(sorted(edges)))
