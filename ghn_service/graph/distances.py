"""Shortest path lengths between all nodes of an architecture graph: the virtual edges of GHN-2 and GHN-3.

Reference: Knyazev et al. 2021 (arXiv:2110.13100), section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

MAX_CUTOFF = 254


def shortest_path_lengths(num_nodes: int, edges: Iterable[tuple[int, int]], *, cutoff: int = 50) -> NDArray[np.uint8]:
    """Directed, unweighted distances between all pairs of nodes.

    Nodes are visited in topological order: the distances to a node are one more than the least of those to its
    predecessors.

    Args:
        num_nodes: Number of nodes N.
        edges: Pairs (source, target) with source < target.
        cutoff: Longest distance to report, 1 to 254.

    Returns:
        (N, N) uint8; entry [source, target] is the distance, and 0 where there is no path within the cutoff.
    """
    if not 1 <= cutoff <= MAX_CUTOFF:
        raise ValueError(f"cutoff must be from 1 to {MAX_CUTOFF}; got {cutoff}")
    predecessors: list[list[int]] = [[] for _ in range(num_nodes)]
    for source, target in edges:
        predecessors[target].append(source)
    unreachable = cutoff + 1
    to_node = np.full((num_nodes, num_nodes), unreachable, dtype=np.uint8)  # [target, source]
    for target, sources in enumerate(predecessors):
        if sources:
            to_node[target] = np.minimum(to_node[sources].min(axis=0), cutoff) + 1
        to_node[target, target] = 0
    to_node[to_node == unreachable] = 0
    return np.ascontiguousarray(to_node.T)
