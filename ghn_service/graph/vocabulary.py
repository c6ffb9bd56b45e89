"""Fits a graph to the vocabulary of an older checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from ghn_service.graph.architecture import ArchitectureGraph


def restrict_vocabulary(graph: ArchitectureGraph, op_types: Collection[str]) -> ArchitectureGraph:
    """Contracts every node whose type is not in ``op_types``.

    Its predecessors are joined to its successors, and its tensors are initialised by their fallback rules. The graph
    comes back unchanged if there is no such node.

    Args:
        graph: The architecture.
        op_types: Names of the types to keep; ``input`` is among them.
    """
    unknown = [index for index, node in enumerate(graph.nodes) if node.op_type not in op_types]
    if not unknown:
        return graph
    predecessors: list[set[int]] = [set() for _ in graph.nodes]
    successors: list[set[int]] = [set() for _ in graph.nodes]
    for source, target in graph.edges:
        predecessors[target].add(source)
        successors[source].add(target)
    for index in unknown:
        for source in predecessors[index]:
            successors[source] = (successors[source] - {index}) | successors[index]
        for target in successors[index]:
            predecessors[target] = (predecessors[target] - {index}) | predecessors[index]
    removed = set(unknown)
    place = {old: new for new, old in enumerate(index for index in range(graph.num_nodes) if index not in removed)}
    edges = sorted((place[source], place[target]) for source in place for target in successors[source])
    lost = tuple(spec for index in unknown for spec in graph.nodes[index].parameters)
    names = sorted({graph.nodes[index].op_type for index in unknown})
    warning = f"{len(unknown)} nodes of types this checkpoint does not know ({', '.join(names)}) were contracted."
    return dataclasses.replace(
        graph,
        nodes=tuple(graph.nodes[index] for index in place),
        edges=tuple(edges),
        other_parameters=(*graph.other_parameters, *lost),
        warnings=(*graph.warnings, warning),
    )
