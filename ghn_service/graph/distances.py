"""Shortest-path distances between nodes: the virtual edges of GHN-2 and GHN-3.

Reference: Knyazev et al. 2021 (arXiv:2110.13100), section 4.2. Legend: N is the number of nodes.
"""

from __future__ import annotations

import numpy
import numpy.typing

from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.graph.reference_quirks import MAX_DISTANCE

_UNREACHABLE = 255


def shortest_distances(graph: ArchitectureGraph, *, cutoff: int = MAX_DISTANCE) -> numpy.typing.NDArray[numpy.uint8]:
    """The directed distance of every pair of nodes.

    Edges only go forward, so the distances from a node are one more than the smallest of its successors' distances,
    taken from the last node to the first: O(edges * N) bytes touched.

    Args:
        graph: The architecture.
        cutoff: Largest distance that counts, in edges, at most 253.

    Returns:
        (N, N) uint8: entry [i, j] is the number of edges on a shortest path from node i to node j, 1 for an edge;
        0 on the diagonal, for unreachable pairs and for pairs farther apart than ``cutoff``.
    """
    if not 1 <= cutoff < _UNREACHABLE - 1:
        raise ValueError(f"cutoff must be in [1, {_UNREACHABLE - 2}], got {cutoff}")
    num_nodes = graph.num_nodes
    successors: list[list[int]] = [[] for _ in range(num_nodes)]
    for source, target in graph.edges:
        successors[source].append(target)
    distances = numpy.full((num_nodes, num_nodes), _UNREACHABLE, dtype=numpy.uint8)
    for index in range(num_nodes - 1, -1, -1):
        targets = successors[index]
        if not targets:
            continue
        # Columns before index + 1 cannot be reached.
        row = distances[targets[0], index + 1 :].copy()
        for target in targets[1:]:
            numpy.minimum(row, distances[target, index + 1 :], out=row)
        row[row >= cutoff] = _UNREACHABLE - 1
        row += 1
        row[numpy.asarray(targets) - (index + 1)] = 1
        distances[index, index + 1 :] = row
    distances[distances == _UNREACHABLE] = 0
    return distances
