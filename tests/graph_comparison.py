"""Compares a graph that was read with the reference's record of it, up to the order of nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import Any

import networkx
import numpy as np

from ghn_service.graph.architecture import ArchitectureGraph, Node, shortest_distances


def as_networkx(graph: ArchitectureGraph) -> networkx.DiGraph:
    """The graph for networkx's algorithms: node indices and edges."""
    result = networkx.DiGraph(graph.edges)
    result.add_nodes_from(range(graph.num_nodes))
    return result


def torch_names(graph: ArchitectureGraph) -> set[str]:
    """Torch names of everything that the graph's nodes predict."""
    return {spec.torch_name for node in graph.nodes for spec in node.parameters}


def align(record: Mapping[str, Any], distances: np.ndarray, graph: ArchitectureGraph) -> list[int]:
    """The place in ``graph`` of every node of the reference.

    Nodes with parameters are matched by name. The others are matched by type, window, and their distances to and from
    all nodes with parameters, which tells every node of these networks apart.

    Args:
        record: The reference's record.
        distances: The reference's (N, N) distance matrix.
        graph: The graph that was read.
    """
    ours = shortest_distances(graph)
    named = {node.weight.torch_name: place for place, node in enumerate(graph.nodes) if node.weight is not None}
    reference_named = {node["param"]: place for place, node in enumerate(record["nodes"]) if node["param"]}
    assert set(named) == set(reference_named)
    names = sorted(named)
    anchors = [named[name] for name in names]
    reference_anchors = [reference_named[name] for name in names]
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, node in enumerate(graph.nodes):
        places[_signature(_our_label(node), place, ours, anchors)].append(place)
    permutation = []
    for place, node in enumerate(record["nodes"]):
        found = places[_signature(_reference_label(node), place, distances, reference_anchors)]
        assert len(found) == 1, f"reference node {node} has {len(found)} counterparts"
        permutation.append(found[0])
    return permutation


def _signature(label: Hashable, place: int, distances: np.ndarray, anchors: list[int]) -> Hashable:
    return label, distances[place, anchors].tobytes(), distances[anchors, place].tobytes()


def _our_label(node: Node) -> Hashable:
    return node.op_type, node.weight.torch_name if node.weight else None, node.kernel_shape


def _reference_label(node: Mapping[str, Any]) -> Hashable:
    window = tuple(node["shape"][2:]) if node["shape"] and not node["param"] else None
    return node["type"], node["param"], window
